"""An evaluation as people read it: Markdown, a plot, tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from jobs import stage
from mmrag.artifact import Artifact, write_json
from mmrag.score import Comparison

if TYPE_CHECKING:
    from jobs.evaluate import Result


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
    return {
        voice: {"utterances": utterances, "wer": errors.rate}
        for voice, (utterances, errors) in result.speakers.items()
    }


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
