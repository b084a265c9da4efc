"""How the tokens of a vocabulary are spelt in the letters that a CTC head hears.

Made once for a vocabulary and an alphabet, of whatever family its word pieces are. Knows texts;
neither models nor sound.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mmrag.model.contract import TextVocabulary
from mmrag.text import composed, fold, is_letter

GAP = " "
"""The letter between two words."""
NO_TEXT = "\N{REPLACEMENT CHARACTER}"
"""What a piece writes that holds a part of a character."""


@dataclass(frozen=True, eq=False)
class Spelling:
    """The letters of V tokens, as numbers from 1 on; 0 is none.

    `letters` (V, L) int16 with the gaps inside a token, padded with 0; `counts` (V,) how many.
    `opens` (V,) bool: a gap stands before the first letter. `closes` (V,) bool: one stands behind
    the last, or in a token that has no letter, as after a comma: it is heard once a letter follows.
    `blank` (V,) bool: the token is a gap and nothing else, the one letter that it has.
    """

    letters: np.ndarray
    counts: np.ndarray
    opens: np.ndarray
    closes: np.ndarray
    blank: np.ndarray
    alphabet: str

    @classmethod
    def of(cls, texts: Iterable[str], alphabet: str) -> Spelling:
        """Of tokens that write `texts` behind other text."""
        told = [spelt(text, alphabet) for text in texts]
        counts = np.array([len(letters) for letters, *_ in told])
        letters = np.zeros((len(told), max(1, counts.max(initial=0))), np.int16)
        for row, (own, *_) in zip(letters, told, strict=True):
            row[: len(own)] = own
        opens, closes, blank = (np.array([each[n] for each in told], bool) for n in (1, 2, 3))
        return cls(letters, counts, opens, closes, blank, alphabet)

    @property
    def longest(self) -> int:
        """Letters of the longest token, and no fewer than 1."""
        return self.letters.shape[1]

    @cached_property
    def gap(self) -> int:
        """The gap's number; 0 in an alphabet without one."""
        return self.alphabet.find(GAP) + 1

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """On a device, letters (V, L) and, as numbers (V,), `counts` and `opens`; last, the first
        letters (V,), those behind a gap numbered after all others."""
        if device not in self._there:
            opens = self.opens.astype(np.int64)
            first = opens * (1 + len(self.alphabet)) + self.letters[:, 0]
            columns = self.letters, self.counts.astype(np.int64), opens, first
            columns = (torch.from_numpy(one).to(device) for one in columns)
            self._there[device] = tuple(columns)
        return self._there[device]

    @cached_property
    def _there(self) -> dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]]:
        return {}


_KNOWN: WeakKeyDictionary[TextVocabulary, dict[str, Spelling]] = WeakKeyDictionary()


def spelling(vocabulary: TextVocabulary, alphabet: str) -> Spelling:
    """How a vocabulary's tokens are spelt in an alphabet; made when it is first asked for."""
    known = _KNOWN.setdefault(vocabulary, {})
    if alphabet not in known:
        known[alphabet] = Spelling.of(vocabulary.written, alphabet)
    return known[alphabet]


def spelt(text: str, alphabet: str) -> tuple[list[int], bool, bool, bool]:
    """The letters of a token's text, whether a gap stands before and behind them, and whether it is
    nothing but a gap.

    As texts are compared (`mmrag.text.normalise`): case and accents do not matter, letters that
    are not in the alphabet say nothing, and what is no letter parts words.
    """
    if text.isspace() and GAP in alphabet:
        return [alphabet.find(GAP) + 1], False, False, True
    letters: list[int] = []
    opens = gap = False
    for one in fold(composed(text).lower(), alphabet.__contains__):
        number = alphabet.find(one) + 1
        if number and one != GAP:
            if gap and letters and GAP in alphabet:
                letters.append(alphabet.find(GAP) + 1)
            opens, gap = opens or (gap and not letters), False
            letters.append(number)
        elif one != NO_TEXT and not is_letter(one) and unicodedata.category(one) != "Cf":
            gap = True
    return letters, opens, gap, False
