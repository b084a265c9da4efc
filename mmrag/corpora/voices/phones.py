"""The phones of English that synthesizers' alignments are written in, whoever speaks.

Synthesizers write IPA, each accent its own. An encoder that learns from several of them has to be
asked the same thing by all: what differs between accents alone (`ɒ` and `ɑ`, a tapped `t`, length)
is folded into one set of PHONES, the forty of American dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from mmrag.records import Timed

VOWELS = ("i", "ɪ", "ɛ", "æ", "ɑ", "ɔ", "ʊ", "u", "ʌ", "ə", "ɜ", "eɪ", "aɪ", "ɔɪ", "aʊ", "oʊ")
CONSONANTS = (
    *("p", "b", "t", "d", "k", "ɡ", "f", "v", "θ", "ð", "s", "z", "ʃ", "ʒ", "h"),
    *("m", "n", "ŋ", "l", "ɹ", "w", "j", "tʃ", "dʒ"),
)
PHONES = VOWELS + CONSONANTS

_SAME: dict[str, tuple[str, ...]] = {
    "ɒ": ("ɑ",), "a": ("æ",), "e": ("ɛ",), "o": ("ɔ",), "ɐ": ("ə",), "ᵻ": ("ɪ",), "ɨ": ("ɪ",),
    "ʉ": ("u",), "y": ("u",), "ɝ": ("ɜ", "ɹ"), "ɚ": ("ə", "ɹ"),
    "ei": ("eɪ",), "əɪ": ("aɪ",), "ɑɪ": ("aɪ",), "oɪ": ("ɔɪ",), "æʊ": ("aʊ",), "aa": ("aʊ",),
    "əʊ": ("oʊ",), "əu": ("oʊ",), "ʌʊ": ("oʊ",), "ʌʉ": ("oʊ",), "ɔʊ": ("oʊ",),
    "r": ("ɹ",), "ɾ": ("t",), "ʍ": ("w",), "x": ("k",), "ç": ("h",), "ɬ": ("l",), "ɫ": ("l",),
    "g": ("ɡ",), "ɕ": ("ʃ",), "ʧ": ("tʃ",), "ʤ": ("dʒ",),
}  # fmt: skip
_KNOWN = {**{phone: (phone,) for phone in PHONES}, **_SAME}


@lru_cache(4096)
def folded(ipa: str) -> tuple[str, ...]:
    """The PHONES that a piece of IPA is made of; none for stress, length and other marks.

    A long monophthong of some accents is another's diphthong: `eː` is `eɪ`, `oː` is `oʊ`, unless an
    `ɹ` follows.
    """
    ipa = ipa.translate(_MARKS)
    ipa = ipa.replace("a:", "aː").replace("eː", "eɪ").replace("oː", "oʊ").replace("oʊɹ", "ɔɹ")
    ipa = ipa.replace("ː", "")
    phones: list[str] = []
    at = 0
    while at < len(ipa):
        size = 2 if ipa[at : at + 2] in _KNOWN else 1
        phones += _KNOWN.get(ipa[at : at + size], ())
        at += size
    return tuple(phones)


def unknown(ipa: str) -> list[str]:
    """The symbols of a piece of IPA that are none of a phone's and no marks, each once."""
    known = {*"".join(_KNOWN), "ː", ":"}
    return [letter for letter in dict.fromkeys(ipa.translate(_MARKS)) if letter not in known]


_MARKS = str.maketrans("", "", "ˈˌ',%=\u0303\u0329\u032a\u0361ʲʰʔ")


def timed(ipa: Iterable[Timed]) -> Iterator[Timed]:
    """Timed pieces of IPA as timed PHONES: those of one piece share its time alike."""
    for piece in ipa:
        phones = folded(piece.text)
        if not phones or piece.end <= piece.start:
            continue
        step = (piece.end - piece.start) / len(phones)
        for number, phone in enumerate(phones):
            start = piece.start + number * step
            end = piece.end if number == len(phones) - 1 else start + step
            yield Timed(phone, start, end)
