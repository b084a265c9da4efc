"""Score anybody's transcripts: WER, and with lists of rare words U-WER and B-WER.

    python -m jobs.score --refs REFERENCES --hyps HYPOTHESES [--json]

References are UTF-8 lines of `utterance<TAB>text`, or of the LibriSpeech biasing benchmark's four
columns, `utterance<TAB>text<TAB>rare words<TAB>biasing words`, the lists as JSON; hypotheses are
lines of `utterance<TAB>text`. Words are compared as they are written, and aligned as the benchmark
(and NIST's sclite) does. Starts no cluster: it imports neither Ray nor a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmrag import terminal
from mmrag.score import ErrorRate, biasing_error_rates, normalise

NAMED = 5
"""Utterances that a message names before it only counts."""
PLAIN, BIASING = 2, 4
"""Columns of the two kinds of reference files."""


class TranscriptFileError(ValueError):
    """A file of references or hypotheses that cannot be scored; the message names the place."""


@dataclass(frozen=True)
class References:
    """What was said, by utterance; `rare` has each one's list, None in a file without lists."""

    texts: dict[str, str]
    rare: dict[str, frozenset[str]] | None


@dataclass(frozen=True)
class Scored:
    """Rates by their name, WER first, and what had no counterpart."""

    rates: dict[str, ErrorRate]
    utterances: int
    missing: tuple[str, ...]
    """Utterances without a hypothesis, scored as empty."""
    unknown: tuple[str, ...]
    """Hypotheses without a reference, not scored."""


def read_references(path: Path) -> References:
    """A reference file. Raises TranscriptFileError, naming the line."""
    texts: dict[str, str] = {}
    rare: dict[str, frozenset[str]] = {}
    width = None
    for place, utterance, columns in _lines(path, texts):
        if len(columns) not in (PLAIN, BIASING):
            raise TranscriptFileError(
                f"{place}: {_columns(len(columns))}; a reference has 2 (utterance, text) or 4 "
                "(utterance, text, rare words, biasing words), with tabs between them"
            )
        if width not in (None, len(columns)):
            raise TranscriptFileError(
                f"{place}: {_columns(len(columns))}, where the lines before it have {width}"
            )
        width = len(columns)
        texts[utterance] = columns[1]
        if width == BIASING:
            rare[utterance] = frozenset(_words(place, "rare words", columns[2]))
            _words(place, "biasing words", columns[3])
    if not texts:
        raise TranscriptFileError(f"{path} holds no utterance")
    return References(texts, rare if width == BIASING else None)


def read_hypotheses(path: Path) -> dict[str, str]:
    """Utterance -> what was heard; an utterance alone on its line was heard as nothing."""
    texts: dict[str, str] = {}
    for place, utterance, columns in _lines(path, texts):
        if len(columns) > PLAIN:
            raise TranscriptFileError(
                f"{place}: {_columns(len(columns))}; a hypothesis has 2 (utterance, text), "
                "with a tab between them"
            )
        texts[utterance] = columns[1] if len(columns) == PLAIN else ""
    return texts


