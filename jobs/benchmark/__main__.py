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

from jobs.benchmark import phrases, retrieve
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
        help="retrieve: the largest datastore that is searched; 1 kB of disk an entry",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        with tempfile.TemporaryDirectory() as directory:
            results = _MEASURED[options.part](Path(directory), options)
    except (EndpointError, ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
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
        grown = [*(size for size in sizes.growth if size < options.entries), options.entries]
        sizes = replace(sizes, growth=tuple(grown))
    return retrieve.measure(directory, sizes)


def _phrases(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    return phrases.measure(directory, phrases.QUICK if options.quick else phrases.FULL)


_MEASURED = {"serve": _serve, "retrieve": _retrieve, "phrases": _phrases}
_SHOWN = {"serve": show, "retrieve": retrieve.show, "phrases": phrases.show}


if __name__ == "__main__":
    with terminal.command("error"):
        main()
