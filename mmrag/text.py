"""Written text as it is spoken: what transcripts are compared in, and word pieces are made of.

Numbers and symbols are read as in English. Knows nothing of models: which letters one of them can
write is told to `fold`.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache

from mmrag.storage import Location

APOSTROPHES = str.maketrans(dict.fromkeys("‘’‛`´ʼ′", "'"))
_WITHOUT_ACCENT = {
    "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i",
    "ħ": "h", "ŋ": "ng", "ŧ": "t", "ĸ": "k", "ə": "e", "ƒ": "f", "ɨ": "i", "ʉ": "u", "ƶ": "z",
    "ʻ": "", "ʹ": "", "ʺ": "",
}  # fmt: skip
"""Latin letters that Unicode does not take apart, and modifiers that nobody pronounces."""

_SPELT_OUT = re.compile(r"[A-Za-z\s.,;:!?'\"()\-]*")
"""Text in which `spell` has nothing to do."""
_AMOUNT = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?"
_FRACTIONS = {
    "½": "half", "¼": "a quarter", "¾": "three quarters", "⅓": "a third", "⅔": "two thirds",
}  # fmt: skip
_FRACTION = re.compile(rf"(?P<more>\d\s?)?(?P<part>[{''.join(_FRACTIONS)}])")
_RAISED = re.compile(r"(?<=\d)(?=[²³¹⁰-⁹₀-₉①-⑳⅐-⅞])")
"""Where a small digit follows a large one, and would become part of its number."""
_COINS = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
    "¥": ("yen", "yen", "sen", "sen"),
}
_SCALES = {
    "hundred": "hundred", "thousand": "thousand", "million": "million", "billion": "billion",
    "trillion": "trillion", "k": "thousand", "m": "million", "bn": "billion",
}  # fmt: skip
_MONEY = re.compile(
    rf"(?P<before>[$£€¥])\s?(?P<much>{_AMOUNT})(?![\d.]*\d)"
    rf"(?:(?:\s?(?P<scale>{'|'.join(list(_SCALES)[:5])})|(?P<short>k|m|bn))\b)?"
    rf"|(?<![\d.,])(?P<many>{_AMOUNT})\s?(?P<after>[$£€¥])(?!\d)",
    re.IGNORECASE,
)
_TIME = re.compile(
    r"(?<![\d:.])([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?(?![\d:])(?=(\s?[ap]\.?m\b)?)",
    re.IGNORECASE,
)
_TELEPHONE = re.compile(
    r"(?<![\w.,:/+-])(?:"
    r"(?:\+\d{1,3}[ .-]?)?\(\d{3,5}\)[ .-]?\d{2,4}(?:[ .-]\d{2,4}){1,3}"
    r"|\+\d{1,4}(?:[ .-]\d{2,4}){2,5}|\+\d{7,15}"
    r"|(?:\d{3}[ .-]){2}\d{4}|\d{3}-\d{4}|0\d{1,4}(?:[ .-]\d{2,4}){1,4}"
    r")(?![\w:/-]|[.,]\d)"
)
_ORDINAL = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)\b", re.IGNORECASE)
_PLURAL = re.compile(r"(?<![\d.,])(\d{1,4})s\b")
_DOTTED = re.compile(r"(?<![\d.,])\d+(?:\.\d+){2,}")
_NUMBER = re.compile(rf"(?<![\d.])(?:{_AMOUNT})|(?<!\d)\.\d+|\d+")
_SYMBOLS = {
    "&": "and", "+": "plus", "@": "at", "%": "percent", "=": "equals", "°": "degrees",
    "×": "times", "÷": "divided by", "±": "plus or minus",
}  # fmt: skip
_LONGEST_NUMBER, _LONGEST_UNGROUPED = 15, 4
"""Digits: longer ones are read digit by digit, ungrouped ones unless they end in two zeros."""


def normalise(text: str) -> str:
    """`text` in lower case, words and single spaces.

    Unicode NFKC; typographic apostrophes become ', which stays inside a word and nowhere else;
    all other punctuation and symbols separate words. Accents and digits stay.
    """
    words = "".join(map(_kept, composed(text).lower())).split()
    bare = (word.strip("'") for word in words)
    return unicodedata.normalize("NFKC", " ".join(word for word in bare if word))


def composed(text: str) -> str:
    """`text` in Unicode NFKC, every apostrophe a plain one."""
    text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES))  # ´ would become a space
    return text.translate(APOSTROPHES)  # and ŉ has become ʼn


def spoken(text: str) -> str:
    """`text` as it is compared: `normalise` of what `spell` reads; accents stay.

    So "2" and "two" are the same word, in whichever of reference and transcript they stand.
    """
    return normalise(spell(text))


def spell(text: str) -> str:
    """`text` with its numbers and symbols as English words; case and punctuation stay.

    Numbers are cardinal, ordinal ("2nd"), years, decimals, times of the day, sums of money, or
    read digit by digit as a telephone number is. Letters and digits part: "A1C" is "A one C".
    Symbols are words only beside words: "?&" says nothing.
    """
    if _SPELT_OUT.fullmatch(text) or not any(map(str.isalnum, text)):
        return text
    text = composed(_RAISED.sub(" ", _FRACTION.sub(_fraction, text)))
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{FRACTION SLASH}", " over ")
    for pattern, read in _READ:
        text = pattern.sub(lambda found, read=read: _apart(found, read(found)), text)
    return " ".join(text.split())


def fold(text: str, known: Callable[[str], bool] = str.isascii) -> str:
    """`text` with each letter that is not `known` as the plain Latin letters it is made of.

    Accents fall off ("é" is "e", "ł" is "l", "ß" is "ss"); the letters of other scripts stay.
    """
    return "".join(letter if known(letter) else _folded(letter) for letter in text)


def read_lines(path: Location) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, stripped, with their numbers from 1.

    A byte-order mark is not part of the first line. Raises ValueError that names the line for a
    file that is not UTF-8, OSError for one that cannot be read.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{number}: not UTF-8 text: {error.reason}") from None
    # Not splitlines: it also splits at characters that no editor counts as a new line.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def each_line(path: Location) -> Iterator[tuple[int, str]]:
    """As `read_lines`, a line at a time: what is wrong with one is raised when it is reached."""
    with path.open("rb") as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if text := line.strip():
                    yield number, text
        except UnicodeDecodeError:
            read_lines(path)  # says which line it is


def is_letter(character: str) -> bool:
    """Whether a character is one that is spoken: a letter, a digit, or a mark on one of them."""
    return unicodedata.category(character)[0] in "LMN"


def _kept(character: str) -> str:
    if character == "'" or is_letter(character):
        return character
    return "" if unicodedata.category(character) == "Cf" else " "


def _folded(letter: str) -> str:
    category = unicodedata.category(letter)
    if category in ("Mn", "Me"):
        return ""
    small = letter.lower()
    plain = _WITHOUT_ACCENT.get(small)
    if plain is None:
        parts = unicodedata.normalize("NFKD", letter)
        plain = "".join(part for part in parts if unicodedata.category(part) != "Mn")
        plain = "".join(_WITHOUT_ACCENT.get(part.lower(), part) for part in plain)
    elif letter != small:
        plain = plain.capitalize()
    return plain if plain.isascii() else letter


def _apart(found: re.Match[str], words: str) -> str:
    """`words` in place of what was `found`, not run together with the words around it."""
    before, after = found.string[: found.start()][-1:], found.string[found.end() :][:1]
    return f"{' ' * before.isalnum()}{words}{' ' * after.isalnum()}"


def _fraction(found: re.Match[str]) -> str:
    part = _FRACTIONS[found["part"]]
    if not found["more"]:
        return f" {part} "
    return f"{found['more'].rstrip()} and {part.replace('half', 'a half')} "


@lru_cache(4096)
def _words(number: str, to: str = "cardinal") -> str:
    """A whole number in words: `to` is cardinal, ordinal or year."""
    if len(number) > _LONGEST_NUMBER:
        return _digits(number)
    from num2words import num2words  # it loads every language that it has

    return num2words(int(number), lang="en", to=to).replace(",", "").replace("-", " ")


def _digits(text: str) -> str:
    return " ".join(_words(letter) for letter in text if letter.isdecimal())


def _number(text: str) -> str:
    """An amount: grouped, decimal, a year, or a string of digits."""
    grouped = "," in text
    whole, point, rest = text.replace(",", "").partition(".")
    if point:
        return f"{_words(whole)} point {_digits(rest)}" if whole else f"point {_digits(rest)}"
    if len(whole) > 1 and int(whole[0]) == 0:
        return _digits(whole)
    if len(whole) > _LONGEST_UNGROUPED and not grouped and int(whole[-2:]):
        return _digits(whole)
    is_year = len(whole) == 4 and not grouped and 1100 <= int(whole) < 2100
    return _words(whole, "year" if is_year else "cardinal")


def _money(found: re.Match[str]) -> str:
    one, many, coin, coins = _COINS[found["before"] or found["after"]]
    much = (found["much"] or found["many"]).replace(",", "")
    if scale := found["scale"] or found["short"]:
        return f"{_amount(much)} {_SCALES[scale.lower()]} {many}"
    whole, _, rest = much.partition(".")
    if len(rest) != 2:
        return f"{_amount(much)} {one if much == '1' else many}"
    small = f"{_words(rest)} {coin if int(rest) == 1 else coins}"
    large = f"{_words(whole)} {one if int(whole) == 1 else many}"
    if not int(rest):
        return large
    return f"{large} and {small}" if int(whole) else small


def _amount(text: str) -> str:
    """What is counted is no year and no telephone number."""
    return _number(text) if "." in text else _words(text)


def _time(found: re.Match[str]) -> str:
    hour, minute, second, half = found.groups()
    if int(minute):
        later = _words(minute) if int(minute) > 9 else f"oh {_words(minute[1])}"
    elif second or half:
        later = "" if half else "hundred"
    else:
        later = "o'clock" if 0 < int(hour) <= 12 else "hundred"
    after = f"and {_words(second)} seconds" if second else ""
    return " ".join(filter(None, (_words(hour), later, after)))


def _telephone(found: re.Match[str]) -> str:
    return f"{'plus ' * found[0].startswith('+')}{_digits(found[0])}"


def _plural(found: re.Match[str]) -> str:
    said = _number(found[1])
    return f"{said[:-1]}ies" if said.endswith("y") else f"{said}{'es' * said.endswith('x') or 's'}"


_READ: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (_MONEY, _money),
    (_TIME, _time),
    (_TELEPHONE, _telephone),
    (re.compile(r"#(?=\s?\d)"), lambda _: "number "),
    (re.compile(r"(?<=[A-Za-z])#"), lambda _: " sharp"),
    (re.compile(r"#(?=\w)"), lambda _: "hashtag "),
    (re.compile(r"#"), lambda _: " "),
    (re.compile(r"(?<![\w)%°])-(?=\.?\d)"), lambda _: "minus "),
    (re.compile(r"°\s?C\b"), lambda _: " degrees celsius"),
    (re.compile(r"°\s?F\b"), lambda _: " degrees fahrenheit"),
    (_ORDINAL, lambda found: _words(found[1].replace(",", ""), "ordinal")),
    (_PLURAL, _plural),
    (_DOTTED, lambda found: " point ".join(map(_number, found[0].split(".")))),
    (_NUMBER, lambda found: _number(found[0])),
    (re.compile(f"[{re.escape(''.join(_SYMBOLS))}]"), lambda found: f" {_SYMBOLS[found[0]]} "),
)
"""In this order: what one pattern has read is words to the next."""
