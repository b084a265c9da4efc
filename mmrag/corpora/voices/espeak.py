"""Text to speech with espeak-ng, in this process: samples, and when each word and phone is said.

The shared library and its data come from the `espeakng_loader` wheel (GPL-3, extra `speech`).
Knows nothing about corpora, speakers of a split or files.

espeak-ng keeps its pitch flutter, its noise and its filters in static memory that no call resets,
so a sentence would sound different after each other sentence. `Synthesizer.speak` therefore loads
the library afresh, which costs 4 ms and makes the same input give identical samples.
"""

from __future__ import annotations

import ctypes
import math
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torchaudio.transforms import Resample

from mmrag.records import Timed
from mmrag.speech.audio import SAMPLE_RATE

_NATIVE_RATE = 22_050
SHORTEST_SECONDS = 0.05
"""Of anything that is said: what espeak-ng makes of dashes or unknown digits is a few silent ms."""

# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS, _PHONE_EVENTS, _DO_NOT_EXIT = 2, 0x0001, 0x8000
_OK, _RATE, _PITCH, _UTF8 = 0, 1, 3, 1
_END_OF_LIST, _WORD, _PHONE = 0, 1, 7

_STRESS = "',%="
"""Marks of stress that espeak-ng may put before a phone's name."""

_ONE_AT_A_TIME = threading.Lock()
"""The library's state is global to the process."""


class UnspeakableError(ValueError):
    """A text of which a synthesizer makes no speech; the message names it."""


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class Voice:
    """A speaker. `name` is an espeak-ng voice, with a variant after a plus: `en-us+f3`."""

    id: str
    name: str
    pitch: int = 50
    """0 to 99; 50 is the voice's own."""
    rate: int = 175
    """Words a minute, 80 to 450."""
    speed: float = 1.0
    """How fast what was said is played: tempo, pitch and formants move together."""

    def __post_init__(self) -> None:
        if not 0 <= self.pitch <= 99:
            raise ValueError(f"voice {self.id}: pitch {self.pitch} is not in 0..99")
        if not 80 <= self.rate <= 450:
            raise ValueError(f"voice {self.id}: rate {self.rate} is not in 80..450")
        if not 0.5 <= self.speed <= 2:
            raise ValueError(f"voice {self.id}: speed {self.speed} is not in 0.5..2")


@dataclass(frozen=True)
class Speech:
    """`wave` (T,) float32 in [-1, 1], mono at SAMPLE_RATE; `words` has one a whitespace word,
    `phones` one a phone, by its name in espeak-ng without stress; pauses are none."""

    wave: np.ndarray
    words: tuple[Timed, ...]
    phones: tuple[Timed, ...]


