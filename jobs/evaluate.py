"""A split transcribed in each mode: word error rates, entity recall, retrieval recall, speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cluster import modes
from cluster.modes import PhraseLists
from cluster.placement import Demand, require
from cluster.shards import SHARD_CPUS, serve_shards
from cluster.stages import TranscribedUtterance, transcribe_modes
from cluster.tracking import Run
from jobs import stage
from jobs.tune import heard_by, select
from mmrag.artifact import Artifact, Draft, load, nothing, write_json
from mmrag.config import (
    KNN,
    ConfigError,
    Experiment,
    RetrievalMode,
    RetrievedAttention,
    as_dict,
    recipe,
)
from mmrag.decoding import tune
from mmrag.records import Retriever
from mmrag.retrieval import phrases
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import saved_shards
from mmrag.score import (
    Comparison,
    EntityScore,
    ErrorRate,
    Recall,
    character_error_rate,
    compare,
    score_entities,
    word_error_rate,
)
from mmrag.speech.tokenized import Tokenized


@dataclass(frozen=True)
class EvaluationMode:
    """A way to transcribe: without retrieval, or with one datastore and its settings."""

    name: RetrievalMode
    datastore: str | None = None
    artifact: Artifact | None = None
    knn: KNN | None = None
    attention: RetrievedAttention | None = None

    @property
    def title(self) -> str:
        """For tables and plots."""
        return "no retrieval" if self.datastore is None else f"{self.spoken_name}: {self.datastore}"

    @property
    def spoken_name(self) -> str:
        """The mode without the underscore."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Result:
    """The transcripts of one way, scored."""

    way: EvaluationMode
    heard: list[TranscribedUtterance]
    words: ErrorRate
    characters: ErrorRate
    entities: EntityScore
    recall: Recall

    @property
    def row(self) -> dict[str, Any]:
        """The result as plain values; what does not apply is None."""
        return {
            "mode": self.way.name,
            "datastore": self.way.datastore,
            "entries": self.way.artifact.summary["entries"] if self.way.artifact else None,
            "knn": as_dict(self.way.knn) if self.way.knn else None,
            "attention": as_dict(self.way.attention) if self.way.attention else None,
            "utterances": len(self.heard),
            "wer": self.words.rate,
            "wer_low": self.words.low,
            "wer_high": self.words.high,
            "substitutions": self.words.substitutions,
            "deletions": self.words.deletions,
            "insertions": self.words.insertions,
            "words": self.words.reference,
            "cer": self.characters.rate,
            **self.entities.row,
            "recall_at_k": self.recall.rate,
            "seconds_of_audio": sum(one.seconds for one in self.heard),
            "decode_seconds": sum(one.decode_seconds for one in self.heard),
        }


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `evaluation/`: results as JSON, Markdown and a plot, and every transcript."""
    settings = experiment.evaluate
    lm = stage.load(experiment, "lm", "lm", "train")
    made = heard_by(experiment, lm)
    ways = _ways(experiment, lm)
    inputs = {"tokens": made, "lm": lm}
    inputs |= {f"datastore {way.datastore}": way.artifact for way in ways if way.artifact}
    if any(way.attention for way in ways):
        inputs["adapter"] = stage.load(experiment, "adapter", "adapter", "train")
        inputs["adapter"].require("lm", lm)
    config = recipe(
        {
            "evaluate": settings,
            "decode": experiment.decode,
            "knn": {way.title: as_dict(way.knn) for way in ways if way.knn},
            "attention": {way.title: as_dict(way.attention) for way in ways if way.attention},
        }
    )

    def work(draft: Draft, tracked: Run) -> None:
        spoken = select(made, settings.split, settings.domain)
        results = _transcribe(experiment, ways, spoken)
        compared = _compare(results, settings.resamples, experiment.seed)
        write(draft.path, results, compared, settings.split, settings.domain)
        for result in results:
            way = result.way
            name = f"{way.name}.{way.datastore}" if way.datastore else way.name
            row = result.row
            tracked.log({f"{key}.{name}": row[key] for key in _METRICS})
        for file in sorted(draft.path.iterdir()):
            if not file.name.startswith("."):
                tracked.file(file)
        draft.summary["utterances"] = len(spoken)

    evaluated = stage.make(
        experiment,
        "evaluation",
        "evaluation",
        config,
        inputs,
        work,
        holds=nothing,
        force=force,
    )
    show(evaluated)
    return evaluated


_METRICS = (
    *("wer", "wer_low", "wer_high", "cer", "entity_recall", "entity_precision", "entity_f1"),
    *("entity_wer", "other_wer", "recall_at_k", "decode_seconds"),
)


def _ways(experiment: Experiment, lm: Artifact) -> list[EvaluationMode]:
    ways = []
    for name in experiment.evaluate.modes:
        if name == "none":
            ways.append(EvaluationMode(name))
            continue
        for datastore in experiment.evaluate.datastores:
            made = stage.load(experiment, f"datastores/{datastore}", "datastore", "build_datastore")
            made.require("lm", lm)
            silent = Datastore.open(made.path).description.audio == "none"
            if name == "knn" or not silent:  # the adapter reads what was heard
                knn, read = _settings(experiment, made, name)
                ways.append(EvaluationMode(name, datastore, made, knn, read))
    if not ways:
        raise ConfigError(
            f"evaluate: nothing to do in modes {list(experiment.evaluate.modes)} with datastores "
            f"{list(experiment.evaluate.datastores)}; what nobody spoke is only used in mode knn"
        )
    return ways


def _settings(
    experiment: Experiment, datastore: Artifact, mode: RetrievalMode
) -> tuple[KNN | None, RetrievedAttention | None]:
    """What `jobs.tune` chose for this very datastore; where it has not run, `knn` and `read`."""
    path = experiment.workspace / "tuned" / datastore.path.name
    tuned = path.exists()
    if tuned:
        load(path, "tuned").require("datastore", datastore)
    knn = read = None
    if mode in ("cross_attention", "both"):
        read = (tune.chosen_attention(path) if tuned else None) or experiment.attention
    if mode == "knn":
        knn = tune.chosen(path) if tuned else experiment.knn
    elif mode == "both":
        known = tuned and (path / tune.BOTH).exists()
        knn = tune.chosen(path, tune.BOTH) if known else experiment.knn
    return knn, read


def _transcribe(
    experiment: Experiment, ways: Sequence[EvaluationMode], spoken: Sequence[Tokenized]
) -> list[Result]:
    settings = experiment.evaluate
    require(Demand.of("evaluate.workers", settings.workers, count=1), *_shards(experiment, ways))
    with ExitStack() as serving:
        heard = transcribe_modes(
            experiment.workspace,
            experiment.decode,
            {way.title: _mode(experiment, way, serving) for way in ways},
            spoken,
            settings.workers,
        )
    return [_score(way, heard[way.title], settings.resamples, experiment.seed) for way in ways]


def _shards(experiment: Experiment, ways: Sequence[EvaluationMode]) -> list[Demand]:
    """The shard actors that stand beside the workers."""
    settings = experiment.evaluate
    count = sum(len(saved_shards(way.artifact.path)) for way in ways if way.artifact is not None)
    if settings.retriever != "sharded" or not count:
        return []
    actors = count * settings.replicas
    return [
        Demand(SHARD_CPUS, actors, settings.shard_cpus, lower=f"{SHARD_CPUS} or evaluate.replicas")
    ]


def _mode(experiment: Experiment, way: EvaluationMode, serving: ExitStack) -> modes.Mode:
    """What a worker opens; `serving` stops the actors behind it."""
    settings = experiment.evaluate
    if way.artifact is None:
        return modes.NoRetrieval()
    if settings.lists:
        tokens = experiment.workspace / experiment.tokenize.name
        lists = phrases.read_lists(tokens / phrases.LISTS)
        return modes.phrase_mode(way.artifact.path, way.knn, way.attention, lists)
    source: Retriever | Path = way.artifact.path
    if settings.retriever == "sharded":
        source = serve_shards(way.artifact.path, settings.replicas, settings.shard_cpus)
        serving.callback(source.close)
    return modes.retrieval_mode(source, way.knn, way.attention)


def _score(
    way: EvaluationMode,
    heard: list[TranscribedUtterance],
    resamples: int,
    seed: int,
    lists: PhraseLists | None = None,
) -> Result:
    """`lists`, where each utterance comes with its own phrases: what may be heard in vain."""
    candidates = None if lists is None else [lists[one.utterance] for one in heard]
    own = [one.entities for one in heard]
    references, texts = [one.reference for one in heard], [one.text for one in heard]
    score = {"resamples": resamples, "seed": seed}
    return Result(
        way=way,
        heard=heard,
        words=word_error_rate(references, texts, **score),
        characters=character_error_rate(references, texts, **score),
        entities=score_entities(references, texts, own, candidates, **score),
        recall=Recall(sum(one.recalled for one in heard), sum(one.queries for one in heard)),
    )


def _compare(results: Sequence[Result], resamples: int, seed: int) -> list[Comparison]:
    """Every pair of ways; each has heard the same utterances in the same order."""
    systems = {result.way.title: [one.text for one in result.heard] for result in results}
    return compare([one.reference for one in results[0].heard], systems, resamples, seed)


def write(
    directory: Path,
    results: Sequence[Result],
    comparisons: Sequence[Comparison],
    split: str,
    domain: str | None,
) -> None:
    """`results.json`, `results.md`, `wer.png`, and `transcripts.jsonl` with all of them."""
    rows = [result.row for result in results]
    speakers = [_by_speaker(result) for result in results]
    write_json(
        directory / "results.json",
        {
            "split": split,
            "domain": domain,
            "rows": rows,
            "speakers": speakers,
            "comparisons": [asdict(one) for one in comparisons],
        },
    )
    lines = [
        f"# {split} split{f', {domain} domain' if domain else ''}: "
        f"{rows[0]['utterances']} utterances, {rows[0]['words']} words",
        "",
        *_markdown([HEADER, *map(cells, rows)]),
        "",
        *_entities_in_markdown(rows),
        *_comparisons_in_markdown(comparisons),
        "Word error rate by voice:",
        "",
        *_markdown(
            [
                ["voice", *(result.way.title for result in results)],
                *(
                    [voice, *(f"{by[voice]['wer']:.1%}" for by in speakers)]
                    for voice in speakers[0]
                ),
            ]
        ),
    ]
    (directory / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (directory / "transcripts.jsonl").open("w", encoding="utf-8") as stream:
        for result in results:
            for one in result.heard:
                fields = {
                    "mode": result.way.name,
                    "datastore": result.way.datastore,
                    **asdict(one),
                }
                stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
    _plot(directory / "wer.png", results)


HEADER = [
    "mode",
    "WER",
    "95 % interval",
    "sub / del / ins",
    "CER",
    "entity recall",
    "recall@k",
    "× real time",
]


ENTITY_HEADER = [
    "entities",
    "recall",
    "precision",
    "F1",
    "WER, their words",
    "95 % interval",
    "sub / del / ins",
    "WER, other words",
    "95 % interval",
    "sub / del / ins",
]
COMPARISON_HEADER = ["a", "b", "WER of a − b, points", "95 % interval", "p", "p, Holm"]


def cells(row: dict[str, Any]) -> list[str]:
    """A row of `results.json` under `HEADER`."""
    return [
        _title(row),
        *_rate(row),
        _share(row["cer"]),
        _share(row["entity_recall"]),
        _share(row["recall_at_k"]),
        f"{row['decode_seconds'] / row['seconds_of_audio']:.3f}",
    ]


def entity_cells(row: dict[str, Any]) -> list[str]:
    """A row of `results.json` under `ENTITY_HEADER`; – for what an older one does not say."""
    detected = (row.get(f"entity_{name}") for name in ("recall", "precision", "f1"))
    return [_title(row), *map(_share, detected), *_rate(row, "entity_"), *_rate(row, "other_")]


def comparison_cells(comparison: dict[str, Any]) -> list[str]:
    """An element of `comparisons` under `COMPARISON_HEADER`."""
    difference = {name: 100 * value for name, value in comparison["difference"].items()}
    return [
        comparison["a"],
        comparison["b"],
        f"{difference['delta']:+.1f}",
        f"{difference['low']:+.1f} to {difference['high']:+.1f}",
        *(f"{comparison[name]:.4f}" for name in ("p", "p_holm")),
    ]


def _title(row: dict[str, Any]) -> str:
    if row["datastore"] is None:
        return "no retrieval"
    return f"{row['mode'].replace('_', ' ')}: {row['datastore']}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _rate(row: dict[str, Any], of: str = "") -> list[str]:
    """A word error rate, its interval, and its counts."""
    if row.get(f"{of}wer") is None:
        return ["–"] * 3
    counts = (row[f"{of}{kind}"] for kind in ("substitutions", "deletions", "insertions"))
    return [
        _share(row[f"{of}wer"]),
        f"{100 * row[f'{of}wer_low']:.1f}–{row[f'{of}wer_high']:.1%}",
        " / ".join(map(str, counts)),
    ]


def _entities_in_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the modes do to entities; nothing where there are none."""
    if not rows[0]["entities"]:
        return []
    return [
        f"{rows[0]['entities']} entities. One is hypothesised where its words stand in a "
        "transcript one after the other; candidates are the utterance's own entities and its list "
        "of phrases, or without lists the entities of all utterances here. Their words and the "
        "others add up to the word error rate above; an inserted word is an entity's if it is a "
        "word of one of the utterance's own.",
        "",
        *_markdown([ENTITY_HEADER, *map(entity_cells, rows)]),
        "",
    ]


