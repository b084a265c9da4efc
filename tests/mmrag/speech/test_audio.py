"""Audio in any common format becomes mono 16 kHz, whole or block by block, or a clear error."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tones import encoded, tone
from torchaudio.transforms import Resample

from mmrag.speech import audio, cutting
from mmrag.speech.audio import SAMPLE_RATE, AudioError, Span


@pytest.mark.parametrize(
    "how",
    [
        {"format": "WAV"},
        {"format": "WAV", "subtype": "FLOAT"},
        {"format": "FLAC"},
        {"format": "OGG", "subtype": "VORBIS"},
        {"format": "OGG", "subtype": "OPUS"},
        {"format": "MP3"},
    ],
)
def test_every_common_format_gives_the_same_wave(how):
    wave = audio.read(encoded(tone(1.0), **how))
    assert wave.shape == (SAMPLE_RATE,) and wave.dtype == torch.float32
    middle = slice(2_000, 14_000)  # lossy codecs fade in and out
    assert torch.allclose(wave[middle], torch.from_numpy(tone(1.0)[middle, 0]), atol=0.05)


def test_path_text_and_bytes_are_the_same_source(tmp_path):
    path = tmp_path / "a clip.flac"
    path.write_bytes(encoded(tone(0.5), format="FLAC"))
    wave = audio.read(path)
    assert torch.equal(wave, audio.read(str(path)))
    assert torch.equal(wave, audio.read(path.read_bytes()))


def test_channels_are_averaged():
    samples = tone(0.3, channels=3)
    wave = audio.read(encoded(samples, subtype="FLOAT"))
    assert torch.allclose(wave, torch.from_numpy(samples.mean(axis=1)), atol=1e-6)


@pytest.mark.parametrize("loudest", [0, 1])
def test_channels_that_cancel_each_other_give_the_louder_one(loudest):
    samples = np.repeat(tone(20.0), 2, axis=1) * [1.0, -1.0]
    samples[:, 1 - loudest] *= 0.9
    wave = audio.read(encoded(samples.astype(np.float32), subtype="FLOAT"))
    torch.testing.assert_close(wave, torch.from_numpy(samples[:, loudest]).float())


def test_a_silent_channel_beside_a_voice_is_averaged_as_ever():
    samples = np.concatenate([tone(1.0), np.zeros_like(tone(1.0))], axis=1)
    wave = audio.read(encoded(samples, subtype="FLOAT"))
    torch.testing.assert_close(wave, torch.from_numpy(samples.mean(axis=1)))


@pytest.mark.parametrize("how", [{"format": "FLAC"}, {"format": "MP3"}])
@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
def test_a_span_is_cut_out_of_the_whole_to_the_sample(rate, how):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (25 * rate, 1)).astype(np.float32)
    source = encoded(noise, rate, **how)
    whole = audio.read(source)
    wanted = [Span(12.25, 3.5), Span(0.0, 2.0), Span(2.0, 0.5), Span(2.1, 12.0), Span(24.0)]
    for span, wave in zip(wanted, audio.spans(source, wanted), strict=True):
        expected = whole[span.first : span.last]
        torch.testing.assert_close(wave, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(audio.read(source, span), expected, atol=1e-5, rtol=0)
        parts = [part.wave for part in cutting.segments(source, 1.0, span=span)]
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=0)


def test_a_stated_length_without_a_start_is_checked_against_the_recording():
    source = encoded(tone(3.0))
    assert len(audio.read(source, Span(seconds=3.05))) == 3 * SAMPLE_RATE
    assert len(audio.read(source, Span(seconds=2.95))) == 3 * SAMPLE_RATE
    assert len(audio.read(source, Span(seconds=2.0))) == 2 * SAMPLE_RATE
    with pytest.raises(AudioError, match=r"is 3\.00 s long, not 8\.00 s as is said of it"):
        audio.read(source, Span(seconds=8.0))


@pytest.mark.parametrize("how", [{"format": "FLAC"}, {"format": "MP3"}])
def test_a_span_past_the_end_is_refused_with_both_numbers_and_the_others_are_read(how):
    source = encoded(tone(3.0), **how)
    wanted = [Span(2.0, 4.0), Span(1.0, 1.0), Span(7.0)]
    first, second, third = audio.spans(source, wanted)
    assert "2.00 s to 6.00 s is wanted of it, but it ends after 3.00 s" in str(first)
    assert len(second) == SAMPLE_RATE
    assert "7.00 s on is wanted of it, but it ends after 3.00 s" in str(third)


def test_a_span_before_a_break_is_read_and_one_behind_it_is_not():
    whole = encoded(tone(30.0), format="MP3", bitrate_mode="CONSTANT")
    first, second = audio.spans(whole[: len(whole) // 2], [Span(1.0, 2.0), Span(20.0, 2.0)])
    assert len(first) == 2 * SAMPLE_RATE
    assert "breaks off after 1" in str(second)


@pytest.mark.parametrize("span", [Span(), Span(5.0)])
def test_behind_a_break_every_span_fails_alike(span):
    whole = encoded(tone(30.0), format="MP3", bitrate_mode="CONSTANT")
    for failed in audio.spans(whole[: len(whole) // 2], [Span(), span]):
        assert "breaks off after 1" in str(failed)


def test_eight_kilohertz_stereo_mp3_keeps_its_length_and_pitch():
    source = encoded(tone(2.0, 8_000, channels=2), 8_000, format="MP3")
    wave = audio.read(source)
    assert len(wave) == 2 * SAMPLE_RATE and audio.duration(source) == 2.0
    spectrum = torch.fft.rfft(wave).abs()
    assert int(spectrum.argmax()) / 2.0 == pytest.approx(220, abs=1)


def test_a_fiftieth_of_a_second_is_audio():
    source = encoded(tone(0.02))
    assert audio.read(source).shape == (320,)
    with pytest.raises(AudioError, match=r"0.020 s, shorter than 0.1 s"):
        list(cutting.segments(source, 30.0))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [0.31, 8.0, 16.999, 17.3])
def test_streamed_resampling_equals_resampling_the_whole(rate, seconds):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate), 1))
    source = encoded(samples.astype(np.float32), rate, subtype="FLOAT")
    whole = Resample(rate, SAMPLE_RATE)(torch.from_numpy(samples[:, 0].astype(np.float32)))
    torch.testing.assert_close(audio.read(source), whole, atol=1e-6, rtol=0)


def broken_flac() -> bytes:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 40_000)
    whole = encoded(noise, format="FLAC")
    return whole[: len(whole) // 2]


def with_rate(rate: int) -> bytes:
    whole = bytearray(encoded(tone(0.5)))
    whole[24:28] = struct.pack("<I", rate)
    return bytes(whole)


def with_sample(value: float) -> bytes:
    samples = tone(0.5, channels=2)
    samples[100, 1] = value
    return encoded(samples, subtype="FLOAT")


BAD = {
    "empty": (b"", "empty"),
    "text": (b"this is not audio " * 50, "cannot be read as audio"),
    "no samples": (encoded(np.zeros((0, 1), np.float32)), "holds no samples"),
    "truncated flac": (broken_flac(), "breaks off after 1.0 s of 2.5 s"),
    "truncated mp3": (
        encoded(tone(10.0), format="MP3", bitrate_mode="VARIABLE")[:-4000],
        r"breaks off after \d.\d s of 10.0 s",
    ),
    "NaN": (with_sample(float("nan")), "NaN or infinite samples"),
    "infinity": (with_sample(float("inf")), "NaN or infinite samples"),
    "rate too low": (with_rate(1), "sample rate of 1 Hz"),
    "rate too high": (with_rate(2**31 - 1), "sample rate of 2147483647 Hz"),
    "rate without common factor": (with_rate(15_999), "sample rate of 15999 Hz"),
    "too many channels": (encoded(np.zeros((10, 40), np.float32)), "40 channels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_audio_is_refused_with_its_name_and_the_reason(case, tmp_path):
    content, reason = BAD[case]
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    for source, name in [(content, "uploaded audio"), (path, str(path))]:
        with pytest.raises(AudioError, match=reason) as raised:
            audio.read(source)
        assert str(raised.value).startswith(f"{name}: ")
        with pytest.raises(AudioError, match=reason):
            list(cutting.segments(source, 30.0))


def test_paths_that_are_no_audio_file_are_refused(tmp_path):
    (tmp_path / "headerless.raw").write_bytes(bytes(1000))
    (tmp_path / "dangling.wav").symlink_to("nowhere.wav")
    for name, reason in [
        ("missing.wav", "no such file"),
        ("", "is not a file"),
        ("headerless.raw", "cannot be read as audio"),
        ("dangling.wav", "a link to nowhere.wav, which is not there"),
        ("zero\0byte.wav", "no such file"),
        ("x" * 300 + ".wav", "cannot be opened: File name too long"),
    ]:
        with pytest.raises(AudioError, match=reason) as raised:
            audio.read(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)


def test_audio_is_held_to_its_limits():
    source = encoded(tone(1.0))
    assert len(audio.read(source, min_seconds=1.0, max_seconds=1.0)) == SAMPLE_RATE
    with pytest.raises(AudioError, match=r"uploaded audio: 1.000 s, shorter than 1.5 s"):
        audio.read(source, min_seconds=1.5)
    with pytest.raises(AudioError, match=r"uploaded audio: 1.0 s, longer than 0.5 s"):
        audio.read(source, max_seconds=0.5)


def test_too_long_audio_is_refused_before_it_is_decoded():
    silence = encoded(np.zeros(600 * SAMPLE_RATE, np.float32), format="FLAC")
    beheaded = silence[: len(silence) // 2]  # decoding would find it truncated
    with pytest.raises(AudioError, match="longer than 60"):
        audio.read(beheaded, max_seconds=60)


def test_find_lists_audio_of_all_folders_in_order(tmp_path):
    for name in ["b.wav", "a/z.FLAC", "a/notes.txt", "c/d/e.mp3", "a/._z.flac"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.wav").mkdir()
    found, rejected = audio.find(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "a/z.FLAC",
        "b.wav",
        "c/d/e.mp3",
    ]
    assert rejected == []


def test_find_names_what_it_cannot_use_and_goes_on(tmp_path):
    (tmp_path / "a.wav").touch()
    (tmp_path / "gone.wav").symlink_to("nowhere.wav")
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))).touch()
    found, rejected = audio.find(tmp_path)
    assert [path.name for path in found] == ["a.wav"]
    assert {one.source: one.reason for one in rejected} == {
        f"{tmp_path}/gone.wav": "a link to nowhere.wav, which is not there",
        f"{tmp_path}/caf\\xe9.wav": "its name is not UTF-8: rename it",
    }


def test_find_refuses_a_directory_that_is_missing_or_silent(tmp_path):
    with pytest.raises(AudioError, match="nowhere: no such directory"):
        audio.find(tmp_path / "nowhere")
    with pytest.raises(AudioError, match="holds no audio file"):
        audio.find(tmp_path)
