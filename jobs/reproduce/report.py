"""The results page: tables, plots and a comparison with the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from jobs import stage
from jobs.reproduce import targets
from jobs.reproduce.lab import OWN, WHISPER
from jobs.reproduce.rows import Row, Transcripts
from mmrag.artifact import write_json
from mmrag.config import Experiment

TITLES = {
    "everyday": "Everyday sentences",
    "domain": "Domain adaptation",
    "paired_share": "Little paired audio",
    "dynamic_context": "Dynamic context",
    "unsaid_phrases": "Lists of what nobody says",
    "wrong_datastore": "The wrong datastore",
    "size": "Size of the datastore",
    "window": "Overlap of the windows",
    "key_encoder": "Two levels, and who encodes the first",
    "robustness": "Other recordings",
    "spoken_squad": "Spoken-SQuAD in voices of ours",
    "sentences": "Real sentences",
    "people": "People",
    "synthesizers": "Who speaks the keys",
    "end_to_end": "From the file to the words",
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
    "calibration error",
    "bad ones unclear",
    "good ones unclear",
)


TOLD = ("domain", "dynamic_context", "unsaid_phrases", "wrong_datastore")
"""Tasks in which the decoder is told something, right or wrong."""
DETECTION = ("entity precision", "entity F1", "WER, entity words", "WER, other words")
"""Columns that the rows of older versions do not fill."""
ONLY_WRITTEN = ("utterances", "keys, MB", "calibration error", *DETECTION)
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
    "unseen names, terms spotted, multi-modal datastore": (
        *("domain", "spotting", "multimodal", None),
    ),
    "100 phrases a request, in the prompt": ("dynamic_context", "prompt", None, 100),
    "100 phrases a request, boosted": ("dynamic_context", "boost", None, 100),
    "100 phrases a request, spotted": ("dynamic_context", "spotting", None, 100),
    "100 phrases a request, kNN-LM": ("dynamic_context", "knn", "spoken", 100),
    "100 phrases a request, cross-attention": (
        *("dynamic_context", "cross_attention", "spoken", 100),
    ),
    "100 phrases a request, both": ("dynamic_context", "both", "spoken", 100),
}
"""The rows that tell the story: title -> (task, mode, datastore, phrases)."""


QUICK = "-quick"
"""After the workspace's name where a quick look is taken."""
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
        f"Made by `{_command(experiment)}`; the same figures are in",
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
    if reached := targets.targets(own_rows(rows), heard):
        header = ("target", "wanted", "measured", "reached")
        lines += ["## Targets", "", *markdown([header, *reached]), ""]
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


def _command(experiment: Experiment) -> str:
    """What made a page: an experiment's workspace is named for its file."""
    name = experiment.workspace.name
    quickly = " --quick" if name.endswith(QUICK) else ""
    file = name.removesuffix(QUICK).replace("-", "_")
    config = "" if file == "reproduce" else f" --config jobs/configs/{file}.yaml"
    return f"python -m jobs.reproduce{config}{quickly}"


def _beside(docs: Path) -> list[str]:
    """Where results of other models lie: pages like this one, in folders beside it."""
    found = sorted(page.parent.name for page in docs.glob("*/results.md"))
    models = {name: "a Whisper" if name == WHISPER else f"mmrag:{name}" for name in found}
    return [
        f"The same for {models[name]}: [{name}/results.md]({name}/results.md)." for name in found
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

    def marked(which: str) -> str:
        if row.get(f"{which}_unclear") is None:
            return "–"
        return f"{row[f'{which}_unclear']:.1%} of {row[which]}"

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
        "–" if row.get("calibration_error") is None else f"{row['calibration_error']:.3f}",
        *(marked(which) for which in ("bad", "good")),
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
        "spotting": "phrases spotted",
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
