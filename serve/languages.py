"""Languages as callers write them: `en`, `en-US`, `English`; and as OpenAI's answers call them."""

from __future__ import annotations

import re

NAMES = {
    "ar": "arabic",
    "cs": "czech",
    "da": "danish",
    "de": "german",
    "el": "greek",
    "en": "english",
    "es": "spanish",
    "fi": "finnish",
    "fr": "french",
    "he": "hebrew",
    "hi": "hindi",
    "hu": "hungarian",
    "id": "indonesian",
    "it": "italian",
    "ja": "japanese",
    "ko": "korean",
    "nl": "dutch",
    "no": "norwegian",
    "pl": "polish",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sv": "swedish",
    "th": "thai",
    "tr": "turkish",
    "uk": "ukrainian",
    "vi": "vietnamese",
    "zh": "chinese",
}
"""How OpenAI's verbose answers call a language; others are called by their code."""
UNKNOWN = "auto"
"""What callers of other servers write who do not know the language."""
_CODES = {name: code for code, name in NAMES.items()}


def code(given: str) -> str:
    """The ISO 639-1 code of a language given as one, as BCP 47 (`en-US`), or by its name."""
    given = given.strip().lower()
    return _CODES.get(given) or re.split("[-_]", given)[0]


def name(code: str) -> str:
    """How verbose answers call the language of a code."""
    return NAMES.get(code, code)
