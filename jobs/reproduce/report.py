"""The results page: tables, plots and a comparison with the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from jobs import stage
from jobs.reproduce.lab import OWN
from mmrag.artifact import write_json
from mmrag.config import Experiment
from mmrag.score import paired_difference

Row = Mapping[str, Any]
Transcripts = Mapping[tuple[str, str, str], tuple[str, str]]
"""(task, point, utterance) -> (reference, transcript)."""

DETECTED = "speech detector on"
TITLES = {
    "everyday": "Everyday sentences",
    "domain": "Domain adaptation",
    "paired_share": "Little paired audio",
    "dynamic_context": "Dynamic context",
    "wrong_datastore": "The wrong datastore",
    "size": "Size of the datastore",
    "window": "Overlap of the windows",
    "key_encoder": "Two levels, and who encodes the first",
    "robustness": "Other recordings",
    "spoken_squad": "Spoken-SQuAD in voices of ours",
    "sentences": "Real sentences",
    "people": "People",
    "no_speech": "Nobody speaks",
}
MODEL = "model"
"""The column that says whose a row is, where there are several."""
HEADER = (
    MODEL,
    "mode",
    "datastore",
    "phrases",
    "entries",
    "setting",
    "utterances",
    "WER",
    "95 % interval",
    "entity recall",
    "entity precision",
    "entity F1",
    "WER, entity words",
    "WER, other words",
    "recall@k",
    "× real time",
    "keys, MB",
    "no words",
)


TARGETED = {"everyday", "domain", "dynamic_context", "wrong_datastore"}
"""Tasks that there are targets for."""
TOLD = ("domain", "dynamic_context", "wrong_datastore")
"""Tasks in which the decoder is told something, right or wrong."""
DETECTION = ("entity precision", "entity F1", "WER, entity words", "WER, other words")
"""Columns that the rows of older versions do not fill."""
ONLY_WRITTEN = ("utterances", "keys, MB", *DETECTION)
SUMMARY_COLUMNS = ("utterances", "WER", "95 % interval", "entity recall", *DETECTION, "recall@k")
SUMMARY = {
    "everyday sentences, no retrieval": ("everyday", "none", None, None),
    "unseen names, no retrieval": ("domain", "none", None, None),
    "unseen names, kNN-LM, datastore of text": ("domain", "knn", "text", None),
    "unseen names, kNN-LM, the text spoken by a synthesizer": ("domain", "knn", "spoken", None),
    "unseen names, kNN-LM, multi-modal datastore": ("domain", "knn", "multimodal", None),
    "unseen names, cross-attention, multi-modal datastore": (
        *("domain", "cross_attention", "multimodal", None),
    ),
    "unseen names, both": ("domain", "both", "multimodal", None),
    "100 phrases a request, in the prompt": ("dynamic_context", "prompt", None, 100),
    "100 phrases a request, boosted": ("dynamic_context", "boost", None, 100),
    "100 phrases a request, kNN-LM": ("dynamic_context", "knn", "spoken", 100),
    "100 phrases a request, cross-attention": (
        *("dynamic_context", "cross_attention", "spoken", 100),
    ),
    "100 phrases a request, both": ("dynamic_context", "both", "spoken", 100),
}
"""The rows that tell the story: title -> (task, mode, datastore, phrases)."""


ENTITY_NOTE = (
    "An entity is hypothesised where its words stand in a transcript one after the other; it may",
    "be one of the utterance or of its list of phrases, or without a list of the test split. An",
    "inserted word is an entity's if it is a word of one of the utterance's own.",
)
TOLD_NOTE = (
    "Inserted words, and words that retrieval put there and nobody said, for each word of the",
    "references; transcripts in which a run of words stands four times in a row.",
)


def own_rows(rows: Sequence[Row]) -> list[Row]:
    """Those of our own models, or where there are none, all of them."""
    return [row for row in rows if row.get("model", OWN) == OWN] or list(rows)


def summary(rows: Sequence[Row]) -> list[str]:
    """The rows of SUMMARY that were measured, as a Markdown table."""
    found = {}
    for family in dict.fromkeys(row.get("model", OWN) for row in rows):
        own = [row for row in rows if row.get("model", OWN) == family]
        measured = {(r["task"], r["mode"], r["datastore"], r["phrases"]): r for r in own}
        before = "" if family == OWN else f"{family}: "
        found |= {
            before + title: measured[about] for title, about in SUMMARY.items() if about in measured
        }
    without = [name for name in HEADER if name not in SUMMARY_COLUMNS]
    header, *cells = _table([*found.values()], without)
    return markdown(
        [("", *header), *((title, *row) for title, row in zip(found, cells, strict=True))]
    )


def write(
    experiment: Experiment, rows: Sequence[Row], heard: Transcripts, notes: Mapping[str, str]
) -> None:
    """`results.md`, `results.json` and the plots into `reproduce.docs`."""
    docs = experiment.reproduce.docs
    docs.mkdir(parents=True, exist_ok=True)
    write_json(docs / "results.json", list(rows))
    lines = [
        "# Results",
        "",
        "Made by `python -m jobs.reproduce`; the same figures are in",
        "[results.json](results.json). Voices and entities of the test split are in no training",
        "data, and whatever is tuned is tuned on the dev split. Intervals are 95 % bootstraps",
        "over utterances. Earlier versions of the method were scored on the same test split, and",
        "what they showed (a rule for certain models, entries of phrases, a decoy for tuning) went",
        "into this one: these figures are not a first look. Time is decoding alone, on one core",
        "of a machine that may have had other work; keys are what a flat index holds in memory.",
        *_beside(docs),
        *(ENTITY_NOTE if any(row.get("entity_f1") is not None for row in rows) else ()),
        "",
        *summary(rows),
        "",
    ]
    ours = own_rows(rows)
    if {row["task"] for row in ours} >= TARGETED and ours[0].get("model", OWN) == OWN:
        targets = [("target", "wanted", "measured", "reached"), *_targets(ours, heard)]
        lines += ["## Targets", "", *markdown(targets), ""]
    for task, note in notes.items():
        own = [row for row in rows if row["task"] == task]
        if not own:
            continue
        lines += [f"## {TITLES[task]}", "", note, "", *markdown(_table(own)), ""]
        if plot := PLOTS.get(task):
            plot(docs / f"{task}.png", own_rows(own))
            lines += [f"![{TITLES[task]}]({task}.png)", ""]
    if len(told := hallucinations(rows)) > 1:
        lines += ["## What nobody said", "", *TOLD_NOTE, "", *markdown(told), ""]
    (docs / "results.md").write_text("\n".join(lines), encoding="utf-8")


def _beside(docs: Path) -> list[str]:
    """Where results of other models lie: pages like this one, in folders beside it."""
    found = sorted(page.parent.name for page in docs.glob("*/results.md"))
    return [
        f"The same for a {name.title()}: [{name}/results.md]({name}/results.md)." for name in found
    ]


def show(rows: Sequence[Row]) -> None:
    """Print every task's table; what only the page has room for is left out."""
    for task in dict.fromkeys(row["task"] for row in rows):
        header, *cells = _table([row for row in rows if row["task"] == task], ONLY_WRITTEN)
        table = Table(title=TITLES[task], title_justify="left", box=box.SIMPLE, pad_edge=False)
        for name in header:
            words = name in HEADER[: HEADER.index("utterances")]
            table.add_column(name, justify="left" if words else "right", no_wrap=name != "setting")
        for row in cells:
            table.add_row(*row)
        stage.console.print(table)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first row is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]]


