"""Text to speech with espeak-ng, in this process: samples, and when each word and phone is said.

The shared library and its data come from the `espeakng_loader` wheel (GPL-3, extra `speech`).
Knows nothing about corpora, speakers of a split or files.

espeak-ng keeps its pitch flutter, its noise and its filters in static memory that no call resets,
so a sentence would sound different after each other sentence. `Synthesizer.speak` therefore loads
the library afresh, which costs 4 ms and makes the same input give identical samples.
"""

from __future__ import annotations

import ctypes
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np

from mmrag.corpora.voices import ipa
from mmrag.corpora.voices import phones as inventory
from mmrag.corpora.voices.speech import (
    SHORTEST_SECONDS,
    SPEEDS,
    Speech,
    UnspeakableError,
    played,
)
from mmrag.records import Line, Timed

_NATIVE_RATE = 22_050

# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS, _PHONE_EVENTS, _IN_IPA, _DO_NOT_EXIT = 2, 0x0001, 0x0002, 0x8000
_PHONEMES_IN_IPA = 2
_OK, _RATE, _PITCH, _UTF8, _WITH_PHONEMES = 0, 1, 3, 1, 0x100
_END_OF_LIST, _WORD, _PHONE = 0, 1, 7

_ONE_AT_A_TIME = threading.Lock()
"""The library's state is global to the process."""


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

    engine: ClassVar[str] = "espeak"
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


VOICES: dict[str, tuple[Voice, ...]] = {
    "train": (
        Voice("train-01", "en-us", pitch=50, rate=165),
        Voice("train-02", "en-us+m1", pitch=45, rate=175),
        Voice("train-03", "en-us+m7", pitch=55, rate=160),
        Voice("train-04", "en-us+f1", pitch=50, rate=170),
        Voice("train-05", "en-us+f3", pitch=45, rate=160),
        Voice("train-06", "en-us+steph", pitch=55, rate=180),
        Voice("train-07", "en-us+klatt6", pitch=60, rate=165),
        Voice("train-08", "en-us-nyc+robert", pitch=40, rate=170),
        Voice("train-09", "en-us-nyc+f5", pitch=40, rate=165),
        Voice("train-10", "en+m2", pitch=55, rate=170),
        Voice("train-11", "en+m5", pitch=65, rate=155),
        Voice("train-12", "en+Annie", pitch=40, rate=165),
        Voice("train-13", "en+linda", pitch=35, rate=160),
        Voice("train-14", "en-gb-x-rp", pitch=40, rate=175),
        Voice("train-15", "en-gb-x-rp+f1", pitch=65, rate=160),
        Voice("train-16", "en-gb-x-rp+Michael", pitch=50, rate=170),
        Voice("train-17", "en-gb-scotland+m4", pitch=60, rate=160),
        Voice("train-18", "en-gb-scotland+f3", pitch=60, rate=170),
        Voice("train-19", "en-gb-x-gbclan+rob", pitch=45, rate=180),
        Voice("train-20", "en-gb-x-gbclan+shelby", pitch=50, rate=165),
        Voice("train-21", "en-gb-x-gbcwmd+m8", pitch=60, rate=165),
        Voice("train-22", "en-gb-x-gbcwmd+f5", pitch=60, rate=175),
        Voice("train-23", "en-029+quincy", pitch=55, rate=170),
        Voice("train-24", "en-029+steph", pitch=40, rate=160),
    ),
    "dev": (
        Voice("dev-male", "en-us+m6", pitch=60, rate=172),
        Voice("dev-female", "en-gb-x-rp+f2", pitch=45, rate=168),
    ),
    "test": (
        Voice("test-male-1", "en-us+m3", pitch=42, rate=168),
        Voice("test-male-2", "en-gb-scotland+max", pitch=55, rate=172),
        Voice("test-female-1", "en+f4", pitch=50, rate=164),
        Voice("test-female-2", "en-us+aunty", pitch=58, rate=170),
    ),
}
"""Who speaks which splits. No voice, and no variant (the part after the plus), is in two rows."""


REGIONAL = ("es-419", "fr-be", "fr-ch", "pt-br")
"""Voices of a region, of languages other than English."""
ABROAD = ("m1", "m7", "f1", "f3")
"""Variants that speak other languages."""


def cast(split: str, draw: Random) -> Voice:
    """Who says a sentence of `split`: dev and test have voices of their own, as they are; the
    others share those of train, varied."""
    if split in VOICES and split != "train":
        return draw.choice(VOICES[split])
    return varied(draw.choice(VOICES["train"]), draw)


def speaking(language: str | None, split: str, draw: Random) -> Voice:
    """Who says a sentence of `split` in a language (BCP 47): one of the cast where it is English,
    of the region if there are such; else a variant of espeak-ng's voice of that language."""
    code, _, region = (language or "en").lower().replace("_", "-").partition("-")
    if code != "en":
        name = f"{code}-{region}" if f"{code}-{region}" in REGIONAL else code
        variant = draw.choice(ABROAD)
        return Voice(f"{name}-{variant}", f"{name}+{variant}", draw.randint(40, 60), 165)
    regional = [voice for voice in VOICES["train"] if voice.name.startswith(f"en-{region}")]
    if not region or not regional:
        return cast(split, draw)
    return varied(draw.choice(regional), draw)


