"""Transcripts with entries as their owner writes them, in place of what a model writes.

A model writes in its own letters ("a one c"). Where a transcript has just the words of an entry,
one after the other and whole, they are replaced ("A1C"); no other word is touched. Who heard them,
the model by itself or retrieval, is all one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from mmrag.records import Transcript, Word
from mmrag.retrieval.wording import Entry
from mmrag.text import is_letter, normalise

Key = tuple[str, ...]
"""Words as they are compared."""
_POSSESSIVE = re.compile(r"(?<=.)'s$")
_PAUSES = (",", ";", ":", "!", "?")
"""Behind a word, they end what it is part of."""


class Display:
    """What is written in place of what."""

    def __init__(self, written: Iterable[tuple[Key, str]] = ()) -> None:
        """Words and what stands for them; of two for the same words the first counts."""
        self._written: dict[Key, str] = {}
        for key, text in written:
            if key:
                self._written.setdefault(key, text)
        self._begun = {key[:end] for key in self._written for end in range(1, len(key))}

    @classmethod
    def of(cls, entries: Iterable[Entry], spoken: Callable[[str], str]) -> Display:
        """How entries are written; `spoken` is a text as the model writes it.

        An entry that says no more than the model does, and is in small letters, changes nothing: a
        model that writes capitals may go on doing so.
        """
        found = []
        for one in entries:
            key = _key(spoken(one.text))
            if one.display_as is not None or one.text != " ".join(key):
                found.append((key, one.written))
        return cls(found)

    def __bool__(self) -> bool:
        return bool(self._written)

    def __or__(self, other: Display) -> Display:
        """Both; what this one has counts first."""
        return Display([*self._written.items(), *other._written.items()])

    def of_transcript(self, heard: Transcript) -> Transcript:
        """A transcript as it is read."""
        if not (self and self.met(heard.text.split())):
            return heard
        words = self.of_words(heard.words)
        text = " ".join(word.text for word in words) if words else self.of_text(heard.text)
        return replace(heard, text=text, words=words)

    def of_text(self, text: str) -> str:
        """A text as it is read; blanks are as they were where nothing is replaced."""
        words = text.split()
        if not (found := self.met(words)):
            return text
        told, at = [], 0
        for first, last, written in found:
            told += [*words[at:first], *written]
            at = last
        return " ".join([*told, *words[at:]])

    def of_words(self, words: Sequence[Word]) -> tuple[Word, ...]:
        """Words as they are read: what becomes one word has the time of all, and their probability
        together; of what becomes several, each has its part of the time, by its length."""
        told: list[Word] = []
        at = 0
        for first, last, written in self.met([word.text for word in words]):
            told += [*words[at:first], *_rewritten(words[first:last], written)]
            at = last
        return (*told, *words[at:])

    def met(self, words: Sequence[str]) -> list[tuple[int, int, list[str]]]:
        """Which runs of words (first, behind the last) are entries, and the words in their place:
        from the left, each as long as can be."""
        if not self:
            return []
        parts, found, at = [_key(word) for word in words], [], 0
        while at < len(words):
            last, key, ending = self._longest(words, parts, at)
            if last is None:
                at += 1
                continue
            written = _punctuated(self._written[key], ending, words[at], words[last - 1])
            if written != list(words[at:last]):
                found.append((at, last, written))
            at = last
        return found

    def settled(self, text: str, over: bool = False) -> str:
        """As much of a transcript that is still being written as no later word changes, as it is
        read: of what may yet become an entry, nothing. All of it when it is `over`."""
        if not self or over:
            return self.of_text(text) if self else text
        words = text.split()[:-1]  # the last may go on
        parts, at = [_key(word) for word in words], 0
        while at < len(words):
            rest = tuple(part for own in parts[at:] for part in own)
            if rest in self._begun:
                break
            last, *_ = self._longest(words, parts, at)
            at = at + 1 if last is None else last
        return self.of_text(" ".join(words[:at]))

    def among(self, words: Sequence[str]) -> Display:
        """What of it these words have."""
        parts, found = [_key(word) for word in words] if self else [], {}
        for at in range(len(parts)):
            last, key, _ = self._longest(words, parts, at)
            if last is not None:
                found[key] = self._written[key]
        return Display(found.items())

    def _longest(
        self, words: Sequence[str], parts: Sequence[Key], at: int
    ) -> tuple[int | None, Key, str]:
        """Behind which word the longest entry ends that begins with the word `at` (`parts` are the
        words as they are compared), its key, and its possessive ending; None for none."""
        best: tuple[int | None, Key, str] = (None, (), "")
        key: Key = ()
        for last in range(at, len(parts)):
            if not parts[last]:
                break
            key += parts[last]
            ending = _POSSESSIVE.search(key[-1])
            bare = (*key[:-1], key[-1][: ending.start()]) if ending else key
            if key in self._written:
                best = last + 1, key, ""
            elif bare in self._written:
                best = last + 1, bare, ending[0]
            if key not in self._begun or words[last].endswith(_PAUSES):
                break
        return best


def _key(text: str) -> Key:
    return tuple(normalise(text).split())


def _punctuated(written: str, ending: str, first: str, last: str) -> list[str]:
    """The words in place of others, with the punctuation that stands before the `first` of these
    and behind the `last`, but once."""
    before, _, after = _around(written)
    begin, end = _around(first)[0].removesuffix(before), _around(last)[2].removeprefix(after)
    return f"{begin}{written}{ending}{end}".split()


def _around(word: str) -> tuple[str, str, str]:
    """A word without what is no letter at its ends, and what that is."""
    letters = [at for at, letter in enumerate(word) if is_letter(letter)]
    if not letters:
        return "", word, ""
    first, last = letters[0], letters[-1] + 1
    return word[:first], word[first:last], word[last:]


def _rewritten(words: Sequence[Word], written: Sequence[str]) -> list[Word]:
    """The same evidence for other words."""
    if len(written) == len(words):
        return [replace(word, text=text) for word, text in zip(words, written, strict=True)]
    changed = [word for word in words if word.changed] or words
    sure = [word.confidence for word in words if word.confidence is not None]
    whole = Word(
        text="",
        probability=float(np.prod([word.probability for word in words])),
        lm_probability=float(np.prod([word.lm_probability for word in words])),
        changed=any(word.changed for word in words),
        source=next((word.source for word in changed if word.source is not None), None),
        start=words[0].start,
        end=words[-1].end,
        confidence=min(sure, default=None),
        unclear=any(word.unclear for word in words),
    )
    if whole.start is None or whole.end is None:
        return [replace(whole, text=text) for text in written]
    lengths = np.cumsum([0, *map(len, written)]) / sum(map(len, written))
    edges = (whole.start + (whole.end - whole.start) * lengths).tolist()
    edges[-1] = whole.end
    return [
        replace(whole, text=text, start=start, end=end)
        for text, start, end in zip(written, edges, edges[1:], strict=False)
    ]
