"""What grows with the corpus, and what must not: memory, seconds and bytes at 1x, 10x and 100x.

A part is a function in PARTS: it makes its own simulated input below the directory it is given, and
returns rows, each a figure at every size with how it should grow. Whether it does is worked out
here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.benchmark import busy, drivers, simulated
from jobs.benchmark import grids as tables
from jobs.benchmark.grids import Grid, power
from jobs.benchmark.loaded import MB, Loading
from jobs.benchmark.process import LOADED, Process
from jobs.benchmark.progress import Progress
from jobs.benchmark.repeats import exponent
from jobs.benchmark.targets import Target
from mmrag.config import Train

Growth = Literal["flat", "linear"]
FLAT, LINEAR = 0.2, 1.15
"""Exponents up to which a figure counts as growing not at all, and as its size."""
SEED = 1
EPOCHS = 3
WORKERS = 32
"""That share each step, one of which is measured."""
REPEATS = 3
"""Processes that resume, of which the quickest counts: what else the machine does is no matter."""
NOTHING_MB = 100.0
"""Megabytes that a process takes for its libraries, whatever it runs over."""
SPARE = 2.0
"""Free disk over what a corpus takes, so that nobody else runs out of it."""
TRAIN = {
    "micro_batch_tokens": 16_384,
    "micro_batches": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "clip": 1.0,
    "ctc_weight": 0.5,
    "unit_dropout": 0.1,
    "precision": "auto",
    "zero_stage": 0,
    "checkpoint_steps": 1000,
    "log_steps": 1000,
    "max_failures": 0,
    "workers": {"count": 1, "num_cpus": 1},
}
MIXTURE = {"speech_first": 2, "text_first": 1, "speech": 1}


@dataclass(frozen=True)
class Sizes:
    """How large the corpora are."""

    utterances: int
    """Of the smallest; the others are ten times and a hundred times that."""
    quick: bool


FULL = Sizes(utterances=100_000, quick=False)
QUICK = Sizes(utterances=10_000, quick=True)
SCALES = (1, 10, 100)


@dataclass(frozen=True)
class Row:
    """A figure at every size."""

    part: str
    what: str
    unit: str
    sizes: Sequence[float]
    """What the corpora hold, in what the part counts."""
    values: Sequence[float]
    expected: Growth
    most: float | None = None
    """Largest value that is wanted, at the largest size."""
    negligible: float = 0.0
    """Values below this are as good as none: how they grow is of no matter."""

    @property
    def exponent(self) -> float | None:
        """The power of the size that the figure grows as; None of one size alone."""
        if len(self.sizes) < 2:
            return None
        least = max(self.negligible, 1e-9)
        return exponent(self.sizes, [max(value, least) for value in self.values])

    @property
    def grows(self) -> str:
        """`flat`, `linear`, or the power where it is more than that."""
        found = self.exponent
        if found is None:
            return "one size alone"
        limits = ((FLAT, "flat"), (LINEAR, "linear"))
        return next((word for most, word in limits if found <= most), power(found))

    @property
    def good(self) -> bool:
        """Whether it grows as it should, or less, to no more than is wanted."""
        allowed = {"flat": ("flat",), "linear": ("flat", "linear")}[self.expected]
        small = self.most is None or self.values[-1] <= self.most
        return small and (len(self.sizes) < 2 or self.grows in allowed)


Part = Callable[[Path, Sizes, Progress], tuple[list[Row], list[str]]]
"""Measures below a directory: its rows, and sentences about what they are of."""


def measure(directory: Path, sizes: Sizes) -> dict[str, Any]:
    """Every part, one after the other."""
    tell, rows, remarks = Progress(), [], []
    for name, part in PARTS.items():
        place = directory / name.replace(" ", "-")
        place.mkdir()
        found, said = part(place, sizes, tell)
        rows += found
        remarks += said
        shutil.rmtree(place)
    told = [{**asdict(row), "exponent": row.exponent, "grows": row.grows} for row in rows]
    for row, each in zip(rows, told, strict=True):
        each["good"] = row.good
    return {
        "quick": sizes.quick,
        "rows": told,
        "remarks": remarks,
        "scale.growth": {"good": sum(row.good for row in rows), "rows": len(rows)},
        "reasons": {},
    }


def training_data(directory: Path, sizes: Sizes, tell: Progress) -> tuple[list[Row], list[str]]:
    """One worker of a training, at a corpus's first step and where it goes on."""
    counts, said = _affordable(directory, [sizes.utterances * scale for scale in SCALES])
    known = simulated.vocabulary(directory / "vocabulary")
    found: list[dict[str, float]] = []
    for count in counts:
        tell(f"training data: {count:,} utterances, {count * simulated.UNITS_EACH:,} units")
        corpus = simulated.corpus(directory / "corpus", known, count)
        found.append(_loaded(corpus, directory / "vocabulary", count))
        latest = ", ".join(f"{name} {value:.3g}" for name, value in found[-1].items())
        tell(f"  {latest}")
        shutil.rmtree(corpus)
    units = [float(count * simulated.UNITS_EACH) for count in counts]

    def row(what: str, unit: str, name: str, expected: Growth, *limits: float | None) -> Row:
        return Row("training", what, unit, units, [one[name] for one in found], expected, *limits)

    return [
        row("private memory of a worker", "MB", "private_mb", "flat", 1000),
        row("the most while it lays an epoch out", "MB", "laying_out_mb", "linear", 1000),
        row("page cache it has touched", "MB", "shared_mb", "linear"),
        row("start: opened, an epoch laid out, a step made", "s", "start_s", "linear", 10),
        row("the processor's share of that", "s", "start_cpu_s", "linear", 10),
        row("resume in the middle", "s", "middle_s", "flat", 1, 0.2),
        row("resume at the last step", "s", "last_s", "flat", 1, 0.2),
        row("disk: the pack", "MB", "disk_mb", "linear"),
        row("disk: what is kept of the epochs", "MB", "epochs_mb", "linear", None, 2),
    ], [
        *said,
        f"Training data: one worker of {WORKERS} that share a step of {TRAIN['micro_batches']} "
        f"micro-batches of {TRAIN['micro_batch_tokens']:,} tokens, each time in a process of its "
        f"own; imports are not counted. Resuming: the quickest of {REPEATS}. Private memory has "
        "torch in it.",
    ]


