"""The HTTP application with the real encoder, retriever and decoder in this process: each is called
directly, as Ray Serve's handles would call its replica. A Ray cluster holds what it searches."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
import requests
from application import Handle, made, served
from ray import serve

from cluster.shards import NAMESPACE
from serve.decoder import Decoder
from serve.encoder import Encoder
from serve.messages import EncodedSegment
from serve.retriever import Retriever
from serve.settings import read

SECONDS = 60


@dataclass(frozen=True)
class WholeApplication:
    """Where it answers, and how often each method of a part was called so far."""

    url: str
    calls: Counter[str]
    another: Callable[[], AbstractContextManager["WholeApplication"]]
    """One more ingress in front of the same parts, with the API keys that are set by then."""

    def request(self, method: str, path: str, **more: Any) -> requests.Response:
        """Any request; an answer within SECONDS."""
        return requests.request(method, self.url + path, timeout=SECONDS, **more)

    def transcribe(self, data: bytes, key: str | None = None, **form: Any) -> requests.Response:
        """POST a file with the form's fields, by an API `key`; `context` and `include` are
        lists."""
        fields = {f"{n}[]" if n in ("context", "include") else n: v for n, v in form.items()}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        given = {"files": {"file": ("a.flac", data)}, "data": fields, "headers": headers}
        return self.request("POST", "/v1/audio/transcriptions", **given)

    def text(self, data: bytes, **form: Any) -> str:
        """The transcript of a file that has one."""
        answer = self.transcribe(data, **form)
        assert answer.status_code == 200, answer.text
        return answer.json()["text"]


@contextmanager
def whole_application(model: str, directory: Path) -> Iterator[WholeApplication]:
    """The application of a model, whose datastores lie in `directory`."""
    fields = {"model": model, "datastores": str(directory), "retriever": {"shard_cpus": 0.01}}
    fields["decoder.compiled"] = False
    settings, calls = read(fields), Counter()
    encoding = Encoder(settings)
    encoder = _called(encoding, calls, encode=_alone(encoding))
    decoder = _called(Decoder(settings), calls)
    name = f"whole-{model.partition(':')[2]}"
    with patch.object(serve, "get_replica_context", lambda: SimpleNamespace(app_name=name)):
        retriever = Retriever(settings, encoder, decoder)
    limits = {"upload_mb": 2, "timeout_seconds": SECONDS}
    shelf = _called(retriever, calls)

    @contextmanager
    def ingress() -> Iterator[WholeApplication]:
        with served(made(decoder, shelf, encoder, fields, **limits)) as url:
            yield WholeApplication(url, calls, ingress)

    try:
        with ingress() as application:
            yield application
    finally:
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"mmrag-{name}"):
                ray.kill(ray.get_actor(**actor))


def _alone(encoder: Encoder) -> Callable[..., Any]:
    """What encodes one clip: batches are made by Serve, in a replica."""

    async def encode(wave: np.ndarray) -> EncodedSegment | None:
        [found] = await asyncio.to_thread(encoder._encode, [wave])
        return found

    return encode


def _called(part: Any, calls: Counter[str], **others: Callable[..., Any]) -> Handle:
    """A handle to a part, with `others` in the place of its methods; how often each is called is
    counted."""

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return method(*arguments)

        return call

    names = [name for name in dir(part) if not name.startswith("_")]
    methods = {name: getattr(part, name) for name in names} | others
    return Handle(**{name: counted(name, method) for name, method in methods.items()})
