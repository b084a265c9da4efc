"""How fast things are, and what they withstand: `python -m jobs.benchmark SUBJECT`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from jobs.benchmark.endpoint import EndpointError
from jobs.benchmark.serve import FULL, QUICK, Serving, speak
from jobs.benchmark.targets import rounded, show
from mmrag import terminal


def main() -> None:
    """Measure, and print a table or JSON; exit status 1 with one line where that is impossible."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=__doc__)
    parser.add_argument("part", choices=["serve"], help="what to measure")
    parser.add_argument("--quick", action="store_true", help="about four minutes, rougher figures")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    parser.add_argument(
        "--url", help="a service that runs already; MMRAG_API_KEYS may hold its key"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        with tempfile.TemporaryDirectory() as directory:
            clips = speak(Path(directory))
            measure = Serving(clips, QUICK if options.quick else FULL)
            results = measure.there(options.url) if options.url else measure.here()
    except (EndpointError, ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(rounded(results), indent=1))
    else:
        show(results)


if __name__ == "__main__":
    with terminal.command("error"):
        main()