def _affordable(directory: Path, counts: list[int]) -> tuple[list[int], list[str]]:
    """The corpora that the disk has room for, and what is to be said of the others."""
    free = shutil.disk_usage(directory).free
    most = int(free / (SPARE * (simulated.BYTES_EACH + 13 * EPOCHS)))
    fit = [count for count in counts if count <= most]
    if len(fit) == len(counts):
        return counts, []
    said = f"Training data: {free / 1e9:.0f} GB of disk are free, which is room for {most:,} of "
    return [*fit, most], [f"{said}{counts[-1]:,} utterances."]


def _loaded(corpus: Path, vocabulary: Path, utterances: int) -> dict[str, float]:
    """What one worker takes at the first step, in the middle, and at the last step."""
    tokens = utterances * (simulated.UNITS_EACH + simulated.PIECES_EACH)
    an_epoch = math.ceil(tokens / (TRAIN["micro_batch_tokens"] * TRAIN["micro_batches"]))
    steps = EPOCHS * an_epoch
    phase = {"name": "simulated", "steps": steps, "mixture": MIXTURE}
    settings = Train(**TRAIN, phases=[phase]).model_dump(mode="json")

    def ask(step: int, walk: int = 0) -> dict[str, float]:
        order = Loading(str(corpus), str(vocabulary), settings, SEED, step, WORKERS, walk)
        with Process(LOADED, order) as process:
            return process.result()

    pack = _bytes(corpus)
    start = ask(0)
    ask(steps - 1, max(1, an_epoch // 2))  # as the run that was stopped: it met every epoch
    middle, last = ([ask(step) for _ in range(REPEATS)] for step in (steps // 2, steps - 1))
    return {
        "start_s": start["seconds"],
        "start_cpu_s": start["cpu_seconds"],
        "laying_out_mb": start["peak_mb"],
        "middle_s": min(one["seconds"] for one in middle),
        "last_s": min(one["seconds"] for one in last),
        "private_mb": max(one["private_mb"] for one in (start, *middle, *last)),
        "shared_mb": max(one["shared_mb"] for one in (*middle, *last)),
        "disk_mb": pack / MB,
        "epochs_mb": (_bytes(corpus) - pack) / MB,
    }


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def encoders(directory: Path, sizes: Sizes, tell: Progress) -> tuple[list[Row], list[str]]:
    """How long a simulated encoder waits for clips while a corpus is tokenized."""
    hours = 1.0 if sizes.quick else 4.0
    found = busy.measure(directory, hours, tell=tell)
    rows = [
        Row(
            "encoder, seconds of audio",
            f"idle, {way}",
            "%",
            [3600 * hours],
            [100 * (1 - found[way].share)],
            "flat",
            most,
        )
        for way, most in (("separate", 10), ("fused", None))
    ]
    return rows, [
        f"Encoder: a simulated one of {busy.SPEED:g} times real time; separate has processes of "
        "their own for decoding and writing, as tokenize.operators: auto has for GPUs."
    ]


def driver_memory(directory: Path, sizes: Sizes, tell: Progress) -> tuple[list[Row], list[str]]:
    """What the process that runs a stage takes, over few utterances and over many."""
    counts = (2_000, 40_000) if sizes.quick else (10_000, 200_000)
    found = drivers.measure(directory, counts, tell=tell)
    rows = [
        Row(
            "driver, utterances",
            f"memory that {one.stage} takes",
            "MB",
            one.utterances,
            [each / MB for each in one.bytes],
            "flat",
            negligible=NOTHING_MB,
        )
        for one in found
    ]
    each = ", ".join(f"{one.stage} {one.bytes_an_utterance:.0f}" for one in found)
    return rows, [f"Driver: bytes by which it grows with an utterance: {each}."]


PARTS: dict[str, Part] = {
    "training data": training_data,
    "encoders": encoders,
    "driver memory": driver_memory,
}
TARGETS = {
    "scale.growth": Target(
        "figures that grow as they should, to no more than is wanted",
        "all",
        lambda found: found["good"] == found["rows"],
        lambda found: f"{found['good']} of {found['rows']}",
    )
}


def grids(results: Mapping[str, Any]) -> list[Grid]:
    """A table a part: its figures at every size."""
    made = []
    for part in dict.fromkeys(row["part"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["part"] == part]
        sizes = [f"{size:.3g}" for size in rows[0]["sizes"]]
        columns = (f"{part}, at a size of", *sizes, "grows", "wanted", "")
        told = [(_titled(row), *_values(row), row["grows"], *_wanted(row)) for row in rows]
        made.append(Grid(f"Scale: {part}", columns, told))
    return made


def _titled(row: Mapping[str, Any]) -> str:
    return f"{row['what']}, {row['unit']}"


def _values(row: Mapping[str, Any]) -> list[str]:
    return [f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in row["values"]]


def _wanted(row: Mapping[str, Any]) -> tuple[str, str]:
    limit = "" if row["most"] is None else f", ≤ {row['most']:g}"
    return f"{row['expected']}{limit}", "met" if row["good"] else "missed"


def remarks(results: Mapping[str, Any]) -> list[str]:
    """Sentences about what was measured."""
    quick = ["Quick: corpora of a tenth of the size."] * results["quick"]
    return [*quick, *results["remarks"]]


def show(results: Mapping[str, Any]) -> None:
    """Tables for people."""
    tables.show(grids(results), remarks(results), TARGETS, results)