def _comparisons_in_markdown(comparisons: Sequence[Comparison]) -> list[str]:
    """Every pair of modes; nothing where there is one mode."""
    if not comparisons:
        return []
    return [
        "Differences in word error rate on the same utterances; below zero a is better. Intervals "
        "are paired bootstraps of each pair alone, uncorrected; p is a paired permutation test "
        f"over utterances, and p, Holm corrects it for the {len(comparisons)} pairs of this table.",
        "",
        *_markdown([COMPARISON_HEADER, *(comparison_cells(asdict(one)) for one in comparisons)]),
        "",
    ]


def show(evaluation: Artifact) -> None:
    """Print the tables of a finished evaluation."""
    results = json.loads((evaluation.path / "results.json").read_text(encoding="utf-8"))
    rows, comparisons = results["rows"], results.get("comparisons", ())  # an older one has none
    title = (
        f"{results['split']} split, {results['domain'] or 'every'} domain: "
        f"{rows[0]['utterances']} utterances"
    )
    _print(title, HEADER, [cells(row) for row in rows])
    if any(row.get("entity_precision") is not None for row in rows):
        kept = [n for n, name in enumerate(ENTITY_HEADER) if name != "sub / del / ins"]
        shown = [[entity_cells(row)[n] for n in kept] for row in rows]
        _print("Entities", [ENTITY_HEADER[n] for n in kept], shown)
    if comparisons:
        title = "Differences (intervals uncorrected; p of a paired permutation test)"
        _print(title, COMPARISON_HEADER, [comparison_cells(one) for one in comparisons])


