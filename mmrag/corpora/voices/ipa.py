"""IPA as espeak-ng is told it: its English voices say phonemes that are written in its mnemonics.

Sounds that English has not are said as the nearest that it has (`phones`).
"""

from __future__ import annotations

import re

from mmrag.corpora.voices import phones

_MNEMONICS = {
    "i": "i:", "ɪ": "I", "ɛ": "E", "æ": "a", "ɑ": "A:", "ɔ": "O:", "ʊ": "U", "u": "u:", "ʌ": "V",
    "ə": "@", "ɜ": "3:", "eɪ": "eI", "aɪ": "aI", "ɔɪ": "OI", "aʊ": "aU", "oʊ": "oU",
    "ɡ": "g", "θ": "T", "ð": "D", "ʃ": "S", "ʒ": "Z", "ŋ": "N", "ɹ": "r", "tʃ": "tS", "dʒ": "dZ",
}  # fmt: skip
"""Of `phones.PHONES`; the others are written alike."""
_STRESS = {"ˈ": "'", "'": "'", "ˌ": ",", ",": ","}
_APART = re.compile(r"([ˈˌ',\s.‿|-])")
"""What stands between phones: stress, and where syllables and words end."""
_BETWEEN_SLASHES = re.compile(r"/([^/]*)/")


def refusal(ipa: str) -> str | None:
    """Why IPA cannot be said; None if it can."""
    if unknown := phones.unknown(_APART.sub("", ipa)):
        named = ", ".join(map(repr, unknown))
        return f"{named} in {ipa!r}: no symbols of IPA that a voice can say"
    if not phones.folded(ipa):
        return f"nothing to say in {ipa!r}"
    return None


def mnemonics(ipa: str) -> str:
    """IPA as espeak-ng's phonemes, words a blank apart; ValueError for what cannot be said."""
    if refused := refusal(ipa):
        raise ValueError(refused)
    words = []
    for word in ipa.split():
        said, stress = [], ""
        for part in filter(None, _APART.split(word)):
            if part in _STRESS:
                stress = _STRESS[part]
            elif not _APART.fullmatch(part):
                # A bar keeps letters of two phones from being read as one.
                said.append(stress + "|".join(_MNEMONICS.get(p, p) for p in phones.folded(part)))
                stress = ""
        words.append("|".join(said))
    return " ".join(filter(None, words))


def phonetic(text: str) -> str:
    """`text` for espeak-ng, told to take phonemes: what stands between slashes is IPA."""
    return _BETWEEN_SLASHES.sub(lambda found: f"[[{mnemonics(found[1])}]]", text)
