"""How fast training runs under Ray Train and DeepSpeed, beside bare loops of torch on the same
micro-batches.

The corpus is random: units and words that mean nothing, tokenized, in a temporary directory. The
loop is `cluster.train.fit` with one worker that has every core; its speed is what it writes into
`metrics.jsonl`, without the steps it begins with. The bare loops are `bare`; the faster of them
counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.connection import connection
from cluster.progress import records
from cluster.train import fit
from jobs.benchmark import grids as tables
from jobs.benchmark.bare import BareTraining
from jobs.benchmark.grids import Grid
from jobs.benchmark.machine import threads
from jobs.benchmark.process import BARE, Process
from jobs.benchmark.progress import Progress
from jobs.benchmark.repeats import at_least, ratio, spread, told
from mmrag.config import Experiment, read
from mmrag.model.lm import parameter_count
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.records import Units, Utterance
from mmrag.speech.tokenized import Tokenized, write_part

SEED = 1
RECIPE = Path(__file__).parents[1] / "configs" / "train_tiny.yaml"
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so")
OURS = "Ray Train + DeepSpeed"
TARGETS = {
    "train.vs_plain": at_least("tokens a second, over the faster of two bare loops of torch", 0.95)
}


@dataclass(frozen=True)
class Sizes:
    """What is trained on what, and how often."""

    lm: str
    """Overrides of the recipe: the model's shape."""
    pieces: int
    units: int
    utterances: int
    unit_counts: tuple[int, int]
    """Units of the shortest and of the longest utterance."""
    micro_batch_tokens: int
    micro_batches: int
    steps: int
    skipped: int
    """Steps of each run that are not counted."""
    repeats: int
    quick: bool


FULL = Sizes(
    lm="{width: 640, layers: 10, heads: 10, kv_heads: 10, feed_forward: 1728, tied: true}",
    pieces=2000,
    units=2000,
    utterances=400,
    unit_counts=(50, 400),
    micro_batch_tokens=1024,
    micro_batches=8,
    steps=4,
    skipped=1,
    repeats=3,
    quick=False,
)
QUICK = Sizes(
    lm="{width: 64, layers: 2, heads: 2, kv_heads: 2, feed_forward: 128, tied: true}",
    pieces=100,
    units=50,
    utterances=40,
    unit_counts=(20, 60),
    micro_batch_tokens=500,
    micro_batches=2,
    steps=12,
    skipped=4,
    repeats=1,
    quick=True,
)


def measure(directory: Path, sizes: Sizes) -> dict[str, Any]:
    """Everything, below `directory`."""
    tell = Progress()
    tell("a corpus of nothing")
    vocabulary, split = _corpus(directory, sizes)
    experiment = _experiment(directory, sizes)
    order = BareTraining(experiment.model_dump(mode="json"), str(split), str(directory), threads())
    speeds: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    with connection():
        for repeat in range(sizes.repeats):
            with Process(BARE, order) as process:
                ways = process.result()
            place = directory / f"run-{repeat}"
            place.mkdir()
            vocabulary.save(place)
            fit(experiment, [split], place, lambda _: None)
            ways[OURS] = [
                {**one, "seconds": one["tokens"] / one["tokens_per_second"]}
                for one in records(place)
            ]
            for way, steps in ways.items():
                speeds.setdefault(way, []).append(_speed(steps[sizes.skipped :]))
                losses[way] = steps[-1]["loss"]
            latest = ", ".join(f"{way} {each[-1]:,.0f}" for way, each in speeds.items())
            tell(f"  {repeat + 1} of {sizes.repeats}: tokens a second: {latest}")
    bare = [way for way in speeds if way != OURS]
    faster = max(bare, key=lambda way: np.median(speeds[way]))
    return {
        "quick": sizes.quick,
        "parameters": parameter_count(experiment.lm, vocabulary.size),
        "precision": experiment.train.precision,
        "steps": {"run": sizes.steps, "skipped": sizes.skipped},
        "tokens_per_second": {way: spread(each) for way, each in speeds.items()},
        "last_loss": losses,
        "train.vs_plain": ratio(speeds[OURS], speeds[faster]),
        "train.vs_plain_each": {way: ratio(speeds[OURS], speeds[way]) for way in bare},
        "reasons": {},
    }


def _corpus(directory: Path, sizes: Sizes) -> tuple[Vocabulary, Path]:
    """A vocabulary, and a tokenized split of random utterances; both below `directory`."""
    random = np.random.default_rng(SEED)
    words = ["".join(random.choice(SYLLABLES, random.integers(1, 5))) for _ in range(3000)]
    said = []
    for number in range(sizes.utterances):
        units = _units(random, int(random.integers(*sizes.unit_counts)), sizes.units)
        text = " ".join(random.choice(words, max(1, len(units) // 12)))
        name = f"{number:05d}"
        said.append(Tokenized(Utterance(id=name, text=text, document=name), units))
    split = directory / "random"
    split.mkdir()
    write_part(split / "part-00000.parquet", said)
    texts = (one.utterance.text for one in said)
    vocabulary = Vocabulary(SentencePieces.train(texts, sizes.pieces), sizes.units)
    vocabulary.save(directory)
    return vocabulary, split


def _units(random: np.random.Generator, count: int, codebook: int) -> Units:
    """So many, no two neighbours equal."""
    ids = np.cumsum(random.integers(1, codebook, count)) % codebook
    return Units(ids.astype(np.int32), random.integers(1, 4, count).astype(np.int32))


def _experiment(directory: Path, sizes: Sizes) -> Experiment:
    """The recipe of the package's own tiny model, but for the shape and the length."""
    phase = f"{{name: random, steps: {sizes.steps}, mixture: {{speech_first: 1}}}}"
    overrides = [
        f"workspace={directory / 'workspace'}",
        f"seed={SEED}",
        f"lm={sizes.lm}",
        f"train.phases=[{phase}]",
        f"train.micro_batch_tokens={sizes.micro_batch_tokens}",
        f"train.micro_batches={sizes.micro_batches}",
        "train.warmup_steps=1",
        f"train.checkpoint_steps={sizes.steps}",
        f"train.workers={{count: 1, num_cpus: {threads()}, num_gpus: 0}}",
    ]
    return read(RECIPE, overrides)


def _speed(steps: Sequence[Mapping[str, float]]) -> float:
    """Tokens a second over several steps."""
    return sum(one["tokens"] for one in steps) / sum(one["seconds"] for one in steps)


def grids(results: Mapping[str, Any]) -> list[Grid]:
    """What was measured beside the target."""
    ratios = results["train.vs_plain_each"]
    rows = [
        (
            way,
            told(speed, "{:,.0f}"),
            told(ratios[way]) if way in ratios else "",
            f"{results['last_loss'][way]:.3f}",
        )
        for way, speed in results["tokens_per_second"].items()
    ]
    columns = ("", "tokens a second", f"{OURS} is", "last loss")
    return [Grid(f"{results['parameters'] / 1e6:.1f} M parameters, one process", columns, rows)]


def remarks(results: Mapping[str, Any]) -> list[str]:
    """Sentences about what was measured."""
    small = ["Quick: a tiny model, for which the target is not meant."] * results["quick"]
    run, skipped = results["steps"]["run"], results["steps"]["skipped"]
    return [
        *small,
        "The bare loops have neither Ray nor DeepSpeed, and find their micro-batches made.",
        f"Precision {results['precision']}; {run} steps a run, the first {skipped} not counted.",
    ]


def show(results: Mapping[str, Any]) -> None:
    """Tables for people."""
    tables.show(grids(results), remarks(results), TARGETS, results)
