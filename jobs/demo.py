"""The whole system in one run: speech in, word error rates out.

The cast, in order of appearance:

    synthesize       sentences spoken by espeak-ng in many voices
    pretrain_hubert  the encoder that turns sound into features: the package's own
    tokenize         features into discrete units
    build_datastore  what the model can look up: once as text alone, once with speech
    retrieve         what an adapter reads while it trains
    train            the package's cross-attention adapter, tuned a little further on these data
                     (Ray Train + DeepSpeed); without an adapter, the language model itself
    tune             how far to trust each datastore, on the dev split
    evaluate         the test split without retrieval, with each datastore, and in each mode
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from jobs import (
    build_datastore,
    evaluate,
    pretrain_hubert,
    retrieve,
    stage,
    synthesize,
    tokenize,
    train,
    tune,
)
from mmrag.artifact import Artifact
from mmrag.config import Experiment
from mmrag.score import align
from mmrag.text import spoken

TEXT, MULTIMODAL = "text", "multimodal"
EXAMPLES = 5


def run(experiment: Experiment, force: bool = False) -> None:
    """The play."""
    text = _with_datastore(experiment, TEXT, "none")
    multimodal = _with_datastore(experiment, MULTIMODAL, "paired")
    acts: list[tuple[str, Callable[[], Artifact]]] = [
        ("Speak a corpus", lambda: synthesize.run(experiment, force)),
        ("Take the speech encoder", lambda: pretrain_hubert.run(experiment, force)),
        ("Turn speech into units", lambda: tokenize.run(experiment, force)),
    ]
    if experiment.adapter is None:
        acts.append(("Fine-tune the language model", lambda: train.run(experiment, force)))
    acts += [
        ("Build a datastore of text", lambda: build_datastore.run(text, force)),
        ("Build a multi-modal datastore", lambda: build_datastore.run(multimodal, force)),
    ]
    if experiment.adapter is not None:
        acts += [
            ("Look up what the adapter will read", lambda: _look_up(experiment, force)),
            ("Fine-tune the adapter", lambda: train.run(experiment, force)),
        ]
    acts += [
        ("Tune retrieval from text", lambda: tune.run(text, force)),
        ("Tune multi-modal retrieval", lambda: tune.run(multimodal, force)),
        ("Transcribe the test split", lambda: evaluate.run(experiment, force)),
    ]
    taken = []
    for number, (title, act) in enumerate(acts, start=1):
        stage.console.print(f"\n[bold]{number}/{len(acts)}  {title}[/bold]")
        started = time.monotonic()
        made = act()
        taken.append((title, time.monotonic() - started))
    _examples(made.path)
    _epilogue(experiment, taken)


def _look_up(experiment: Experiment, force: bool) -> Artifact:
    """Phrases, the right datastore's neighbours and the wrong one's, for the adapter's split."""
    contexts = experiment.adapter.contexts
    phrases = _with_datastore(experiment, contexts.phrases, "paired", entries="entities")
    build_datastore.run(phrases, force)
    wrong = {"splits": ("lm",), "domain": "everyday"}
    stores = {contexts.retrieved: {}, contexts.wrong: wrong}
    for name, changes in stores.items():
        about = _with_datastore(experiment, name, "paired", **changes)
        build_datastore.run(about, force and name != MULTIMODAL)
        found = retrieve.run(about, force)
    return found


def _with_datastore(experiment: Experiment, name: str, audio: str, **changes: Any) -> Experiment:
    changes = {"name": name, "audio": audio, **changes}
    datastore = experiment.datastore.model_copy(update=changes)
    return experiment.model_copy(update={"datastore": datastore})


def _examples(evaluation: Path) -> None:
    """A few transcripts with what retrieval changed: mended words green, spoilt ones red."""
    lines = [json.loads(line) for line in (evaluation / "transcripts.jsonl").open(encoding="utf-8")]
    plain = {one["utterance"]: one for one in lines if one["datastore"] is None}
    [*_, mode] = dict.fromkeys(one["mode"] for one in lines if one["datastore"] == MULTIMODAL)
    shown_as = (MULTIMODAL, mode)
    helped = {one["utterance"]: one for one in lines if (one["datastore"], one["mode"]) == shown_as}
    changed = [name for name in plain if plain[name]["text"] != helped[name]["text"]]
    shown = (changed or list(plain))[:EXAMPLES]
    stage.console.print(
        "\n[bold]What retrieval changed[/bold] "
        f"({mode.replace('_', ' ')}: {len(changed)} of {len(plain)} transcripts; the first "
        f"{len(shown)} of them)"
    )
    for name in shown:
        reference = plain[name]["reference"]
        stage.console.print(f"  said      {escape(reference)}")
        stage.console.print(f"  without   {escape(plain[name]['text'])}")
        stage.console.print(
            f"  with      {_marked(reference, plain[name]['text'], helped[name]['text'])}\n"
        )


def _marked(reference: str, without: str, heard: str) -> str:
    """`heard` with the words that differ from `without`: right ones green, wrong ones red."""
    right = [
        edit.kind == "equal" for edit in align(reference, heard) for _ in edit.hypothesis_words
    ]
    same = [edit.kind == "equal" for edit in align(without, heard) for _ in edit.hypothesis_words]
    words = [
        escape(word) if kept else f"[{'green' if good else 'red'}]*{escape(word)}*[/]"
        for word, good, kept in zip(spoken(heard).split(), right, same, strict=True)
    ]
    return " ".join(words)


def _epilogue(experiment: Experiment, taken: list[tuple[str, float]]) -> None:
    table = Table(title="Time taken", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for title, seconds in [*taken, ("all", sum(seconds for _, seconds in taken))]:
        table.add_row(title, f"{seconds:.0f}")
    stage.console.print(table)
    root = experiment.workspace
    clip = next(iter(sorted((root / "corpus" / "audio").glob("test-*/*.flac"))), "a.wav")
    shown = clip.relative_to(Path.cwd()) if Path(clip).is_relative_to(Path.cwd()) else clip
    stage.console.print(
        f"\nEverything is in {root}; results.md, wer.png and every transcript in "
        f"{root / 'evaluation'}.\n\nNext:\n"
        "  make mlflow                                    # compare the stages' runs\n"
        f"  .venv/bin/mmrag transcribe {shown} --models {root} --datastore multimodal\n"
        "  .venv/bin/mmrag transcribe YOUR_OWN.wav        # wav, flac, mp3, ogg, webm, m4a …\n",
        soft_wrap=True,
    )


if __name__ == "__main__":
    stage.main(run, "Every stage in order, at tiny size; ends with a table of word error rates.")
