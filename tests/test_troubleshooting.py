"""The page about messages quotes the code's own: whoever changes one is told of the other."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^\| `(.+?)` \| (.+) \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
SHORTEST = 6
"""Letters of a fixed part that say anything: shorter ones stand in every text."""


def templates() -> list[str]:
    """Every text of the four rooms, with `…` where a value goes in."""
    found = []
    for room in ("mmrag", "cluster", "jobs", "serve"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                    found.append("".join(parts))
    return [re.sub(r"\[/?[a-z]+\]", "", one) for one in found]


TEMPLATES = templates()


def known(message: str) -> list[str]:
    """The fixed parts of a message that no text of the code holds, in their order."""
    parts = [one.strip(" .,:;()") for one in message.split("…")]
    parts = [one for one in parts if len(one) >= SHORTEST]
    assert parts, f"nothing of {message!r} is fixed"
    pattern = re.compile(".*".join(map(re.escape, parts)), flags=re.DOTALL)
    if any(pattern.search(one) for one in TEMPLATES):
        return []
    # A message may be put together of several texts.
    return [part for part in parts if not any(part in one for one in TEMPLATES)]


def test_the_page_has_messages():
    assert len(QUOTED) > 40


@pytest.mark.parametrize("message", [message for message, _, _ in QUOTED])
def test_a_message_on_the_page_is_one_of_the_codes_own(message):
    assert known(message) == []


def test_a_message_that_nobody_prints_would_be_found():
    assert known("…: the moon is full, so … is refused") != []
