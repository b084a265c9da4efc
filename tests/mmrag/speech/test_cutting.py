"""A recording of any length is cut so that nothing of it is lost, in pauses where it has some."""

import weakref
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tones import encoded, tone

from mmrag.corpora.voices.espeak import VOICES, Synthesizer
from mmrag.speech import audio, cutting, decoders, vad
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.turns import TurnDetector


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(8_000, 30_000),
    max_seconds=st.floats(0.2, 1.0),
    share=st.floats(0.0, 0.5),
    rate=st.sampled_from([SAMPLE_RATE, 8_000, 11_025]),
    seed=st.integers(0, 99),
)
def test_segments_lose_nothing_and_keep_their_limits(samples, max_seconds, share, rate, seed):
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)
    source = encoded(noise, rate, subtype="FLOAT")
    min_seconds = share * max_seconds * 0.99
    parts = list(cutting.segments(source, max_seconds, min_seconds))
    assert torch.equal(torch.cat([part.wave for part in parts]), audio.read(source))
    assert parts[0].start == 0.0
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        length = part.end - part.start
        assert length == pytest.approx(len(part.wave) / SAMPLE_RATE)
        assert min_seconds - 1e-9 <= length <= max_seconds + 1e-9
        assert following is None or following.start == part.end


def test_short_audio_is_one_segment():
    [segment] = cutting.segments(encoded(tone(3.0)), max_seconds=3.0)
    assert (segment.start, segment.end) == (0.0, 3.0)
    assert torch.equal(segment.wave, audio.read(encoded(tone(3.0))))


def test_the_cut_falls_in_the_pause():
    samples = tone(10.0)
    samples[int(3.9 * SAMPLE_RATE) : int(4.2 * SAMPLE_RATE)] = 0.0
    samples[int(7.6 * SAMPLE_RATE) : int(7.9 * SAMPLE_RATE)] *= 0.01
    parts = list(cutting.segments(encoded(samples), max_seconds=5.0))
    assert len(parts) == 3
    assert 3.9 < parts[0].end < 4.2 and 7.6 < parts[1].end < 7.9


def test_a_long_pause_is_cut_through_rather_than_a_quieter_moment():
    samples = tone(10.0)
    samples[int(4.0 * SAMPLE_RATE) : int(4.5 * SAMPLE_RATE)] *= 0.01
    samples[int(4.8 * SAMPLE_RATE) : int(4.95 * SAMPLE_RATE)] = 0.0
    first, *_ = cutting.segments(encoded(samples), max_seconds=6.0, overlap=1.0)
    assert 4.1 < first.end < 4.4 and (first.before, first.after) == (0.0, 0.0)
    first, *_ = cutting.segments(encoded(samples), max_seconds=6.0)
    assert 4.8 < first.end < 4.95


def test_of_two_long_pauses_the_last_is_cut_through_however_early():
    samples = tone(10.0)
    for start, end in ((1.7, 2.4), (2.8, 3.2), (5.0, 5.2)):
        samples[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)] = 0.0
    first, second, *_ = cutting.segments(encoded(samples), max_seconds=6.0, overlap=1.0)
    assert 2.9 < first.end < 3.1 and not first.after
    assert 5.05 < second.end < 5.15 and not second.after


@pytest.mark.parametrize("seconds", [0.05, 0.12])
def test_a_closure_within_a_word_is_no_pause(seconds):
    samples = tone(8.0)
    samples[int(4.0 * SAMPLE_RATE) : int((4.0 + seconds) * SAMPLE_RATE)] = 0.0
    first, *_ = cutting.segments(encoded(samples), max_seconds=6.0, overlap=1.0)
    assert first.after > 0 and abs(first.end - 4.0) < 0.3, "yet it is the quietest place"


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(8_000, 60_000),
    max_seconds=st.floats(0.3, 1.0),
    share=st.floats(0.1, 1 / 3),
    pauses=st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 9_000)), max_size=4),
    seed=st.integers(0, 99),
)
def test_segments_that_overlap_cover_the_whole(samples, max_seconds, share, pauses, seed):
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)
    for start, length in pauses:
        noise[start : start + length] = 0
    source = encoded(noise, subtype="FLOAT")
    whole, overlap = audio.read(source), share * max_seconds
    parts = list(cutting.segments(source, max_seconds, overlap=overlap))
    assert parts[0].before == parts[0].start == 0 == parts[-1].after
    assert parts[-1].end == pytest.approx(samples / SAMPLE_RATE)
    for part in parts:
        begins, ends = part.start - part.before, part.end + part.after
        assert part.start < part.end and len(part.wave) <= max_seconds * SAMPLE_RATE
        own = whole[round(begins * SAMPLE_RATE) : round(ends * SAMPLE_RATE)]
        assert torch.equal(part.wave, own)
    for part, following in pairwise(parts):
        assert (part.end, part.after) == (following.start, following.before)
        assert part.after == 0 or part.after == pytest.approx(overlap / 2, abs=2 / SAMPLE_RATE)
        assert part.end + part.after <= following.end - following.after + 1e-9


