"""A running endpoint, seen from outside: a file goes up as it is read, its text comes down as it is
made.

Knows the endpoint's HTTP and the records that its answers become; nothing of models, and nothing
of terminals.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

import requests

from mmrag.records import Source, Transcript, Word
from mmrag.retrieval.wording import Entry, entry

ROUTE, DATASTORES = "/v1/audio/transcriptions", "/v1/datastores"
CONNECT_SECONDS, READ_SECONDS = 5, 300
"""Until somebody answers the phone; between one sign of life and the next."""
ATTEMPTS = 4
"""Times a file is offered to a service that has too much to do."""
WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1, 60
"""Between them, where the service does not say how long; whatever it says."""
BLOCK = 2**14
"""Bytes sent at a time: few, because each block has to leave within CONNECT_SECONDS."""


class ServiceError(RuntimeError):
    """The service did not do what it was asked. The message says why."""


@dataclass(frozen=True)
class Answer:
    """A whole file transcribed. What `missing_shards` index shards hold was not found."""

    transcript: Transcript
    missing_shards: int


class Service:
    """An endpoint at `url`, with or without `/v1`; `key` is sent as a bearer token.

    Raises ValueError for a URL that is none of an endpoint, and for a key that no header can carry.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no URL of a service: http://HOST:PORT")
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("a service's URL has no user, no query and no fragment")
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            # Said here, because the libraries below would quote it.
            raise ValueError("the API key holds characters that no API key has")
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._session = requests.Session()
        if key:  # a header would give way to ~/.netrc
            self._session.auth = _Bearer(key)

    def transcribe(
        self,
        path: Path,
        datastore: str | None = None,
        phrases: Sequence[str | Entry] = (),
        retrieval: str | None = None,
        shortlist: int | None = None,
    ) -> Iterator[str | Answer]:
        """The text of a file piece by piece, then the answer, which is what counts: a segment may
        have been made again.

        `datastore` is a name on the service, `phrases` are listened for in this file alone; of many
        of either, in each segment for a `shortlist` of so many. Raises OSError if the file cannot
        be read, else ServiceError.
        """
        form = [  # what is None is not sent
            ("stream", "true"),
            ("include[]", "retrieval"),
            ("datastore", datastore),
            ("retrieval", retrieval),
            ("shortlist", None if shortlist is None else str(shortlist)),
            *(("context[]", _field(entry(phrase))) for phrase in phrases),
        ]
        with path.open("rb") as file, self._accepted(file, form) as response:
            try:
                for event in events(response.iter_content(None)):
                    if "error" in event:
                        raise ServiceError(_message(event) or "the service gave up")
                    if event.get("type") == "transcript.text.delta":
                        yield event["delta"]
                    elif event.get("type") == "transcript.text.done":
                        yield _answer(event)
                        return
            except requests.RequestException as error:
                raise ServiceError(f"the answer broke off: {_reason(error)}") from error
            except (KeyError, TypeError, ValueError) as error:
                raise ServiceError(f"the answer cannot be understood: {error!r}") from error
        raise ServiceError("the answer ended before the transcript did")

    def datastores(self) -> list[dict[str, Any]]:
        """The service's datastores, as it describes them. Raises ServiceError."""
        return self._asked("GET", DATASTORES)["data"]

    def create(self, name: str, texts: Sequence[str | Entry]) -> dict[str, Any]:
        """Make a datastore of texts; what it then is. Raises ServiceError."""
        return self._asked("POST", DATASTORES, json={"name": name, **_given(texts)})

    def add(self, name: str, texts: Sequence[str | Entry]) -> dict[str, Any]:
        """Put texts into a datastore; how many entries were `added`. Raises ServiceError."""
        place = f"{DATASTORES}/{quote(name, safe='')}/entries"
        return self._asked("POST", place, json=_given(texts))

    def preview(self, name: str, given: Sequence[str | Entry]) -> list[dict[str, Any]]:
        """What entries would be confused with in a datastore, and what is heard of them today.
        Raises ServiceError."""
        place = f"{DATASTORES}/{quote(name, safe='')}/preview"
        asked = {"entries": [entry(one).fields() for one in given]}
        return self._asked("POST", place, json=asked)["data"]

    def remove(self, name: str, document: str) -> dict[str, Any]:
        """Delete a document; how many entries were `deleted`. Raises ServiceError."""
        place = f"{DATASTORES}/{quote(name, safe='')}/entries"
        return self._asked("DELETE", place, params={"document": document})

    def look_up(self, name: str, query: str | Path, k: int) -> list[dict[str, Any]]:
        """What a datastore finds before each token of a text, or of what is said in a recording.

        Raises OSError if the recording cannot be read, else ServiceError.
        """
        place = f"{DATASTORES}/{quote(name, safe='')}/search"
        if isinstance(query, str):
            return self._asked("POST", place, json={"text": query, "k": k})["data"]
        with query.open("rb") as file, self._accepted(file, [("k", str(k))], place) as response:
            try:
                return self._understood(response)["data"]
            except requests.RequestException as error:
                raise ServiceError(f"the answer broke off: {_reason(error)}") from error

    def tend(self, name: str, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a task of `retrieval.upkeep` tells of a datastore. Raises ServiceError."""
        place = f"{DATASTORES}/{quote(name, safe='')}/upkeep/{task}"
        return self._asked("POST", place, json=dict(given))

    def _asked(self, method: str, place: str, **more: Any) -> dict[str, Any]:
        """A JSON answer."""
        try:
            response = self._session.request(
                *(method, self.url + place),
                timeout=(CONNECT_SECONDS, READ_SECONDS),
                allow_redirects=False,
                **more,
            )
        except requests.RequestException as error:
            raise ServiceError(f"no answer from {self.url}: {_reason(error)}") from error
        if not response.ok or response.is_redirect:
            raise ServiceError(self._refusal(response))
        return self._understood(response)

    def _understood(self, response: requests.Response) -> dict[str, Any]:
        try:
            return response.json()
        except ValueError as error:
            raise ServiceError(f"the answer of {self.url} is no JSON: {error}") from error

    def _accepted(
        self, file: BinaryIO, form: Sequence[tuple[str, str | None]], place: str = ROUTE
    ) -> requests.Response:
        """The successful response to an upload, its body yet to be read."""
        attempts = 1
        while (response := self._sent(file, form, place)).status_code != 200:
            with response:
                if response.status_code != 429 or attempts == ATTEMPTS:
                    raise ServiceError(self._refusal(response))
            time.sleep(_wait(response.headers.get("Retry-After", "")))
            attempts += 1
        return response

    def _sent(
        self, file: BinaryIO, form: Sequence[tuple[str, str | None]], place: str
    ) -> requests.Response:
        upload = _Upload(file, form)
        try:
            return self._session.post(
                self.url + place,
                data=upload,
                headers={"Content-Type": upload.kind},
                stream=True,
                timeout=(CONNECT_SECONDS, READ_SECONDS),
                allow_redirects=False,  # it would become a GET, or take the key elsewhere
            )
        except requests.ReadTimeout as error:
            raise ServiceError(f"no answer from {self.url} in {READ_SECONDS} s") from error
        except requests.RequestException as error:
            raise ServiceError(f"no answer from {self.url}: {_reason(error)}") from error

    def _refusal(self, response: requests.Response) -> str:
        """Why it is not a success, as far as the service says."""
        said = response.reason or "no reason given"
        with suppress(requests.RequestException):  # whoever is in between may not answer in JSON
            said = _message(response.json()) or said
        if response.is_redirect:
            said = f"moved to {response.headers['Location']}"
        return f"{self.url} answers {response.status_code}: {said}"


def _field(one: Entry) -> str:
    """An entry as a form has it."""
    return one.text if one.plain else json.dumps(one.fields(), ensure_ascii=False)


def _given(texts: Sequence[str | Entry]) -> dict[str, Any]:
    """What a datastore is to be given: texts, and the entries that say more."""
    every = [entry(one) for one in texts]
    more = [one.fields() for one in every if not one.plain]
    return {
        "texts": [one.text for one in every if one.plain],
        **({"entries": more} if more else {}),
    }


class _Bearer(requests.auth.AuthBase):
    """Shows a key to whoever is asked."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class _Upload:
    """A multipart form whose last part is an open file, read while it is sent."""

    def __init__(self, file: BinaryIO, form: Sequence[tuple[str, str | None]]) -> None:
        # The library writes the form around an empty file, which ours then takes the place of. The
        # service goes by content: it need not learn what the file is called.
        around = requests.Request("POST", "http://-", data=form, files={"file": ("audio", b"")})
        written = around.prepare()
        self.kind = written.headers["Content-Type"]
        """The form's media type, which names its boundary."""
        self._tail = f"\r\n--{self.kind.rpartition('boundary=')[2]}--\r\n".encode()
        self._head = written.body.removesuffix(self._tail)
        self._file = file
        self._size = file.seek(0, os.SEEK_END)  # one at a URL has no number of its own
        file.seek(0)

    def __len__(self) -> int:
        return len(self._head) + self._size + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        self._file.seek(0)
        left = self._size  # as was promised: a file may grow meanwhile
        while left:
            block = self._file.read(min(left, BLOCK))
            if not block:
                raise ServiceError("the file became shorter while it was sent")
            left -= len(block)
            yield block
        yield self._tail


def events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, wherever its bytes were cut.

    Lines end in LF or CRLF; an event that the stream ends in the middle of is none (HTML Living
    Standard, 9.2.6). Raises ValueError for one that is no JSON object.
    """
    rest, data = b"", []
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line.removeprefix(b"data:"))
            elif not line and data:
                event = json.loads(b"\n".join(data))
                if not isinstance(event, dict):
                    raise ValueError("an event that is no JSON object")
                yield event
                data = []


def _answer(done: dict[str, Any]) -> Answer:
    words = tuple(_word(word) for word in done["words"])
    transcript = Transcript(
        text=done["text"],
        words=words,
        end=done["duration"],
        unclear=bool(words) and all(word.unclear for word in words),
    )
    return Answer(transcript, done.get("missing_shards", 0))


def _word(word: dict[str, Any]) -> Word:
    source = word["source"]
    if source is not None:
        source = Source(**{field.name: source[field.name] for field in fields(Source)})
    evidence = ("probability", "lm_probability", "changed", "start", "end")
    known = {name: word[name] for name in evidence}
    sure = {name: word[name] for name in ("confidence", "unclear") if name in word}
    return Word(text=word["word"], source=source, **known, **sure)


def _message(body: object) -> str | None:
    """What the API's errors say; None if it is none of them."""
    match body:
        case {"error": {"message": str(message)}}:
            return message
    return None


def _wait(told: str) -> float:
    """Seconds to wait for a service that `told` so in Retry-After."""
    return min(int(told) if told.isdecimal() else WAIT_SECONDS, LONGEST_WAIT_SECONDS)


def _reason(error: BaseException) -> str:
    """What the network said first, without what each library on the way added to it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
