"""How much text a request may bring, checked in one place for every route that takes any."""

from __future__ import annotations

import re
from collections.abc import Sequence

from serve.errors import ApiError
from serve.settings import Limits

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""A synthesizer takes the first for the end of what it is to say."""


def bounded(texts: Sequence[str], most: int, param: str, limits: Limits) -> list[str]:
    """The texts, blanks and control characters evened out and empty ones dropped.

    Raises ApiError (400) if there are more than `most`, or one is too long or has nothing to say.
    """
    found = [" ".join(_CONTROL.sub(" ", text).split()) for text in texts]
    found = [text for text in found if text]
    if len(found) > most:
        raise ApiError(400, f"{param}: {len(found)} are too many, at most {most}", None, param)
    for text in found:
        if len(text) > limits.text_length:
            message = f"{param}: {text[:20]!r}… has {len(text)} characters"
            raise ApiError(400, f"{message}, at most {limits.text_length}", None, param)
        if not any(letter.isalnum() for letter in text):
            raise ApiError(400, f"{param}: nothing to listen for in {text!r}", None, param)
    return found