class Held:
    """How many samples were decoded, and are in memory as decoded."""

    def __init__(self, monkeypatch):
        self.decoded = self.live = self.most = 0
        blocks = decoders._Measured.blocks

        def counted(decoder, start):
            for rate, block in blocks(decoder, start):
                self._count(block)
                yield rate, block
                del block

        monkeypatch.setattr(decoders._Measured, "blocks", counted)

    def _count(self, block):
        self.decoded += len(block)
        self.live += len(block)
        self.most = max(self.most, self.live)
        weakref.finalize(block, self._gone, len(block))

    def _gone(self, samples):
        self.live -= samples


@pytest.mark.parametrize(
    "minutes", [1, 4, pytest.param(120, marks=pytest.mark.slow)], ids="{} min".format
)
@pytest.mark.parametrize("overlap", [0.0, 2.0])
def test_a_recording_is_cut_in_memory_that_does_not_grow_with_it(
    tmp_path, monkeypatch, minutes, overlap
):
    path, rate = tmp_path / "long.flac", 8_000
    minute = np.tile(np.concatenate([tone(4.5, rate), np.zeros((4_000, 1), np.float32)]), (12, 1))
    with soundfile.SoundFile(path, "w", rate, 1, compression_level=0) as file:
        for _ in range(minutes):
            file.write(minute)
    held, end, ahead, samples = Held(monkeypatch), 0.0, 0.0, 0
    for segment in cutting.segments(path, max_seconds=28.0, overlap=overlap):
        assert segment.start == end and segment.end - segment.start <= 28.0
        assert segment.end == 60 * minutes or segment.end % 5 > 4.5, "cut inside a tone"
        assert segment.wave.untyped_storage().nbytes() == 4 * len(segment.wave), "and no more"
        end, samples = segment.end, samples + len(segment.wave)
        ahead = max(ahead, held.decoded / rate - segment.end)
    assert end == audio.stated(path) == 60 * minutes and samples == end * SAMPLE_RATE
    blocks = 2 * decoders.BLOCK_SECONDS
    assert ahead <= 28.0 / 2 + blocks, "seconds decoded and not given yet"
    assert held.most <= blocks * rate


def test_impossible_segment_lengths_are_refused():
    with pytest.raises(ValueError, match="twice the shortest"):
        list(cutting.segments(encoded(tone(1.0)), max_seconds=1.0, min_seconds=0.6))


def test_an_overlap_that_leaves_nothing_between_two_of_them_is_refused():
    with pytest.raises(ValueError, match="overlap"):
        list(cutting.segments(encoded(tone(1.0)), max_seconds=1.0, overlap=0.4))
    assert cutting.overlap(30.0) == 2.0 and cutting.overlap(3.0) == 1.0


@cache
def conversation() -> torch.Tensor:
    """Somebody says something, and after a second and a half something else."""
    quiet = torch.zeros(3 * SAMPLE_RATE // 2)
    said = [
        vad.trim(torch.from_numpy(Synthesizer().speak(text, VOICES["test"][0]).wave))[0]
        for text in ("please call maria lopez", "what time is it in boston")
    ]
    return torch.cat([quiet, said[0], quiet, said[1], quiet])


def spans(wave: torch.Tensor, **settings) -> list[tuple[int, int]]:
    """The turns that a detector hears in a wave that it gets as a whole."""
    events = TurnDetector(**settings).push(wave)
    ends = [event.sample for event in events] + [len(wave)] * (len(events) % 2)
    return list(zip(ends[::2], ends[1::2], strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prefix_padding_ms": 0, "silence_duration_ms": 0},
        {"prefix_padding_ms": 900, "silence_duration_ms": 700},
        {"silence_duration_ms": 2000},
        {"prefix_padding_ms": 10_000, "silence_duration_ms": 10_000},
        {"threshold": 1.0},
    ],
)
def test_turns_are_those_that_a_detector_hears_in_the_whole(given):
    source = encoded(conversation().numpy(), subtype="FLOAT")
    whole = audio.read(source)
    found = list(cutting.turns(source, max_seconds=30.0, **given))
    usual = {"silence_duration_ms": 200} | given
    expected = spans(whole, **usual)
    assert [(one.start, one.end) for one in found] == [
        (start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in expected
    ]
    for one, (start, end) in zip(found, expected, strict=True):
        assert torch.equal(one.wave, whole[start:end])
    if not given:
        assert len(found) == 2 and found[0].start > 1 and found[1].start > found[0].end


def test_a_turn_that_is_too_long_is_cut_as_any_recording():
    said = conversation()[3 * SAMPLE_RATE // 2 :]
    source = encoded(torch.cat([said[:SAMPLE_RATE]] * 5).numpy(), subtype="FLOAT")
    given = {"threshold": 0.1, "silence_duration_ms": 3000}
    [(start, end)] = spans(audio.read(source), **given)
    found = list(cutting.turns(source, max_seconds=2.0, **given))
    whole = audio.read(source)[start:end]
    assert len(found) > 2 and all(len(one.wave) <= 2 * SAMPLE_RATE for one in found)
    assert torch.equal(torch.cat([one.wave for one in found]), whole)
    shared = list(cutting.turns(source, max_seconds=2.0, overlap=0.5, **given))
    assert all(len(one.wave) <= 2 * SAMPLE_RATE for one in shared)
    assert all(one.end == after.start for one, after in pairwise(shared))


def test_there_are_no_turns_where_nobody_speaks():
    assert list(cutting.turns(encoded(np.zeros(40_000, np.float32)), max_seconds=5.0)) == []