def _table(rows: Sequence[Row], without: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Header and cells of one task; columns in which nothing stands are left out."""
    cells = [_cells(row) for row in rows]
    filled = [i for i in range(len(HEADER)) if any(row[i] != "–" for row in cells)]
    if len({row.get("model") for row in rows}) == 1:
        filled = [i for i in filled if HEADER[i] != MODEL]
    kept = [i for i in filled if HEADER[i] not in without]
    return [tuple(row[i] for i in kept) for row in (HEADER, *cells)]


def _cells(row: Row) -> tuple[str, ...]:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    def told(value: object) -> str:
        return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    def with_interval(kind: str) -> str:
        if row.get(f"{kind}_wer") is None:
            return "–"
        low, high = row[f"{kind}_wer_low"], row[f"{kind}_wer_high"]
        return f"{row[f'{kind}_wer']:.1%} ({100 * low:.1f}–{high:.1%})"

    return (
        told(row.get("model")),
        row["mode"],
        told(row["datastore"]),
        told(row["phrases"]),
        told(row["entries"]),
        told(row["setting"]),
        told(row["utterances"]),
        share(row["wer"]),
        "–" if row["wer"] is None else f"{100 * row['wer_low']:.1f}–{row['wer_high']:.1%}",
        share(row["entity_recall"]),
        *(share(row.get(name)) for name in ("entity_precision", "entity_f1")),
        *(with_interval(kind) for kind in ("entity", "other")),
        share(row["recall_at_k"]),
        f"{row['decode_seconds'] / row['seconds_of_audio']:.3f}",
        "–" if row["keys_mb"] is None else f"{row['keys_mb']:.1f}",
        share(row.get("empty")),
    )


def hallucinations(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """How much the modes say that nobody said, where they were told the truth and where not."""
    kept = [row for row in rows if row["task"] in TOLD and row.get("inserted") is not None]
    first = 0 if len({row.get("model") for row in kept}) > 1 else 1
    header = ("task", *HEADER[first:4], "inserted", "copied, not said", "loops")
    return [
        header,
        *(
            (
                TITLES[row["task"]],
                *_cells(row)[first:4],
                *(f"{row[name]:.2%}" for name in ("inserted", "copied", "looped")),
            )
            for row in kept
        ),
    ]


def _targets(rows: Sequence[Row], heard: Transcripts) -> list[tuple[str, str, str, str]]:
    """Each target with what was measured, and whether it is reached."""

    def wer(task: str, mode: str, datastore: str | None = None, phrases: int | None = None):  # noqa: ANN202
        wanted = (task, mode, datastore, phrases)
        for row in rows:
            if (row["task"], row["mode"], row["datastore"], row["phrases"]) == wanted:
                return row["wer"]
        raise ValueError(f"the results lack {wanted}")

    plain, multimodal = wer("domain", "none"), wer("domain", "knn", "multimodal")
    text, spoken = wer("domain", "knn", "text"), wer("domain", "knn", "spoken")
    lower = 1 - multimodal / plain if plain else 0.0
    difference = _difference(rows, heard, "multimodal", "text")
    closed = (text - spoken) / (text - multimodal) if text > multimodal else float("nan")
    hundred = [wer("dynamic_context", "knn", "spoken", 100)] + [
        wer("dynamic_context", mode, None, 100) for mode in ("boost", "prompt")
    ]
    right, wrong = wer("wrong_datastore", "none"), wer("wrong_datastore", "knn", "wrong")
    everyday = wer("everyday", "none")
    return [
        ("WER of everyday sentences", "≤ 10 %", f"{everyday:.1%}", _reached(everyday <= 0.1)),
        (
            "WER with a multi-modal datastore against none",
            "≥ 50 % lower",
            f"{lower:.0%} lower ({plain:.1%} → {multimodal:.1%})",
            _reached(multimodal <= 0.5 * plain),
        ),
        (
            "multi-modal against text-only datastore",
            "lower, interval clear of zero",
            f"{100 * difference.delta:+.1f} points "
            f"({100 * difference.low:+.1f} to {100 * difference.high:+.1f})",
            _reached(difference.high < 0),
        ),
        (
            "datastore spoken from text alone: share of the gap between text-only and multi-modal",
            "≥ 80 %",
            f"{closed:.0%}",
            _reached(text - spoken >= 0.8 * (text - multimodal) > 0),
        ),
        (
            "kNN-LM, boosting, prompting with 100 phrases",
            "kNN-LM ahead",
            ", ".join(f"{rate:.1%}" for rate in hundred),
            _reached(hundred[0] < min(hundred[1:])),
        ),
        (
            "WER with the wrong datastore against none",
            "≤ 2 % worse",
            f"{wrong / right - 1:+.1%}" if right else f"{right:.1%} → {wrong:.1%}",
            _reached(wrong <= 1.02 * right),
        ),
        *(_attention_targets(rows) if any(r["mode"] == "cross_attention" for r in rows) else ()),
    ]


def _attention_targets(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """The targets of cross-attention."""
    by = {(r["task"], r["mode"], r["datastore"], r["phrases"]): r for r in rows}
    lists = {r["phrases"]: r for r in rows if r["mode"] == "cross_attention" and r["phrases"]}
    lists = {n: by["dynamic_context", "cross_attention", "spoken", n] for n in sorted(lists)}
    plain, hundred = by["dynamic_context", "none", None, None], lists[100]
    least, most = lists[min(lists)], lists[max(lists)]
    tasks = (("domain", "multimodal", None), ("dynamic_context", "spoken", 100))

    def rates(mode: str) -> list[float]:
        return [by[task, mode, store, count]["wer"] for task, store, count in tasks]

    knn, read, both = (rates(mode) for mode in ("knn", "cross_attention", "both"))
    right = by["wrong_datastore", "none", None, None]["wer"]
    told = {m: by["wrong_datastore", m, "wrong", None]["wer"] for m in ("cross_attention", "both")}
    time = [r["decode_seconds"] / r["seconds_of_audio"] for r in (hundred, plain)]
    silent = [r for r in rows if r["task"] == "no_speech" and r["setting"] == DETECTED]
    targets = [
        (
            "100 phrases: cross-attention against none",
            "≥ 50 % lower",
            f"{1 - hundred['wer'] / plain['wer']:.0%} lower",
            _reached(hundred["wer"] <= 0.5 * plain["wer"]),
        ),
        (
            "100 phrases: entity recall of cross-attention",
            "≥ 90 %",
            f"{hundred['entity_recall']:.1%}",
            _reached(hundred["entity_recall"] >= 0.9),
        ),
        (
            "cross-attention against kNN-LM, domain and 100 phrases",
            "ahead on both",
            ", ".join(f"{a:.1%} against {b:.1%}" for a, b in zip(read, knn, strict=True)),
            _reached(all(a < b for a, b in zip(read, knn, strict=True))),
        ),
        (
            "both against the better of the two, domain and 100 phrases",
            "at least as good",
            ", ".join(f"{a:.1%}" for a in both),
            _reached(all(c <= min(a, b) for a, b, c in zip(knn, read, both, strict=True))),
        ),
        (
            f"cross-attention with {max(lists)} phrases against {min(lists)}",
            "≤ 10 % worse",
            f"{most['wer'] / least['wer'] - 1:+.0%}",
            _reached(most["wer"] <= 1.1 * least["wer"]),
        ),
        (
            "the wrong datastore, cross-attention and both, against none",
            "≤ 1 % worse",
            ", ".join(f"{rate / right - 1:+.1%}" for rate in told.values()),
            _reached(all(rate <= 1.01 * right for rate in told.values())),
        ),
        (
            "decoding time with 100 phrases, cross-attention against none",
            "≤ 1.3 ×",
            f"{time[0] / time[1]:.1f} ×",
            _reached(time[0] <= 1.3 * time[1]),
        ),
    ]
    if silent:
        targets.append(
            (
                "clips in which nobody speaks, without a word",
                "≥ 98 %",
                ", ".join(f"{r['empty']:.0%}" for r in silent),
                _reached(all(r["empty"] >= 0.98 for r in silent)),
            )
        )
    return targets


def _difference(rows: Sequence[Row], heard: Transcripts, a: str, b: str):  # noqa: ANN202
    """WER with datastore `a` minus that with `b`, paired over the domain's utterances."""
    texts: dict[str, dict[str, tuple[str, str]]] = {a: {}, b: {}}
    for (task, point, utterance), said in heard.items():
        for name in (a, b):
            if task == "domain" and point.split()[:2] == ["knn", name]:
                texts[name][utterance] = said
    order = sorted(texts[a])
    references = [texts[a][one][0] for one in order]
    heard_a, heard_b = ([texts[name][one][1] for one in order] for name in (a, b))
    return paired_difference(references, heard_a, heard_b, resamples=2000)


def _reached(yes: bool) -> str:
    return "yes" if yes else "no"


def _curves(path: Path, series: Mapping[str, Sequence[Row]], x: str, label: str, log: bool) -> None:
    """WER against `x`, a line a series, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, rows in series.items():
        at = [row[x] for row in rows]
        line = axes.plot(at, [100 * row["wer"] for row in rows], marker="o", label=name)[0]
        low, high = ([100 * row[side] for row in rows] for side in ("wer_low", "wer_high"))
        axes.fill_between(at, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    if log:
        axes.set_xscale("log")
        ticks = sorted({row[x] for rows in series.values() for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("word error rate, %")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _plot_phrases(path: Path, rows: Sequence[Row]) -> None:
    lists = [row for row in rows if row["phrases"] is not None]
    [plain] = [row for row in rows if row["mode"] == "none"]
    counts = sorted({row["phrases"] for row in lists})
    names = {
        "knn": "kNN-LM",
        "cross_attention": "cross-attention",
        "both": "both",
        "boost": "phrase boosting",
        "prompt": "phrases in the prompt",
    }
    series = {"no context": [{**plain, "phrases": count} for count in counts]}
    series |= {
        title: sorted((r for r in lists if r["mode"] == mode), key=lambda r: r["phrases"])
        for mode, title in names.items()
        if any(r["mode"] == mode for r in lists)
    }
    _curves(path, series, "phrases", "phrases in the list", log=True)


def _plot_size(path: Path, rows: Sequence[Row]) -> None:
    _curves(path, {"kNN-LM": rows}, "entries", "entries in the datastore", log=True)


def _plot_bars(path: Path, rows: Sequence[Row]) -> None:
    """A bar a row, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [
        " · ".join(str(row[k]) for k in ("mode", "datastore", "setting") if row[k]) for row in rows
    ]
    rates = [100 * row["wer"] for row in rows]
    below = [100 * (row["wer"] - row["wer_low"]) for row in rows]
    above = [100 * (row["wer_high"] - row["wer"]) for row in rows]
    colours = ["#9aa5b1" if row["mode"] == "none" else "#2f6db3" for row in rows]
    axes.barh(names, rates, xerr=(below, above), color=colours, capsize=3, height=0.6)
    axes.invert_yaxis()
    axes.set_xlabel("word error rate, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


PLOTS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    "domain": _plot_bars,
    "spoken_squad": _plot_bars,
    "paired_share": _plot_bars,
    "dynamic_context": _plot_phrases,
    "size": _plot_size,
    "robustness": _plot_bars,
}
