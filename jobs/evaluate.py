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
from cluster.placement import Demand, require
from cluster.shards import SHARD_CPUS, serve_shards
from cluster.stages import TranscribedUtterance, transcribe_modes
from cluster.tracking import Run
from jobs import stage
from jobs.tune import heard_by, select
from mmrag.artifact import Artifact, Draft, load, write_json
from mmrag.config import KNN, ConfigError, Experiment, RetrievalMode, RetrievedAttention, as_dict
from mmrag.decoding import tune
from mmrag.records import Retriever
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import saved_shards
from mmrag.score import ErrorRate, Recall, character_error_rate, entity_recall, word_error_rate
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
    entities: Recall
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
            "entity_recall": self.entities.rate,
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
    config = {
        "evaluate": as_dict(settings),
        "decode": as_dict(experiment.decode),
        "knn": {way.title: as_dict(way.knn) for way in ways if way.knn},
        "attention": {way.title: as_dict(way.attention) for way in ways if way.attention},
    }

    def work(draft: Draft, tracked: Run) -> None:
        spoken = select(made, settings.split, settings.domain)
        results = _transcribe(experiment, ways, spoken)
        write(draft.path, results, settings.split, settings.domain)
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
        experiment, "evaluation", "evaluation", config, inputs, work, force=force
    )
    show(evaluated)
    return evaluated


_METRICS = ("wer", "wer_low", "wer_high", "cer", "entity_recall", "recall_at_k", "decode_seconds")


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
    source: Retriever | Path = way.artifact.path
    if settings.retriever == "sharded":
        source = serve_shards(way.artifact.path, settings.replicas, settings.shard_cpus)
        serving.callback(source.close)
    return modes.retrieval_mode(source, way.knn, way.attention)


def _score(
    way: EvaluationMode, heard: list[TranscribedUtterance], resamples: int, seed: int
) -> Result:
    references, texts = [one.reference for one in heard], [one.text for one in heard]
    score = {"resamples": resamples, "seed": seed}
    return Result(
        way=way,
        heard=heard,
        words=word_error_rate(references, texts, **score),
        characters=character_error_rate(references, texts, **score),
        entities=entity_recall([one.entities for one in heard], texts),
        recall=Recall(sum(one.recalled for one in heard), sum(one.queries for one in heard)),
    )


def write(directory: Path, results: Sequence[Result], split: str, domain: str | None) -> None:
    """`results.json`, `results.md`, `wer.png`, and `transcripts.jsonl` with all of them."""
    rows = [result.row for result in results]
    speakers = [_by_speaker(result) for result in results]
    write_json(
        directory / "results.json",
        {"split": split, "domain": domain, "rows": rows, "speakers": speakers},
    )
    lines = [
        f"# {split} split{f', {domain} domain' if domain else ''}: "
        f"{rows[0]['utterances']} utterances, {rows[0]['words']} words",
        "",
        *_markdown([HEADER, *map(cells, rows)]),
        "",
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
    (directory / "results.md").write_text("\n".join(lines) + "\n")
    with (directory / "transcripts.jsonl").open("w") as stream:
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


def cells(row: dict[str, Any]) -> list[str]:
    """A row of `results.json` under `HEADER`."""

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    return [
        "no retrieval"
        if row["datastore"] is None
        else f"{row['mode'].replace('_', ' ')}: {row['datastore']}",
        share(row["wer"]),
        f"{100 * row['wer_low']:.1f}–{row['wer_high']:.1%}",
        f"{row['substitutions']} / {row['deletions']} / {row['insertions']}",
        share(row["cer"]),
        share(row["entity_recall"]),
        share(row["recall_at_k"]),
        f"{row['decode_seconds'] / row['seconds_of_audio']:.3f}",
    ]


def show(evaluation: Artifact) -> None:
    """Print the table of a finished evaluation."""
    results = json.loads((evaluation.path / "results.json").read_text())
    table = Table(
        title=f"{results['split']} split, {results['domain'] or 'every'} domain: "
        f"{results['rows'][0]['utterances']} utterances",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in results["rows"]:
        table.add_row(*cells(row))
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
