"""A file is heard as long as it is, whoever wrote it, or it is said how much of it could be."""

import io
import struct
import time

import av
import numpy as np
import pytest
import soundfile
import torch
from encoded_audio import coded, wav

from mmrag.speech import audio, cutting
from mmrag.speech.audio import SAMPLE_RATE, AudioError

SECONDS = 4.0
PAD = 0.07
"""Seconds that encoders put around what they are given, and some formats cannot take back."""


def melody(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """A gliding tone (T,), loud and soft in turn, so that a variable bit rate varies."""
    times = np.arange(round(seconds * rate)) / rate
    loudness = np.where(times % 2 < 1, 0.4, 0.01)
    hiss = np.random.default_rng(0).normal(0, 0.2, len(times)) * (times % 2 < 0.5)
    return loudness * (np.sin(2 * np.pi * (200 + 50 * np.sin(3 * times)) * times) + hiss)


def written(rate: int, **how: str) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, melody(rate).astype(np.float32), rate, **how)
    return stream.getvalue()


def mp3(**options: str) -> bytes:
    return coded(melody(44_100), 44_100, "mp3", "libmp3lame", bit_rate=64_000, **options)


def unmeasured_flac() -> bytes:
    """The header's count of samples is zero, as an encoder leaves it that writes into a pipe."""
    whole = bytearray(written(16_000, format="FLAC"))
    whole[21] &= 0xF0
    whole[22:26] = bytes(4)
    return bytes(whole)


def sized(size: int) -> bytes:
    """A WAV file whose header states `size` bytes of sound."""
    whole = bytearray(wav(melody(16_000)))
    whole[4:8] = whole[40:44] = struct.pack("<I", size)
    return bytes(whole)


RECORDED = {
    "webm of a browser": lambda: coded(melody(48_000), 48_000, "webm", "libopus", pipe=True),
    "webm with a length": lambda: coded(melody(48_000), 48_000, "webm", "libopus"),
    "ogg opus of a browser": lambda: coded(melody(48_000), 48_000, "ogg", "libopus", pipe=True),
    "m4a": lambda: coded(melody(44_100), 44_100, "ipod", "aac"),
    "m4a without loss": lambda: coded(melody(44_100), 44_100, "ipod", "alac"),
    "mp4 in fragments": lambda: coded(
        melody(44_100), 44_100, "mp4", "aac", pipe=True, movflags="frag_keyframe+empty_moov"
    ),
    "mp4 with a film": lambda: coded(melody(44_100), 44_100, "mp4", "aac", picture=True),
    "mov": lambda: coded(melody(44_100), 44_100, "mov", "aac"),
    "aac": lambda: coded(melody(44_100), 44_100, "adts", "aac"),
    "3gp": lambda: coded(melody(8_000), 8_000, "3gp", "libopencore_amrnb", bit_rate=12_200),
    "amr": lambda: coded(melody(8_000), 8_000, "amr", "libopencore_amrnb", bit_rate=12_200),
    "mp3": mp3,
    "mp3 without a Xing header": lambda: mp3(write_xing="0", id3v2_version="0"),
    "mp3 from a pipe": lambda: coded(
        melody(44_100), 44_100, "mp3", "libmp3lame", pipe=True, bit_rate=64_000
    ),
    "flac from a pipe": unmeasured_flac,
    "wav of size 0": lambda: sized(0),
    "wav of size 2**32 - 1": lambda: sized(2**32 - 1),
    "wav of size 2**31 - 1": lambda: sized(2**31 - 1),
    "caf from a pipe": lambda: coded(melody(16_000), 16_000, "caf", "pcm_s16le", pipe=True),
    "au from a pipe": lambda: coded(melody(16_000), 16_000, "au", "pcm_s16be", pipe=True),
}


@pytest.mark.parametrize("kind", RECORDED)
def test_what_browsers_phones_and_pipes_leave_is_heard_to_its_end(kind, tmp_path):
    data = RECORDED[kind]()
    path = tmp_path / "clip"
    path.write_bytes(data)
    wave = audio.read(data)
    assert SECONDS - 0.01 <= len(wave) / SAMPLE_RATE <= SECONDS + PAD
    assert torch.equal(wave, audio.read(path))
    assert audio.duration(data) == pytest.approx(len(wave) / SAMPLE_RATE, abs=1e-3)
    parts = torch.cat([part.wave for part in cutting.segments(data, 1.5)])
    assert torch.equal(parts, wave)
    expected = torch.from_numpy(melody(SAMPLE_RATE)).float()
    assert _likeness(wave, expected) > 0.6  # that of AMR, made for voices alone


def _likeness(wave: torch.Tensor, expected: torch.Tensor) -> float:
    """Correlation of two waves, wherever the one begins in the other (encoders delay)."""
    size = len(wave) + len(expected)
    crossed = torch.fft.irfft(torch.fft.rfft(wave, size) * torch.fft.rfft(expected, size).conj())
    return float(crossed.max() / (wave.norm() * expected.norm()))


@pytest.mark.parametrize(
    ("how", "rate"),
    [
        ({"format": "WAV", "subtype": "PCM_16"}, 16_000),
        ({"format": "WAV", "subtype": "PCM_24"}, 44_100),
        ({"format": "FLAC"}, 16_000),
        ({"format": "AIFF"}, 16_000),
        ({"format": "AU"}, 16_000),
        ({"format": "CAF"}, 16_000),
        ({"format": "OGG"}, 16_000),
    ],
)
def test_what_libsndfile_measures_is_read_to_the_bit(how, rate):
    data = written(rate, **how)
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    with audio.opened(data) as [decoder]:
        decoded = np.concatenate([block for _, block in decoder.blocks(0)])[:, 0]
    assert decoder.frames == len(samples)
    assert np.array_equal(decoded, samples)


