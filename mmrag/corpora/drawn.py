"""The sentences of a split in the order that they are to stand in, without an object for each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Sentence:
    """What is said, before it is known by whom."""

    text: str
    domain: str
    entities: tuple[str, ...] = ()


class Drawn:
    """Sentences as columns, and an order of them; a `Sentence` is made when it is read.

    Of each it keeps the text and the entities that it was given, and 28 bytes beside them: two
    references, the number of its domain, and its place in the order.
    """

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._entities: list[tuple[str, ...]] = []
        self._domains = array("I")
        self._numbers: dict[str, int] = {}
        self._order = array("Q")

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Sentence]:
        domains = list(self._numbers)
        for place in self._order:
            domain = domains[self._domains[place]]
            yield Sentence(self._texts[place], domain, self._entities[place])

    def append(self, sentence: Sentence) -> None:
        """Put one more behind the others."""
        self._order.append(len(self._texts))
        self._texts.append(sentence.text)
        self._entities.append(sentence.entities)
        self._domains.append(self._numbers.setdefault(sentence.domain, len(self._numbers)))

    def extend(self, sentences: Iterable[Sentence]) -> None:
        """Put these behind the others, in their order."""
        for sentence in sentences:
            self.append(sentence)

    def shuffle(self, draw: Random) -> None:
        """As `draw.shuffle` orders a list of the sentences: how depends on their number alone."""
        draw.shuffle(self._order)
