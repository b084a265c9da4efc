"""Options of the command line that say what an entry is, and who speaks it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, get_args

from mmrag.config import MOST_TAKES, Speaking
from mmrag.config.section import Synthesizer

if TYPE_CHECKING:
    from mmrag.retrieval.wording import Entry

WORDING = {
    "display_as": "--display-as",
    "pronunciations": "--pronunciation",
    "weight": "--weight",
    "language": "--language",
}
"""What may be said of an entry, and the options that say it."""
SPEAKING = {"voices": "--voices", "kokoro": "--kokoro", "takes": "--takes"}
"""What may be said of its speakers, and the options that say it."""


def add_wording(command: Any) -> None:
    """Options of one entry."""
    command.add_argument("--display-as", metavar="TEXT", help="how transcripts write it")
    command.add_argument(
        "--pronunciation",
        action="append",
        dest="pronunciations",
        metavar="SOUND",
        help="how it is said: a respelling (zole pie dem), or IPA (/zɒlˈpɪdɛm/); may be repeated",
    )
    command.add_argument("--weight", type=float, help="0 (never retrieved) to 2 (default: 1)")
    command.add_argument("--language", help="in which it is said, of those that the models know")


def wording(options: argparse.Namespace) -> dict[str, Any]:
    """What was said of one entry."""
    told = {name: getattr(options, name) for name in WORDING}
    return {name: value for name, value in told.items() if value is not None}


def wording_flags(options: argparse.Namespace) -> str:
    """The options with which that was said."""
    return ", ".join(WORDING[name] for name in wording(options))


def worded(options: argparse.Namespace, text: str) -> Entry:
    """The entry of a text that is worded so."""
    from mmrag.retrieval.wording import entry

    return entry({"text": text, **wording(options)})


def add_speaking(command: Any) -> None:
    """Options of who speaks."""
    command.add_argument(
        "--voices",
        type=_shares,
        metavar="ENGINE[=SHARE],...",
        help="synthesizers that say texts, and their shares: espeak,kokoro for both in turn "
        "(default: espeak)",
    )
    command.add_argument(
        "--kokoro",
        metavar="DIR",
        help="Kokoro's model and voices, as `python -m jobs.fetch_voices` fetches them",
    )
    command.add_argument(
        "--takes",
        type=_takes,
        metavar="N",
        help="voices that say each text: it then has as many keys (default: 1)",
    )


def speaking(options: argparse.Namespace) -> Speaking:
    """Who speaks. Raises what `engines.require` raises for a synthesizer that is not there,
    ValueError for a directory of one that does not speak."""
    from mmrag.corpora.voices import engines

    told = {name: getattr(options, name) for name in SPEAKING}
    chosen = Speaking(**{name: value for name, value in told.items() if value is not None})
    if chosen.kokoro is not None and "kokoro" not in chosen.voices:
        raise ValueError("--kokoro: it does not speak, --voices kokoro lets it")
    engines.require(chosen.voices, chosen.kokoro, "--kokoro")
    return chosen


def refuse_speaking(options: argparse.Namespace, why: str) -> None:
    """ValueError, which says `why`, where somebody said who speaks and nobody does."""
    told = [flag for name, flag in SPEAKING.items() if getattr(options, name, None) is not None]
    if told:
        raise ValueError(f"{', '.join(told)}: {why}")


def _shares(text: str) -> dict[str, float]:
    """`espeak=3,kokoro=1` as shares; an engine alone has the share of 1."""
    found = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        if name not in (known := get_args(Synthesizer)):
            raise argparse.ArgumentTypeError(f"{name!r}: there are {', '.join(known)}")
        if not 0 < float(share or 1) < float("inf"):
            raise argparse.ArgumentTypeError(f"{part}: a share is more than 0")
        found[name] = float(share or 1)
    return found


def _takes(text: str) -> int:
    if not 1 <= int(text) <= MOST_TAKES:
        raise argparse.ArgumentTypeError(f"{text}: at least 1, at most {MOST_TAKES}")
    return int(text)
