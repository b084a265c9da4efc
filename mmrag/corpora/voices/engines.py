"""The synthesizers by name: who of which speaks a split, and each of them opened at its first word.

A third is a class with `speak`, a function `cast`, and a line in ENGINES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mmrag.corpora.voices import espeak, kokoro
from mmrag.corpora.voices.speech import Engine, Speech, Voice


@dataclass(frozen=True)
class _Kind:
    cast: Callable[[str, Random], Voice]
    """Who says a sentence of a split."""
    open: Callable[[Synthesizers], Engine]
    slow: bool = False
    """Whether who waits for it waits nearly as long as it speaks."""


class Synthesizers:
    """Every engine that a voice may ask for; none is loaded before it speaks.

    `kokoro` is the directory of that engine's files.
    """

    def __init__(self, kokoro: Path | str | None = None) -> None:
        self.kokoro = kokoro
        self._open: dict[str, Engine] = {}

    def speak(self, text: str, voice: Voice, **how: Any) -> Speech:
        """Say `text`, as `Engine.speak` does, `how` the voice's engine alone can; ImportError or
        OSError for what is not installed."""
        return self.open(voice.engine).speak(text, voice, **how)

    def open(self, engine: str) -> Engine:
        """The engine of that name, ready to speak; raises as `speak` does."""
        if engine not in self._open:
            self._open[engine] = ENGINES[engine].open(self)
        return self._open[engine]


ENGINES: dict[str, _Kind] = {
    "espeak": _Kind(espeak.cast, lambda _: espeak.Synthesizer()),
    "kokoro": _Kind(kokoro.cast, lambda all: kokoro.Synthesizer(all.kokoro), slow=True),
}


def require(voices: Iterable[str], files: Path | str | None, setting: str) -> None:
    """Raises what `kokoro.require` raises if Kokoro is among the `voices`; `files` is its
    directory, as `setting` names it."""
    if "kokoro" in voices:
        kokoro.require(files, setting)


def cast(shares: Mapping[str, float], split: str, draw: Random) -> Voice:
    """Who says a sentence of `split`, of engines with these shares of all sentences."""
    engine = next(iter(shares))
    if len(shares) > 1:
        [engine] = draw.choices(list(shares), list(shares.values()))
    return ENGINES[engine].cast(split, draw)
