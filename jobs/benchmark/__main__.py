"""How fast things are, and what they withstand: `python -m jobs.benchmark SUBJECT`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.benchmark import decode, growth, performance, phrases, retrieve, scale, tokenize, train
from jobs.benchmark.endpoint import EndpointError
from jobs.benchmark.serve import FULL, QUICK, Serving, speak
from jobs.benchmark.targets import rounded, show
from mmrag import terminal


def main() -> None:
    """Measure, and print a table or JSON; exit status 1 with one line where that is impossible."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=__doc__)
    parser.add_argument("part", choices=list(_MEASURED), help="what to measure")
    parser.add_argument("--quick", action="store_true", help="a few minutes, rougher figures")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    parser.add_argument(
        "--url", help="serve: a service that runs already; MMRAG_API_KEYS may hold its key"
    )
    parser.add_argument(
        "--entries",
        type=int,
        help="retrieve: the largest datastore; 1 kB of disk and of memory an entry",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        help="retrieve: where what is searched is kept, and taken from if it is there already",
    )
    parser.add_argument(
        "--plot", type=Path, help="retrieve: a file (.svg, .png) for time against entries"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        help="decode, tokenize, train: a directory whose performance.json and .md are brought up "
        "to date",
    )
    options = parser.parse_args()
    for option, parts in _OF_SOME_PARTS.items():
        if getattr(options, option) is not None and options.part not in parts:
            parser.error(f"--{option} is an option of {', '.join(parts)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        if options.docs is not None:
            performance.check(options.docs)
        with tempfile.TemporaryDirectory() as directory:
            results = _MEASURED[options.part](Path(directory), options)
    except (EndpointError, ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if options.docs is not None:
        performance.write(options.docs, options.part, results)
    if options.json:
        print(json.dumps(rounded(results), indent=1))
    else:
        _SHOWN[options.part](results)


def _serve(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    measure = Serving(speak(directory), QUICK if options.quick else FULL)
    return measure.there(options.url) if options.url else measure.here()


def _retrieve(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    sizes = retrieve.QUICK if options.quick else retrieve.FULL
    if options.entries is not None:
        if options.entries < 1:
            raise ValueError(f"--entries {options.entries}")
        grown = [*(size for size in sizes.growth if size < options.entries), options.entries]
        sizes = replace(sizes, growth=tuple(grown))
    if options.plot is not None:
        growth.check(options.plot)
    results = retrieve.measure(directory, sizes, options.directory)
    if options.plot is not None:
        growth.plot(options.plot, results["growth"])
    return results


def _phrases(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    return phrases.measure(directory, phrases.QUICK if options.quick else phrases.FULL)


def _decode(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    return decode.measure(directory, decode.QUICK if options.quick else decode.FULL)


def _tokenize(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    return tokenize.measure(directory, tokenize.QUICK if options.quick else tokenize.FULL)


def _train(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    return train.measure(directory, train.QUICK if options.quick else train.FULL)


def _scale(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    return scale.measure(directory, scale.QUICK if options.quick else scale.FULL)


_OF_SOME_PARTS = {
    "url": ["serve"],
    "entries": ["retrieve"],
    "directory": ["retrieve"],
    "plot": ["retrieve"],
    "docs": list(performance.SUBJECTS),
}
_MEASURED = {
    "serve": _serve,
    "retrieve": _retrieve,
    "phrases": _phrases,
    "decode": _decode,
    "tokenize": _tokenize,
    "train": _train,
    "scale": _scale,
}
_SHOWN = {
    "serve": show,
    "retrieve": retrieve.show,
    "phrases": phrases.show,
    "decode": decode.show,
    "tokenize": tokenize.show,
    "train": train.show,
    "scale": scale.show,
}


if __name__ == "__main__":
    with terminal.command("error"):
        main()
