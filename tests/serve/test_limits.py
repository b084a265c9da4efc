"""Every limit of `config.yaml`, at it and one beyond it, as callers meet it over HTTP.

The process of `make serve`, whose parts hand each other messages of at most 4 MiB.
"""

import time

import numpy as np
import pytest
import requests
from service_process import serving

from serve.settings import read

TRANSCRIBE, DATASTORES = "/v1/audio/transcriptions", "/v1/datastores"
SENTENCE, NAME = "please call priya raghavan tomorrow", "priya raghavan"
LIMITS = read({}).limits
LETTERS = "abcdefghijklmnoprstuvwxy"
NAMES = [f"{a}ar{b}on moss" for a in LETTERS for b in LETTERS]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The service with the limits that come with it."""
    with serving(tmp_path_factory.mktemp("limits")) as process:
        yield process.url


@pytest.fixture(scope="module")
def sentence(wave):
    return wave(SENTENCE)


@pytest.fixture
def ask(url, sentence, write):
    """`ask(**fields)`: the answer to a sentence, or to another file, with these fields."""

    def post(data=None, **fields):
        files = {"file": ("a.flac", write(sentence) if data is None else data)}
        timeout = LIMITS.timeout_seconds + 60
        return requests.post(url + TRANSCRIBE, files=files, data=fields, timeout=timeout)

    return post


@pytest.fixture
def create(url):
    """`create(name, texts)`: the answer to a new datastore, which goes when the test ends."""
    made = []

    def post(name, texts, **more):
        made.append(name)
        given = {"data": {"name": name, "text": texts}, **more} if more else {}
        given = given or {"json": {"name": name, "texts": texts}}
        return requests.post(url + DATASTORES, timeout=LIMITS.timeout_seconds + 60, **given)

    yield post
    for name in made:
        requests.delete(f"{url}{DATASTORES}/{name}", timeout=60)


def heard(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["text"]


def test_audio_of_the_longest_length(ask, write, sentence, refused):
    """Half an hour, most of it silence; the sentence is its last."""
    wave = np.zeros(round(LIMITS.audio_seconds * 16_000), np.float32)
    wave[-len(sentence) :] = sentence
    assert heard(ask(write(wave), context=NAME)) == SENTENCE
    longer = np.append(wave, np.zeros(16_000, np.float32))
    assert "at most 1800 s" in refused(ask(write(longer)), 413, "too_long", "file")


def test_an_upload_of_the_largest_size(ask, write, sentence, refused):
    """A file that is as large as it may be because of what follows the audio."""
    size = round(LIMITS.upload_mb * 1e6)
    wav = write(sentence, "WAV")
    assert heard(ask(wav + bytes(size - len(wav) - 1000), context=NAME)) == SENTENCE
    message = refused(ask(wav + bytes(size - len(wav) + 1)), 413, "too_large")
    assert message == "the upload is larger than 25 MB"


def test_as_many_phrases_as_there_may_be(ask, write, sentence, refused):
    phrases = [*NAMES[: LIMITS.phrases - 1], NAME]
    assert heard(ask(context=phrases)) == SENTENCE
    minute = write(np.tile(np.pad(sentence, (0, 8000)), 24))
    assert heard(ask(minute, context=phrases)).count(NAME) > 6
    beyond = ask(**{"context[]": [*phrases, "mira kapoor"]})
    assert "501 are too many, at most 500" in refused(beyond, 400, None, "context[]")


def test_as_many_texts_as_there_may_be(ask, create, refused):
    texts = [*NAMES[: LIMITS.texts - 1], NAME]
    made = create("many", texts)
    assert made.status_code == 201, made.text
    assert made.json()["documents"] == len(texts)
    assert heard(ask(datastore="many")) == SENTENCE
    beyond = create("more", [*texts, "mira kapoor"])
    assert "501 are too many, at most 500" in refused(beyond, 400, None, "texts")


def test_texts_of_the_longest_length_and_as_long_together_as_they_may_be(create, refused):
    words = "please call the bakery on the corner about the red tent and the old helmet " * 7
    longest = [f"{number:02} {words}"[: LIMITS.text_length].strip() for number in range(40)]
    longest = [text.ljust(LIMITS.text_length, "a") for text in longest]
    assert sum(map(len, longest)) == LIMITS.texts_length
    made = create("long", longest)
    assert made.status_code == 201, made.text
    assert made.json()["documents"] == len(longest)
    together = create("more", [*longest, "one more"])
    assert "20008 characters in all, at most 20000" in refused(together, 400, None, "texts")
    longer = create("more", [longest[0] + "a"])
    assert "has 501 characters, at most 500" in refused(longer, 400, None, "texts")


def test_recordings_of_many_times_a_message(create, sentence, write):
    count = int(LIMITS.audio_seconds / 4 * 16_000 / len(sentence))
    files = [("file", ("a.flac", write(sentence)))] * count
    made = create("recorded", [SENTENCE] * count, files=files)
    assert made.status_code == 201, made.text


def test_as_many_datastores_as_there_may_be(create, refused):
    for number in range(LIMITS.datastores):
        answer = create(f"one-{number}", [])
        assert answer.status_code == 201, answer.text
    assert "100 datastores are there already" in refused(create("one-more", []), 400)


def test_as_many_requests_as_there_may_be(ask, write, sentence, at_once, refused):
    """One more than there is room for, each of which takes seconds."""
    minute = write(np.tile(np.pad(sentence, (0, 8000)), 24))
    answers = at_once(lambda _: ask(minute), list(range(LIMITS.requests + 4)))
    beyond = [answer for answer in answers if answer.status_code != 200]
    assert 1 <= len(beyond) <= 4
    for answer in beyond:
        refused(answer, 429, "busy")


def test_a_request_that_takes_too_long(tmp_path, write, sentence, refused):
    """At its limit of two seconds, which a minute of speech exceeds and a sentence does not."""
    with serving(tmp_path, "limits.timeout_seconds=2") as process:
        file, minutes = (write(np.tile(np.pad(sentence, (0, 8000)), n)) for n in (1, 100))

        def post(data):
            files = {"file": ("a.flac", data)}
            return requests.post(process.url + TRANSCRIBE, files=files, timeout=60)

        assert post(file).status_code == 200
        started = time.monotonic()
        refused(post(minutes), 504, "timeout")
        assert time.monotonic() - started < 10
