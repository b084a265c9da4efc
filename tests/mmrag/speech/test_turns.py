"""Who speaks in a stream, from when to when, however the stream is cut."""

import io
from functools import cache

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from silero_vad import load_silero_vad

from mmrag.corpora.augment import unspoken
from mmrag.corpora.voices.espeak import VOICES, Synthesizer
from mmrag.speech import vad
from mmrag.speech.silero import CONTEXT, FRAME, network
from mmrag.speech.turns import Started, Stopped, TurnDetector

RATE = 16_000


@cache
def said(text="please call maria lopez", voice=0):
    wave = torch.from_numpy(Synthesizer().speak(text, VOICES["test"][voice]).wave)
    kept, _ = vad.trim(wave)
    return kept


def silence(seconds):
    return torch.zeros(round(seconds * RATE))


def noise(seconds, decibels, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(round(seconds * RATE), generator=draw) * 10 ** (decibels / 20)


def events(wave, **settings):
    return TurnDetector(**settings).push(wave)


@torch.inference_mode()
def test_the_network_is_the_published_one():
    wave = torch.cat((said(), silence(0.5), noise(0.5, -30), said("good morning", 1)))
    threads = torch.get_num_threads()
    published, ours = load_silero_vad(), network()
    torch.set_num_threads(threads)  # which loading has set to one
    state, apart = ours.start(), []
    for frame in wave[: len(wave) // FRAME * FRAME].split(FRAME):
        likely, state = ours(frame.numpy(), state)
        apart.append(abs(likely - published(frame, RATE).item()))
    assert len(apart) > 60 and max(apart) < 1e-4
    assert state.context.shape == (CONTEXT,)


@pytest.mark.parametrize("voice", range(len(VOICES["test"])))
def test_a_turn_is_found_where_somebody_speaks(voice):
    before, after = silence(1.0), silence(1.0)
    speech = said(voice=voice)
    started, stopped = events(torch.cat((before, speech, after)))
    assert isinstance(started, Started) and isinstance(stopped, Stopped)
    first, last = len(before), len(before) + len(speech)
    assert first - 0.45 * RATE <= started.sample <= first - 0.1 * RATE, "earlier by the padding"
    assert abs(stopped.quiet - last) < 0.25 * RATE
    assert stopped.sample == stopped.quiet + RATE // 2


def test_a_pause_shorter_than_the_silence_is_within_the_turn():
    wave = torch.cat((said(), silence(0.6), said(voice=1), silence(1.5)))
    assert len(events(wave, silence_duration_ms=1000)) == 2
    kinds = [type(event) for event in events(wave, silence_duration_ms=200)]
    assert kinds == [Started, Stopped] * (len(kinds) // 2) and len(kinds) >= 4


def test_a_turn_starts_no_earlier_than_the_stream_or_the_end_of_the_last_turn():
    wave = torch.cat((said(), silence(0.5), said(), silence(1.0)))
    found = events(wave, prefix_padding_ms=5000, silence_duration_ms=300)
    assert found[0] == Started(0)
    assert found[2].sample == found[1].sample


parts = st.lists(st.integers(0, 3000), max_size=40)


@settings(max_examples=15, deadline=None)
@given(parts, st.integers(1, 20_000))
def test_the_same_stream_has_the_same_turns_however_it_is_cut(sizes, rest):
    wave = torch.cat((noise(0.3, -60), said(), silence(0.4), said(voice=1) * 0.02, silence(0.8)))
    whole = events(wave, silence_duration_ms=300)
    detector, found, place = TurnDetector(silence_duration_ms=300), [], 0
    for size in [*sizes, *[rest] * (len(wave) // rest + 1)]:
        found += detector.push(wave[place : place + size])
        place += size
    assert found == whole and len(whole) >= 2


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.2, 0.36, 0.45, 0.5, 0.9]), max_size=60),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_turns_alternate_lie_within_the_stream_and_follow_the_rule(likely, padding, quiet_ms):
    detector = TurnDetector(0.5, padding, quiet_ms)
    given_ = iter(likely)
    detector._network = lambda frame, state: (next(given_), state)
    found = detector.push(torch.zeros(FRAME * len(likely)))
    assert [type(event) for event in found] == [
        Started if n % 2 == 0 else Stopped for n in range(len(found))
    ]
    samples = [event.sample for event in found]
    assert samples == sorted(samples) and all(0 <= one <= FRAME * len(likely) for one in samples)
    assert detector.speaking == bool(len(found) % 2)
    for event in found:
        if isinstance(event, Stopped):
            first = event.quiet // FRAME
            frames = max(1, -(-16 * quiet_ms // FRAME))
            assert max(likely[first : first + frames]) < 0.5 and likely[first] < 0.35


def test_silence_that_has_just_begun_is_told():
    detector = TurnDetector(silence_duration_ms=800)
    detector.push(silence(0.5))
    assert detector.quiet_since is None and not detector.speaking, "nobody has spoken"
    detector.push(said())
    assert detector.speaking
    detector.push(silence(0.5))
    quiet = detector.quiet_since
    assert abs(quiet - 0.5 * RATE - len(said())) < 0.25 * RATE
    [stopped] = detector.push(silence(0.8))
    assert stopped.quiet == quiet and detector.quiet_since is None and not detector.speaking
    detector.push(said())
    assert detector.speaking and detector.quiet_since is None


@pytest.mark.parametrize("softer", [1.0, 0.03])
def test_silence_and_noise_are_no_turn_and_tones_are_none_at_a_higher_threshold(softer):
    clips = (soundfile.read(io.BytesIO(clip), dtype="float32")[0] for clip in unspoken(30, seed=5))
    for number, clip in enumerate(clips):
        threshold = 0.75 if number % 3 == 2 else 0.5
        assert events(torch.from_numpy(clip) * softer, threshold=threshold) == []


@pytest.mark.parametrize("level", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 16, 160, 480])
def test_a_click_is_no_speech(level, length):
    wave = noise(3.0, -70)
    for place in (8000, 24_100, 40_300):
        wave[place : place + length] += level * torch.ones(length)
    assert events(wave) == []


@pytest.mark.parametrize("decibels", [-40, -52, -60])
@pytest.mark.parametrize("voice", [0, 1])
def test_quiet_speech_is_heard(decibels, voice):
    speech = said(voice=voice)
    quiet = speech / speech.abs().max() * 10 ** (decibels / 20)
    wave = torch.cat((silence(0.7), (quiet * 2**15).round() / 2**15, silence(1.0)))
    started, *_, stopped = events(wave, silence_duration_ms=600)
    assert started.sample < 1.1 * RATE
    assert abs(stopped.quiet - 0.7 * RATE - len(speech)) < 0.4 * RATE


def test_streams_do_not_hear_each_other():
    alone = events(torch.cat((said(), silence(1.0))))
    one, other = TurnDetector(), TurnDetector()
    found = []
    for part in torch.cat((said(), silence(1.0))).split(1600):
        found += one.push(part)
        other.push(noise(0.1, -20))
        vad.spoken(said(voice=1), 0.5)
    assert found == alone


def test_what_a_stream_keeps_does_not_grow():
    detector = TurnDetector()
    for _ in range(3):
        detector.push(noise(2.0, -50))
        kept = [value for value in vars(detector).values() if isinstance(value, np.ndarray)]
        assert all(one.base is None for one in (*kept, *detector._state)), "nothing behind them"
        assert sum(one.nbytes for one in (*kept, *detector._state)) < 6000


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1.5}, {"prefix_padding_ms": -1}, {"silence_duration_ms": -5}]
)
def test_settings_that_mean_nothing_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TurnDetector(**wrong)
