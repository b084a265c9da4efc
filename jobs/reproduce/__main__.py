"""`python -m jobs.reproduce`: every experiment, then `results.md`, its figures and plots.

`--config jobs/configs/reproduce_small.yaml` asks what mmrag:small does for people; it needs
`python -m jobs.fetch_voices` and, below MMRAG_CORPUS, texts and recordings (docs/models.md).
"""

from __future__ import annotations

from jobs import stage
from jobs.reproduce.quick import quick
from jobs.reproduce.run import run

if __name__ == "__main__":
    stage.main(run, __doc__, config="reproduce.yaml", other_models=True, quick=quick)
