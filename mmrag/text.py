"""Written text as it is spoken: what transcripts are compared in, and word pieces are made of."""

from __future__ import annotations

import unicodedata

APOSTROPHES = str.maketrans(dict.fromkeys("‘’‛`´ʼ′", "'"))


def normalise(text: str) -> str:
    """`text` as it is compared: lower case, words and single spaces.

    Unicode NFKC; typographic apostrophes become ', which stays inside a word and nowhere else;
    all other punctuation and symbols separate words. Accents stay.
    """
    text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES))  # ´ would become a space
    text = text.translate(APOSTROPHES).lower()  # and ŉ has become ʼn
    words = "".join(map(_kept, text)).split()
    bare = (word.strip("'") for word in words)
    return unicodedata.normalize("NFKC", " ".join(word for word in bare if word))


def _kept(character: str) -> str:
    category = unicodedata.category(character)
    if character == "'" or category[0] in "LMN":
        return character
    return "" if category == "Cf" else " "  # Cf: soft hyphens and joiners, inside words