def score(
    references: References,
    hypotheses: Mapping[str, str],
    missing_as_empty: bool = False,
    normalised: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Scored:
    """Rates over all utterances of `references`.

    Raises TranscriptFileError if one has no hypothesis, unless `missing_as_empty`; and ValueError
    if no reference holds a word.
    """
    missing = tuple(name for name in references.texts if name not in hypotheses)
    if missing and not missing_as_empty:
        raise TranscriptFileError(
            f"{len(missing)} of {len(references.texts)} utterances have no hypothesis: "
            f"{_some(missing)}; --missing empty counts all their words as deleted"
        )
    said = list(references.texts.values())
    heard = [hypotheses.get(name, "") for name in references.texts]
    rare = [(references.rare or {}).get(name, frozenset()) for name in references.texts]
    if normalised:
        said, heard = [normalise(one) for one in said], [normalise(one) for one in heard]
        rare = [frozenset(" ".join(map(normalise, words)).split()) for words in rare]
    counted = biasing_error_rates(said, heard, rare, resamples, seed)
    rates = {"WER": counted.words}
    if references.rare is not None:
        rates |= {"U-WER": counted.unbiased, "B-WER": counted.biased}
    unknown = tuple(name for name in hypotheses if name not in references.texts)
    return Scored(rates, len(said), missing, unknown)


def as_json(scored: Scored, normalised: bool) -> str:
    """One object; rates are shares of one, null where the references hold no such word."""
    fields = {
        "utterances": scored.utterances,
        "missing": list(scored.missing),
        "without_reference": list(scored.unknown),
        "normalised": normalised,
    }
    rates = {name.lower().replace("-", "_"): asdict(rate) for name, rate in scored.rates.items()}
    return json.dumps(fields | rates, indent=1, ensure_ascii=False)


def as_table(scored: Scored) -> str:
    """For people: a line a rate, with its interval and counts."""
    rows = [("", "rate", "95 % interval", "sub", "del", "ins", "words")]
    rows += [
        (
            name,
            "–" if rate.rate is None else f"{rate.rate:.2%}",
            "–" if rate.rate is None else f"{100 * rate.low:.2f}–{rate.high:.2%}",
            *(f"{count:,}" for count in (rate.substitutions, rate.deletions, rate.insertions)),
            f"{rate.reference:,}",
        )
        for name, rate in scored.rates.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def as_benchmark(scored: Scored) -> str:
    """The lines of the benchmark's own result files, to compare with them."""
    return "\n".join(
        f"{name}: error_rate={100 * rate.errors / rate.reference if rate.reference else None}, "
        f"ref_words={rate.reference}, subs={rate.substitutions}, ins={rate.insertions}, "
        f"dels={rate.deletions}"
        for name, rate in scored.rates.items()
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; what is wrong with a file is one line, and exit status 1."""
    options = _parser().parse_args(arguments)
    try:
        references, hypotheses = read_references(options.refs), read_hypotheses(options.hyps)
        scored = score(
            references,
            hypotheses,
            options.missing == "empty",
            options.normalise,
            options.resamples,
            options.seed,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if scored.missing:
        print(
            f"note: {len(scored.missing)} of {scored.utterances} utterances have no hypothesis and "
            f"count as deleted: {_some(scored.missing)}",
            file=sys.stderr,
        )
    if scored.unknown:
        print(
            f"note: {len(scored.unknown)} hypotheses have no reference and were not scored: "
            f"{_some(scored.unknown)}",
            file=sys.stderr,
        )
    if options.json:
        print(as_json(scored, options.normalise))
    elif options.benchmark:
        print(as_benchmark(scored))
    else:
        print(as_table(scored))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--refs", type=Path, required=True, help="file of references")
    parser.add_argument("--hyps", type=Path, required=True, help="file of hypotheses")
    parser.add_argument(
        "--missing",
        choices=["error", "empty"],
        default="error",
        help="an utterance without a hypothesis is an error, or was heard as nothing "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--normalise",
        action="store_true",
        help="compare lower case without punctuation, as this package's tables do; "
        "not for figures to set beside the benchmark's",
    )
    parser.add_argument(
        "--resamples",
        type=_positive,
        default=1000,
        help="bootstrap resamples behind each interval (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument(
        "--benchmark",
        action="store_true",
        help="print the lines of the benchmark's result files",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _lines(path: Path, known: Mapping[str, str]) -> Iterator[tuple[str, str, list[str]]]:
    """Place, utterance and columns of each line that is not empty.

    A byte order mark and any kind of line end are read over. Raises TranscriptFileError for an
    utterance that is in `known`, which the caller fills, or has no name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TranscriptFileError(f"{path} is not UTF-8: byte {error.start}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        columns = line.split("\t")
        utterance = columns[0].strip()
        if not utterance:
            raise TranscriptFileError(f"{place}: the first column, the utterance, is empty")
        if utterance in known:
            raise TranscriptFileError(f"{place}: utterance {utterance} is there twice")
        yield place, utterance, columns


def _words(place: str, what: str, text: str) -> list[str]:
    """A JSON list of words."""
    try:
        words = json.loads(text)
    except ValueError as error:
        raise TranscriptFileError(f"{place}: {what}: not JSON: {error}") from None
    except RecursionError:
        raise TranscriptFileError(f"{place}: {what}: not a JSON list of words") from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise TranscriptFileError(f"{place}: {what}: not a JSON list of words")
    for word in words:
        if word.split() != [word]:
            raise TranscriptFileError(
                f"{place}: {what}: {json.dumps(word, ensure_ascii=False)} is not one word; "
                "a phrase is listed word by word"
            )
    return words


def _columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


if __name__ == "__main__":
    with terminal.command("score"):
        main()