JOINED = {
    "mp3": (mp3, mp3),
    "mp3 of two rates": (mp3, lambda: coded(melody(22_050), 22_050, "mp3", "libmp3lame")),
    "vorbis": (lambda: written(16_000, format="OGG"), lambda: written(44_100, format="OGG")),
    "vorbis and opus": (
        lambda: written(16_000, format="OGG"),
        lambda: coded(melody(48_000), 48_000, "ogg", "libopus"),
    ),
    "flac": (lambda: written(16_000, format="FLAC"), lambda: written(8_000, format="FLAC")),
    "wav": (lambda: wav(melody(16_000)), lambda: wav(melody(8_000), 8_000)),
}


@pytest.mark.parametrize("kind", JOINED)
def test_of_joined_files_all_are_heard(kind):
    first, second = (make() for make in JOINED[kind])
    wave = audio.read(first + second)
    apart = audio.read(first), audio.read(second)
    assert len(wave) / SAMPLE_RATE == pytest.approx(2 * SECONDS, abs=2 * PAD)
    assert _likeness(wave[len(apart[0]) - 1_000 :], apart[1]) > 0.9
    assert audio.duration(first + second) == pytest.approx(len(wave) / SAMPLE_RATE, abs=1e-3)


@pytest.mark.parametrize("zeros", [100, 5_000, 200_000])
def test_zeros_in_front_of_an_mp3_are_passed_over_from_a_file_and_from_bytes(zeros, tmp_path):
    path = tmp_path / "late.mp3"
    path.write_bytes(bytes(zeros) + mp3())
    for source in (path, path.read_bytes()):
        assert torch.equal(audio.read(source), audio.read(mp3()))


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


BROKEN = {
    "mp3": (lambda: halved(mp3()), r"breaks off after 2\.\d s of 4\.\d s"),
    "wav": (lambda: halved(wav(melody(16_000))), r"breaks off after 2\.0 s of 4\.0 s"),
    "aiff": (lambda: halved(written(16_000, format="AIFF")), r"breaks off after 2\.0 s of 4\.0 s"),
    "au": (lambda: halved(written(16_000, format="AU")), r"breaks off after 2\.0 s of 4\.0 s"),
    "flac": (lambda: halved(written(16_000, format="FLAC")), r"breaks off after 1\.0 s of 4\.0 s"),
    "flac from a pipe": (lambda: halved(unmeasured_flac()), r"breaks off after [12]\.\d s"),
    "ogg": (lambda: halved(written(16_000, format="OGG")), r"cut off: [0-3]\.\d s can be read"),
    "webm": (
        lambda: halved(RECORDED["webm with a length"]()),
        r"breaks off after [12]\.\d s of 4\.0 s",
    ),
    "amr": (lambda: RECORDED["amr"]()[:-5], r"breaks off after (3\.9|4\.0) s"),
    "mp4 in fragments": (
        lambda: halved(RECORDED["mp4 in fragments"]()),
        r"breaks off after [12]\.\d s",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_breaks_off_is_an_error_that_says_where(kind):
    make, reason = BROKEN[kind]
    data = make()
    with pytest.raises(AudioError, match=rf"^uploaded audio: .*{reason}"):
        audio.read(data)
    with pytest.raises(AudioError, match=reason):
        list(cutting.segments(data, 1.0))


def test_a_hole_of_zeros_in_an_mp3_is_an_error():
    whole = bytearray(mp3())
    middle = len(whole) // 2
    whole[middle : middle + 6_000] = bytes(6_000)
    with pytest.raises(AudioError, match=r"breaks off after [12]\.\d s"):
        audio.read(bytes(whole))


def test_pages_missing_from_the_middle_of_an_ogg_are_an_error():
    data = coded(melody(48_000, 30.0), 48_000, "ogg", "libopus")
    pages = [at for at in range(len(data)) if data.startswith(b"OggS\0", at)]
    gap = data[: pages[len(pages) // 2]] + data[pages[len(pages) // 2 + 1] :]
    assert audio.duration(data) == pytest.approx(30.0)
    with pytest.raises(AudioError, match="pages of it are missing"):
        audio.read(gap)


def test_an_mp4_whose_index_is_lost_is_refused():
    with pytest.raises(AudioError, match="cannot be read as audio"):
        audio.read(halved(RECORDED["m4a"]()))


def test_a_film_without_sound_says_so():
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        film = container.add_stream("mpeg4", rate=10)
        film.width = film.height = 64
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux([*film.encode(picture), *film.encode(None)])
    with pytest.raises(AudioError, match="holds no sound"):
        audio.read(stream.getvalue())


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {path}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_a_list_of_other_peoples_files_is_no_audio(playlist, tmp_path):
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(melody(16_000)))
    with pytest.raises(AudioError, match="cannot be read as audio"):
        audio.read(playlist.format(path=secret).encode() * 20)


def test_a_small_file_of_hours_is_measured_no_further_than_asked():
    minute = coded(np.zeros(480_000), 8_000, "amr", "libopencore_amrnb", bit_rate=4_750)
    hours = minute[:6] + minute[6:] * 180
    started = time.monotonic()
    seconds = audio.duration(hours, enough=60.0)
    assert 60 < seconds < 61
    with pytest.raises(AudioError, match=r"longer than 30\.0 s"):
        audio.read(hours, max_seconds=30.0)
    assert time.monotonic() - started < 10


def test_a_short_recording_of_unstated_length_is_held_to_the_shortest():
    data = coded(melody(48_000, 0.06), 48_000, "webm", "libopus", pipe=True)
    with pytest.raises(AudioError, match=r"shorter than 0\.1 s"):
        list(cutting.segments(data, 4.0))
