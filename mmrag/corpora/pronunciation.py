"""The phones that a text is said in, where nobody told when each of them is said."""

from __future__ import annotations

from functools import cache

from mmrag.corpora.voices.espeak import VOICES, Synthesizer
from mmrag.corpora.voices.speech import UnspeakableError
from mmrag.records import Utterance


class Pronunciation:
    """The phones of an utterance as they follow each other, with "" where words meet: its own, or
    those that espeak-ng says its text in, which needs the extra `speech`."""

    def __init__(self) -> None:
        self._synthesizer: Synthesizer | None = None

    def __call__(self, one: Utterance) -> tuple[str, ...]:
        if one.phones:
            return tuple(phone.text for phone in one.phones)
        return self._read(one.text or "")

    @cache  # noqa: B019 it lives as long as one training
    def _read(self, text: str) -> tuple[str, ...]:
        self._synthesizer = self._synthesizer or Synthesizer()
        try:
            speech = self._synthesizer.speak(text, VOICES["train"][0])
        except UnspeakableError:
            return ()
        phones: list[str] = []
        starts = [word.start for word in speech.words[1:]]
        for phone in speech.phones:
            while starts and phone.start > starts[0] - 0.01:  # espeak-ng's words begin early
                starts.pop(0)
                phones.append("")
            phones.append(phone.text)
        return tuple(phones)