def varied(voice: Voice, draw: Random) -> Voice:
    """A speaker like `voice`: another pitch, pace and size of throat."""
    return replace(
        voice,
        pitch=min(99, max(0, voice.pitch + draw.randint(-15, 15))),
        rate=round(voice.rate * draw.uniform(0.85, 1.2)),
        speed=draw.choice(SPEEDS),
    )


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
        # A copy of its own: where others keep the wheel's library loaded (phonemizer does), closing
        # it would not make it forget.
        self._copy = open(os.memfd_create("espeak-ng"), "wb")  # noqa: SIM115 as long as this lives
        self._copy.write(Path(espeakng_loader.get_library_path()).read_bytes())
        self._copy.flush()
        self._library = f"/proc/self/fd/{self._copy.fileno()}"
        self._data = Path(espeakng_loader.get_data_path())
        self._variants = {path.name for path in (self._data / "voices" / "!v").iterdir()}

    def speak(self, text: str, voice: Voice, phonetic: bool = False) -> Speech:
        """Say `text`, in which IPA stands between slashes if it is `phonetic`. The same text and
        voice give identical samples.

        Raises ValueError for a voice that espeak-ng does not have, and for IPA that no voice can
        say, UnspeakableError for text of which it makes no speech.
        """
        if not text.split() or "\0" in text:
            raise UnspeakableError(f"nothing that can be spoken in {text!r}")
        _, plus, variant = voice.name.partition("+")
        if plus and variant not in self._variants:  # espeak-ng would silently ignore it
            raise ValueError(f"espeak-ng has no variant {variant!r} of voice {voice.name!r}")
        with _ONE_AT_A_TIME:
            said = ipa.phonetic(text) if phonetic else text
            samples, events, phones = self._synthesize(said, voice, phonetic)
        if len(samples) < SHORTEST_SECONDS * _NATIVE_RATE:
            raise UnspeakableError(f"nothing that can be spoken in {text!r}")
        wave, slower = played(samples.astype(np.float32) / 32768, _NATIVE_RATE, voice.speed)
        duration = len(samples) / _NATIVE_RATE * slower
        return Speech(
            wave,
            timed_words(said, [(position, ms * slower) for position, ms in events], duration),
            timed_phones([(name, ms * slower) for name, ms in phones], duration),
        )

    def pronounce(self, texts: Sequence[str | Line], voice: str = "en-us") -> list[tuple[str, ...]]:
        """The PHONES that each text is said in, a tenth of a millisecond a name: none for what is
        not said. Raises ValueError for a voice that espeak-ng does not have."""
        with _ONE_AT_A_TIME, self._opened(voice) as espeak:
            read = espeak.espeak_TextToPhonemes
            read.restype = ctypes.c_char_p
            read.argtypes = (ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int)
            said = []
            for text in texts:
                if isinstance(text, Line):
                    if text.phonetic:
                        said.append(inventory.folded(text.text.replace("/", " ")))
                        continue
                    text = text.text
                left, clauses = ctypes.c_char_p(text.encode()), []
                while left.value:
                    clauses.append(read(ctypes.byref(left), _UTF8, _PHONEMES_IN_IPA).decode())
                said.append(inventory.folded(" ".join(clauses)))
        return said

    @contextmanager
    def _opened(self, voice: str) -> Iterator[ctypes.CDLL]:
        """The library, afresh, with a voice."""
        espeak = ctypes.CDLL(self._library)
        try:
            options = _PHONE_EVENTS | _IN_IPA | _DO_NOT_EXIT
            rate = espeak.espeak_Initialize(_SYNCHRONOUS, 0, bytes(self._data), options)
            if rate != _NATIVE_RATE:
                raise RuntimeError(f"espeak-ng gives rate {rate} with its data in {self._data}")
            if espeak.espeak_SetVoiceByName(voice.encode()) != _OK:
                raise ValueError(f"espeak-ng has no voice {voice!r}")
            yield espeak
        finally:
            espeak.espeak_Terminate()
            ctypes.CDLL(None).dlclose(ctypes.c_void_p(espeak._handle))

    def _synthesize(
        self, text: str, voice: Voice, phonetic: bool
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

        with self._opened(voice.name) as espeak:
            callback = _Callback(collect)
            espeak.espeak_SetSynthCallback(callback)
            espeak.espeak_SetParameter(_PITCH, voice.pitch, 0)
            espeak.espeak_SetParameter(_RATE, voice.rate, 0)
            espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
            ctypes.CDLL(None).srand(1)  # some voices draw their noise from the C library
            encoded = text.encode()
            status = espeak.espeak_Synth(
                *(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0),
                *(_UTF8 | _WITH_PHONEMES * phonetic, None, None),
            )
            espeak.espeak_Synchronize()
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
    """When each of `phones.PHONES` is said, in seconds of a clip of `duration` seconds.

    `events` are (IPA, milliseconds). A phone lasts until the next event; pauses, whose names start
    with an underscore or are empty, are none.
    """
    timed = []
    for (name, begin), (_, end) in pairwise([*events, ("", duration * 1000)]):
        if not name.startswith("_"):
            timed.append(Timed(name, min(begin / 1000, duration), min(end / 1000, duration)))
    return tuple(inventory.timed(timed))