def _print(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in header:
        words = name in (header[0], "b")
        table.add_column(name, justify="left" if words else "right", no_wrap=words)
    for line in lines:
        table.add_row(*line)
    stage.console.print(table)


def _by_speaker(result: Result) -> dict[str, dict[str, Any]]:
    voices = sorted({one.speaker for one in result.heard})
    rates = {}
    for voice in voices:
        own = [one for one in result.heard if one.speaker == voice]
        rate = word_error_rate([o.reference for o in own], [o.text for o in own], resamples=1)
        rates[voice] = {"utterances": len(own), "wer": rate.rate}
    return rates


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "| --- |" + " ---: |" * (len(rows[0]) - 1)
    return [lines[0], rule, *lines[1:]]


def _plot(path: Path, results: Sequence[Result]) -> None:
    """A bar for each mode's WER, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.6 * len(results), 4), layout="constrained")
    axes = figure.subplots()
    rates = [100 * result.words.rate for result in results]
    below = [100 * (r.words.rate - r.words.low) for r in results]
    above = [100 * (r.words.high - r.words.rate) for r in results]
    bars = axes.bar(
        [result.way.title for result in results],
        rates,
        yerr=(below, above),
        color=["#9aa5b1", *["#2f6db3"] * (len(results) - 1)],
        capsize=4,
        width=0.6,
    )
    axes.bar_label(bars, fmt="%.1f %%", padding=4, label_type="center", color="white")
    axes.set_ylabel("word error rate, %")
    axes.set_title("Lower is better; whiskers are 95 % intervals", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    stage.main(run, __doc__)
