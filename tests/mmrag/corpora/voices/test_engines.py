from random import Random

import pytest

from mmrag.corpora.voices import espeak, kokoro
from mmrag.corpora.voices.engines import ENGINES, Synthesizers, cast


def test_engines_have_their_shares_and_one_alone_has_all():
    draw = Random(0)
    voices = [cast({"espeak": 0.75, "kokoro": 0.25}, "lm", draw) for _ in range(2000)]
    neural = sum(voice.engine == "kokoro" for voice in voices)
    assert 400 < neural < 600
    assert {cast({"kokoro": 1.0}, "lm", draw).engine for _ in range(20)} == {"kokoro"}
    own, ours = Random(3), Random(3)
    assert espeak.cast("lm", own) == cast({"espeak": 1.0}, "lm", ours), "nothing more is drawn"


@pytest.mark.parametrize("engine", ENGINES)
def test_voices_of_dev_and_test_are_heard_nowhere_else(engine):
    draw = Random(1)

    def heard(*splits):
        voices = [cast({engine: 1.0}, split, draw) for split in splits for _ in range(400)]
        return {part for voice in voices for part in voice.id.split("+")}

    trained, dev, test = heard("lm", "adapter", "datastore", "spoken"), heard("dev"), heard("test")
    assert trained and dev and test
    assert not trained & dev and not trained & test and not dev & test


def test_an_engine_is_opened_at_its_first_word(tmp_path):
    pytest.importorskip("espeakng_loader")
    synthesizers = Synthesizers(kokoro=tmp_path / "nothing")
    assert len(synthesizers.speak("hello", espeak.VOICES["test"][0]).wave) > 1000
    with pytest.raises((OSError, ImportError), match=r"jobs\.fetch_voices|pip install"):
        synthesizers.speak("hello", kokoro.cast("test", Random(0)))
