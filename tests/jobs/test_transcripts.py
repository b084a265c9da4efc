"""Transcripts that come in any order are read back in that of their utterances."""

from random import Random

from transcripts import transcribed

from jobs import transcripts
from jobs.transcripts import Transcripts


def test_transcripts_are_read_back_by_utterance_however_many_are_held(tmp_path, monkeypatch):
    heard = [transcribed(number, f"text {number} \u2028 ü") for number in range(50)]
    expected = sorted(heard, key=lambda one: one.utterance)
    Random(1).shuffle(heard)
    for held in (1, 7, 1000):
        monkeypatch.setattr(transcripts, "HELD", held)
        kept = Transcripts(tmp_path / f"{held}")
        for start in range(0, len(heard), 8):
            kept.add(heard[start : start + 8])
        assert list(kept) == list(kept) == expected
        assert len(kept) == 50
