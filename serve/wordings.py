"""What callers list to be listened for, as entries that the service can speak and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrag.contents import unsayable
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.wording import Entry, entries, entry, line
from serve import schema
from serve.errors import ApiError
from serve.settings import Limits

Given = str | Mapping[str, Any] | Entry
ROMANISE = "; write it in letters that it has, and in display_as as it is to be read"


def checked(
    given: Sequence[Given],
    most: int,
    param: str,
    limits: Limits,
    vocabulary: Vocabulary,
    languages: Sequence[str],
    lines: bool = False,
) -> list[Entry]:
    """What was given under the name `param`, each text once and empty ones dropped, as entries.

    Of `lines` (fields of a form) one that begins with a brace is an object in JSON. Raises ApiError
    (400), which names what is wrong, for more than `most`, for one that is no entry or is too long,
    in a language that is not among `languages` (ISO 639-1), or nothing that can be spoken with this
    vocabulary.
    """
    found = []
    for number, one in enumerate(given):
        try:
            read = line(one) if lines and isinstance(one, str) else entry(one)
        except ValueError as error:
            raise _refused(f"{_place(param, number)}: {error}", param) from None
        if not read.text and not read.plain:
            raise _refused(f"{_place(param, number)}: text: an entry needs one", param)
        if read.text:
            found.append(read)
    if len(found) > most:
        raise _refused(f"{param}: {len(found)} are too many, at most {most}", param)
    for one in found:
        for text in (one.text, one.display_as or "", *one.pronunciations):
            if len(text) > limits.text_length:
                message = f"{param}: {text[:20]!r}… has {len(text)} characters"
                raise _refused(f"{message}, at most {limits.text_length}", param)
        if refusal := vocabulary.refusal(one.text):
            hint = ROMANISE if vocabulary.unspeakable(one.text) else ""
            raise _refused(f"{param}: {refusal}{hint}", param)
        if refusal := unsayable(one, languages):
            raise _refused(f"{param}: {one.text[:40]!r}: {refusal}", param)
    return entries(found)


def check_length(given: Sequence[Entry], param: str, limits: Limits) -> None:
    """Raises ApiError (400) if all that is said and written of the entries has more characters than
    a request may have."""
    texts = [text for one in given for text in (one.text, *one.pronunciations)]
    schema.check_length(texts, param, limits)


def _place(param: str, number: int) -> str:
    return f"{param.removesuffix('[]')}[{number}]"


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, None, param)
