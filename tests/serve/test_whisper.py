"""The endpoint with a Whisper behind it: the same transcripts, datastores and phrases."""

import pytest
import requests
from service_process import serving
from whisper_checkpoint import random_whisper

from mmrag.config import ConfigError
from mmrag.model.whisper import WhisperError
from mmrag.recogniser import load
from mmrag.transcribe import transcribe
from serve.model import described
from serve.settings import read

WINDOW = 6


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    """The name of a checkpoint with random weights; its sound and fury signify nothing."""
    return random_whisper(tmp_path_factory.mktemp("whisper"), window_seconds=WINDOW)


def settings(model: str, **changes):
    return read({"model": model, "decode": {"max_seconds": WINDOW}, **changes})


def test_what_a_whisper_is_is_known_without_its_weights(whisper):
    known = described(settings(whisper))
    assert known.fingerprints == known.keyed_by and set(known.keyed_by) == {"whisper"}
    assert (known.width, known.window_seconds, known.adapted) == (16, WINDOW, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode": {"max_seconds": 7}}, r"decode\.max_seconds 7: .* hears at most 6 s at once"),
        ({"languages": ["es"]}, "language 'es': this checkpoint knows English alone"),
        ({"model": "whisper:/nowhere"}, "/nowhere"),
    ],
)
def test_settings_that_it_cannot_serve_are_refused_at_the_start(whisper, changes, message):
    with pytest.raises((ConfigError, WhisperError), match=message):
        described(settings(**{"model": whisper, **changes}))


@pytest.mark.slow
@pytest.mark.ray
def test_it_transcribes_looks_things_up_and_says_what_it_cannot_do(whisper, clip, tmp_path):
    recogniser = load(whisper)
    told = settings(whisper)
    data = clip("turn on the light")
    here = " ".join(part.text for part in transcribe(data, recogniser, told.decode))
    given = [f"model={whisper}", f"decode.max_seconds={WINDOW}"]
    with serving(tmp_path, *given) as service:

        def post(path: str, **form) -> requests.Response:
            files = {"file": ("clip.flac", data)}
            return requests.post(f"{service.url}{path}", files=files, data=form, timeout=60)

        [model] = requests.get(f"{service.url}/v1/models", timeout=60).json()["data"]
        assert set(model["fingerprints"]) == {"whisper"}
        assert model["retrieval"] == ["none", "knn"]
        path = "/v1/audio/transcriptions"
        assert post(path).json()["text"] == here
        timed = post(path, response_format="verbose_json", **{"timestamp_granularities[]": "word"})
        ends = [word["end"] for word in timed.json()["words"]]
        assert ends and ends == sorted(ends) and ends[-1] <= WINDOW

        made = {"name": "names", "texts": ["maria", "call maria on the telephone this evening"]}
        stored = requests.post(f"{service.url}/v1/datastores", json=made, timeout=60)
        assert stored.status_code == 201 and stored.json()["documents"] == 2
        looked_up = post(path, datastore="names", retrieval="knn")
        assert looked_up.status_code == 200, looked_up.text
        listed = post(path, **{"context[]": "maria"})
        assert listed.status_code == 200, listed.text
        endless = {"name": "endless", "texts": ["and then " * 40]}
        endless = requests.post(f"{service.url}/v1/datastores", json=endless, timeout=60)
        assert endless.status_code == 400 and "6 s are heard at once" in endless.text
        refused = post(path, datastore="names", retrieval="cross_attention")
        assert refused.status_code == 400 and "adapter" in refused.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.ray
def test_states_larger_than_a_message_reach_the_decoder(clip, tmp_path):
    """Those of a published small: 30 s of 768 float32 every 20 ms, 4.6 MB, for a clip of one."""
    (tmp_path / "wide").mkdir()
    name = random_whisper(tmp_path / "wide", width=768, window_seconds=30)
    data = clip("turn on the light")
    told = settings(name)
    here = " ".join(part.text for part in transcribe(data, load(name), told.decode))
    with serving(tmp_path, f"model={name}", f"decode.max_seconds={WINDOW}") as service:
        path = f"{service.url}/v1/audio/transcriptions"
        answer = requests.post(path, files={"file": ("clip.flac", data)}, timeout=60)
    assert answer.status_code == 200 and answer.json()["text"] == here
