"""An S3 server in this process, which every process of the tests finds by itself.

Workers of a cluster that was started before know of it by the files that `AWS_CONFIG_FILE` and
`AWS_SHARED_CREDENTIALS_FILE` name, which the session's environment holds from its beginning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

from mmrag import storage
from mmrag.storage import Url

CREDENTIALS = "[default]\naws_access_key_id = testing\naws_secret_access_key = secret\n"
SETTINGS = "[default]\nregion = us-east-1\nendpoint_url = {address}\n"


@contextmanager
def serving(bucket: str) -> Iterator[Url]:
    """Serve an empty bucket; its URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    files = {
        Path(os.environ["AWS_CONFIG_FILE"]): SETTINGS.format(address=f"http://{host}:{port}"),
        Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]): CREDENTIALS,
    }
    for file, text in files.items():
        file.write_text(text)
    storage._connected.cache_clear()
    try:
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield Url(f"s3://{bucket}")
    finally:
        server.stop()
        storage._connected.cache_clear()
        for file in files:
            file.unlink()
