"""Many callers at once: each gets the answer that it would get alone, and who leaves makes room."""

import json
import socket
import subprocess
import time
from contextlib import suppress

import numpy as np
import pytest
import requests

PLAIN = (
    "seven of the lions turned around on the top shelf",
    "please send the report before dinner",
    "when does the bakery open tomorrow",
    "i will buy a red tent tomorrow",
    "is the helmet still on the old farm",
    "the curious rabbit ran by the window",
    "please call the bakery tomorrow",
    "we felt angry because they saw a ghost",
)
"""What the package's model gets right, and with certainty: a batch of others rounds differently."""
LEAVES = 1
"""Seconds after which a caller leaves."""
PATIENCE = 60
"""For the first words of one of many, seconds."""
SECONDS = 60
NAMES = {
    "please call priya raghavan tomorrow": "priya raghavan",
    "is imogen varga free on friday": "imogen varga",
    "is quentin ashdown free next year": "quentin ashdown",
    "please call mira kapoor tomorrow": "mira kapoor",
}
"""What it gets right with the name in a datastore, and not without."""


@pytest.fixture(scope="module")
def clips(clip):
    return {sentence: clip(sentence) for sentence in (*PLAIN, *NAMES)}


def test_24_callers_at_once_are_all_answered_as_if_they_were_alone(service, clips, at_once):
    assert [service.text(clips[sentence]) for sentence in PLAIN] == list(PLAIN)
    assert at_once(lambda sentence: service.text(clips[sentence]), PLAIN * 3) == list(PLAIN * 3)


def test_callers_with_datastores_of_their_own_do_not_hear_each_other(
    service, clips, datastore, at_once
):
    stores = {sentence: datastore(name) for sentence, name in NAMES.items()}
    calls = [(sentence, store) for sentence in NAMES for store in (*stores.values(), None)]

    def ask(call):
        sentence, store = call
        given = {} if store is None else {"datastore": store}
        return service.text(clips[sentence], **given)

    for answers in (list(map(ask, calls)), at_once(ask, calls)):
        for (sentence, store), heard in zip(calls, answers, strict=True):
            assert (heard == sentence) == (stores[sentence] == store), (sentence, store, heard)


def test_streams_at_once_are_not_mixed_up(service, clips, at_once):
    def stream(sentence):
        told = service.transcribe(clips[sentence], stream="true").text.split("\n\n")[:-1]
        *deltas, done = (json.loads(block.removeprefix("data: ")) for block in told)
        assert "".join(event["delta"] for event in deltas) == done["text"]
        return done["text"]

    assert at_once(stream, PLAIN * 2) == list(PLAIN * 2)


@pytest.fixture(scope="module")
def minutes(wave, write):
    """A file that takes the service many seconds."""
    several = np.concatenate([np.pad(wave(sentence), (0, 8000)) for sentence in NAMES])
    return write(np.tile(several, 10), "OGG")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", [{}, {"stream": "true"}])
def test_who_leaves_makes_room_at_once(service, clips, minutes, at_once, form):
    """As many callers as there is room for leave amid long transcripts; as many come then."""
    room = service.settings.limits.requests

    def leave(_):
        patience = PATIENCE if form else LEAVES
        with (
            suppress(requests.RequestException),
            requests.post(
                f"{service.url}/v1/audio/transcriptions",
                files={"file": ("a.ogg", minutes)},
                data=form,
                timeout=patience,
                stream=True,
            ) as answer,
        ):
            assert answer.status_code == 200
            begun.append(next(answer.iter_lines()))  # and no more of it
            return
        assert time.monotonic() >= started + patience - 0.5, "it was not interrupted"

    started, begun = time.monotonic(), []
    at_once(leave, list(range(room)))
    assert len(begun) == (room if form else 0), "each left amid a transcript"
    time.sleep(0.5)
    started = time.monotonic()
    answers = at_once(lambda _: service.transcribe(clips[PLAIN[0]]), list(range(room)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["text"] for answer in answers} == {PLAIN[0]}
    assert time.monotonic() - started < 15, "what was given up is still being transcribed"


def test_more_than_there_is_room_for_are_refused_and_nobody_is_lost(
    service, clips, at_once, refused
):
    room = service.settings.limits.requests
    answers = at_once(lambda _: service.transcribe(clips[PLAIN[0]]), list(range(2 * room)))
    for answer in answers:
        if answer.status_code != 200:
            refused(answer, 429, "busy")
    assert sum(answer.status_code == 200 for answer in answers) >= room / 2
    assert service.transcribe(clips[PLAIN[0]]).status_code == 200


@pytest.mark.parametrize("stated", [True, False])
def test_an_upload_beyond_the_limit_is_refused_while_it_comes_in(service, tmp_path, stated):
    """curl stops sending when it is answered: it says how far it came."""
    (tmp_path / "large").write_bytes(bytes(20_000_000))
    command = ["curl", "-sS", "-m", "30", "--limit-rate", "8M", "-o", str(tmp_path / "answer")]
    command += ["-F", f"file=@{tmp_path / 'large'}", "-w", "%{http_code} %{size_upload}"]
    command += [] if stated else ["-H", "Transfer-Encoding: chunked"]
    command.append(f"{service.url}/v1/audio/transcriptions")
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    status, taken = map(int, told.stdout.split())
    assert status == 413 and '"too_large"' in (tmp_path / "answer").read_text()
    limit = service.settings.limits.upload_mb * 1e6
    assert taken < limit / 2 if stated else taken < 2 * limit


@pytest.mark.slow  # GRACE_SECONDS of waiting; test_middleware has the same with two of them
def test_40_uploads_that_never_end_hold_nobody_up(service, clips, at_once):
    """Callers that send a little and then nothing do not keep others from being served."""
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    host, port = service.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port)), timeout=SECONDS) for _ in range(40)]
    for one in slow:
        one.sendall(head)
    answers = at_once(lambda sentence: service.text(clips[sentence]), PLAIN)
    assert answers == list(PLAIN)
    for one in slow:
        answer = one.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 "), answer
        one.close()
    service.ready()
