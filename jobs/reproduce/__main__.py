"""`python -m jobs.reproduce`: every experiment, then `docs/results.md`, its figures and plots."""

from __future__ import annotations

from jobs import stage
from jobs.reproduce.run import run

if __name__ == "__main__":
    stage.main(run, __doc__, config="reproduce.yaml", other_models=True)