class Synthesizer:
    """espeak-ng. Several may exist; they speak one after the other, whatever the thread.

    Raises ImportError that says what to install where the `speech` extra is missing.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise ImportError(
                "speech synthesis needs espeakng_loader: pip install mmrag[speech]"
            ) from None
        self._library = espeakng_loader.get_library_path()
        self._data = Path(espeakng_loader.get_data_path())
        self._variants = {path.name for path in (self._data / "voices" / "!v").iterdir()}
        self._resample = cache(lambda rate: Resample(rate, SAMPLE_RATE))

    def speak(self, text: str, voice: Voice) -> Speech:
        """Say `text`. The same text and voice give identical samples.

        Raises ValueError for a voice that espeak-ng does not have, UnspeakableError for text of
        which it makes no speech.
        """
        if not text.split() or "\0" in text:
            raise UnspeakableError(f"nothing that can be spoken in {text!r}")
        _, plus, variant = voice.name.partition("+")
        if plus and variant not in self._variants:  # espeak-ng would silently ignore it
            raise ValueError(f"espeak-ng has no variant {variant!r} of voice {voice.name!r}")
        with _ONE_AT_A_TIME:
            samples, events, phones = self._synthesize(text, voice)
        if len(samples) < SHORTEST_SECONDS * _NATIVE_RATE:
            raise UnspeakableError(f"nothing that can be spoken in {text!r}")
        # Played so many samples a second; whole thousands keep the resampler's kernels small.
        rate = round(_NATIVE_RATE * voice.speed / 1000) * 1000 if voice.speed != 1 else _NATIVE_RATE
        # Zeros up to whole seconds: torch keeps memory for every length that it has convolved.
        native = torch.zeros(math.ceil(len(samples) / rate) * rate)
        native[: len(samples)] = torch.from_numpy(samples.astype(np.float32) / 32768)
        length = math.ceil(len(samples) * SAMPLE_RATE / rate)
        wave = self._resample(rate)(native)[:length].clamp(-1, 1).numpy()
        slower, duration = _NATIVE_RATE / rate, len(samples) / rate
        return Speech(
            wave,
            timed_words(text, [(position, ms * slower) for position, ms in events], duration),
            timed_phones([(name, ms * slower) for name, ms in phones], duration),
        )

    def _synthesize(
        self, text: str, voice: Voice
    ) -> tuple[np.ndarray, list[tuple[int, int]], list[tuple[str, int]]]:
        """Samples (T,) int16 at the native rate; for each word event (text position, ms), for
        each phone event (name, ms)."""
        chunks: list[bytes] = []
        events: list[tuple[int, int]] = []
        phones: list[tuple[str, int]] = []
        failures: list[BaseException] = []

        def collect(wave: ctypes._Pointer, count: int, event: ctypes._Pointer) -> int:
            try:
                if wave and count > 0:
                    chunks.append(ctypes.string_at(wave, 2 * count))
                for index in range(1 << 20):
                    if event[index].type == _END_OF_LIST:
                        break
                    if event[index].type == _WORD:
                        events.append((event[index].text_position, event[index].audio_position))
                    elif event[index].type == _PHONE:
                        name = event[index].id.decode("utf-8", "replace")
                        phones.append((name, event[index].audio_position))
                return 0
            except BaseException as error:  # C code cannot pass it on
                failures.append(error)
                return 1

        process = ctypes.CDLL(None)
        espeak = ctypes.CDLL(self._library)
        try:
            options = _PHONE_EVENTS | _DO_NOT_EXIT
            rate = espeak.espeak_Initialize(_SYNCHRONOUS, 0, bytes(self._data), options)
            if rate != _NATIVE_RATE:
                raise RuntimeError(f"espeak-ng gives rate {rate} with its data in {self._data}")
            callback = _Callback(collect)
            espeak.espeak_SetSynthCallback(callback)
            if espeak.espeak_SetVoiceByName(voice.name.encode()) != _OK:
                raise ValueError(f"espeak-ng has no voice {voice.name!r}")
            espeak.espeak_SetParameter(_PITCH, voice.pitch, 0)
            espeak.espeak_SetParameter(_RATE, voice.rate, 0)
            espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
            process.srand(1)  # some voices draw their noise from the C library
            encoded = text.encode()
            status = espeak.espeak_Synth(
                encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, _UTF8, None, None
            )
            espeak.espeak_Synchronize()
        finally:
            espeak.espeak_Terminate()
            process.dlclose(ctypes.c_void_p(espeak._handle))
        if failures:
            raise failures[0]
        if status != _OK:
            raise RuntimeError(f"espeak-ng failed with status {status} on {text!r}")
        return np.frombuffer(b"".join(chunks), np.int16), events, phones


def timed_words(
    text: str, events: Sequence[tuple[int, float]], duration: float
) -> tuple[Timed, ...]:
    """When each whitespace word of `text` is said, in seconds of a clip of `duration` seconds.

    `events` are (position in `text` counted from 1, milliseconds). espeak-ng sends several for a
    number or a hyphenated word: the first counts. It sends one for words that it runs together
    (`in the`): they share its time by their length. A word lasts until the next one starts.
    """
    words = text.split()
    ends, at = [], 0
    for word in words:
        at = text.index(word, at) + len(word)
        ends.append(at)
    starts: dict[int, float] = {}
    for position, milliseconds in events:
        word = bisect_right(ends, position - 1)
        if word < len(words):
            starts.setdefault(word, min(milliseconds / 1000, duration))
    starts.setdefault(0, 0.0)
    timed: list[Timed] = []
    heard = sorted(starts)
    for first, last in zip(heard, [*heard[1:], len(words)], strict=True):
        begin = max(starts[first], timed[-1].end if timed else 0.0)
        end = max(begin, starts.get(last, duration))
        lengths = np.cumsum([0, *(len(word) for word in words[first:last])])
        times = begin + (end - begin) * lengths / lengths[-1]
        timed += [
            Timed(word, float(start), float(stop))
            for word, start, stop in zip(words[first:last], times[:-1], times[1:], strict=True)
        ]
    return tuple(timed)


def timed_phones(events: Sequence[tuple[str, float]], duration: float) -> tuple[Timed, ...]:
    """When each phone is said, in seconds of a clip of `duration` seconds.

    `events` are (name, milliseconds). A phone lasts until the next event. Stress marks are dropped
    and so are pauses, whose names start with an underscore or are empty.
    """
    timed = []
    for (name, begin), (_, end) in pairwise([*events, ("", duration * 1000)]):
        name = name.lstrip(_STRESS)
        start, stop = min(begin / 1000, duration), min(end / 1000, duration)
        if name and not name.startswith("_") and stop > start:
            timed.append(Timed(name, start, stop))
    return tuple(timed)
