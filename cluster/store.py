"""The MLflow store: where it is, whether it answers, and what it has to say when it does not."""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient

from cluster.address import PROBE_SECONDS
from mmrag.config import Tracking
from mmrag.storage import is_url

SQLITE = "sqlite:///"
HURRY = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "6"}
"""MLflow's own patience with a server that is down is minutes. What the shell exports stays."""
URI_VARIABLE = "MLFLOW_TRACKING_URI"
URI_SETTING = "tracking.uri"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
PASSING = (None, "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""MLflow's codes of errors that may be over at another try; None is another library's."""


def tracking_uri(tracking: Tracking) -> str:
    """The store's URI: MLFLOW_TRACKING_URI or the configured one; SQLite paths made absolute.

    Raises ValueError for an SQLite database at a URL.
    """
    uri = os.environ.get(URI_VARIABLE) or tracking.uri
    if uri.startswith(SQLITE):
        if is_url(uri.removeprefix(SQLITE)):
            raise ValueError(
                f"tracking.uri {shown(uri)}: a database is a file on a disk, and not at a URL: "
                f"start an MLflow server, and name it in {URI_VARIABLE}"
            )
        path = Path(uri.removeprefix(SQLITE)).expanduser().absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return f"{SQLITE}{path}"
    return uri


def connect(uri: str) -> MlflowClient:
    """A client of the store, which says little of its own accord."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what does not answer is told once
    return MlflowClient(tracking_uri=uri)


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """A store that does not answer the block's calls is a ConnectionError that says what to do."""
    try:
        with hurry():
            probe(uri)
            yield
    except ValueError:
        raise
    except Exception as error:  # MLflow hands on whatever its store's own library raises
        raise unanswered(uri, error) from error


@contextmanager
def hurry() -> Iterator[None]:
    """MLflow's calls of the block, in any thread, are as patient as HURRY says."""
    global _hurrying
    with _HURRYING:
        if not _hurrying:
            _HURRIED.update({key: one for key, one in HURRY.items() if key not in os.environ})
            os.environ.update(_HURRIED)
        _hurrying += 1
    try:
        yield
    finally:
        with _HURRYING:
            _hurrying -= 1
            if not _hurrying:
                for key in _HURRIED:
                    os.environ.pop(key, None)
                _HURRIED.clear()


_HURRYING, _HURRIED, _hurrying = threading.Lock(), {}, 0
"""What `hurry` put into the environment, which all threads share, and how many blocks need it."""


def unanswered(store: str, error: Exception, setting: str = URI_SETTING) -> ConnectionError:
    """What to tell whose store does not answer."""
    decided = URI_VARIABLE if os.environ.get(URI_VARIABLE) else setting
    return ConnectionError(
        f"the MLflow store {shown(store)} does not answer: {_reason(error)}. Start it, or name "
        f"another in {decided}; {SQLITE}FILE needs no server."
    )


def _reason(error: Exception) -> str:
    """What the operating system said, if it did, else the first line of what MLflow says."""
    said = re.search(r"\[Errno -?\d+\] ([^'\")]+)|\b((?:\w+ )?timed out)\b", str(error))
    return (said[1] or said[2]) if said else shown(error)


def probe(store: str) -> None:
    """A database that cannot be reached raises here: MLflow tries for most of an hour.

    Servers are asked over HTTP, whose patience is `hurry`'s.
    """
    if store.startswith(SQLITE):
        with closing(sqlite3.connect(store.removeprefix(SQLITE))) as database:
            database.execute("PRAGMA schema_version")
        return
    parts = urlsplit(store)
    port = parts.port or DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    if not parts.scheme.startswith("http") and parts.hostname and port:
        socket.create_connection((parts.hostname, port), PROBE_SECONDS).close()


def may_pass(error: Exception) -> bool:
    """Whether a call that failed is worth another try; a file that is gone is not."""
    return error_code(error) in PASSING and not isinstance(error, FileNotFoundError)


def error_code(error: Exception) -> str | None:
    """MLflow's code of an error; None of another library's."""
    return getattr(error, "error_code", None)


def shown(message: object) -> str:
    """One line, of a URI or of what MLflow has to say about it, without the URI's password."""
    line = (str(message).splitlines() or [""])[0]
    return re.sub(r"//[^/@\s]*@", "//", line)[:300]
