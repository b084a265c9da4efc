"""The whole system in one run: speech in, word error rates out.

The cast, in order of appearance:

    synthesize       sentences spoken by espeak-ng in many voices
    pretrain_hubert  the encoder that turns sound into features: the package's own
    tokenize         features into discrete units
    train            the package's language model, tuned a little further (Ray Train + DeepSpeed)
    build_datastore  what the model can look up: once as text alone, once with speech
    tune             how far to trust each datastore, on the dev split
    evaluate         the test split without retrieval and with each datastore
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from jobs import (
    build_datastore,
    evaluate,
    pretrain_hubert,
    stage,
    synthesize,
    tokenize,
    train,
    tune,
)
from mmrag.artifact import Artifact
from mmrag.config import Experiment
from mmrag.score import align, normalise

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
        ("Fine-tune the language model", lambda: train.run(experiment, force)),
        ("Build a datastore of text", lambda: build_datastore.run(text, force)),
        ("Build a multi-modal datastore", lambda: build_datastore.run(multimodal, force)),
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


def _with_datastore(experiment: Experiment, name: str, audio: str) -> Experiment:
    datastore = experiment.datastore.model_copy(update={"name": name, "audio": audio})
    return experiment.model_copy(update={"datastore": datastore})


def _examples(evaluation: Path) -> None:
    """A few transcripts with what retrieval changed: mended words green, spoilt ones red."""
    lines = [json.loads(line) for line in (evaluation / "transcripts.jsonl").open()]
    plain = {one["utterance"]: one for one in lines if one["datastore"] is None}
    helped = {one["utterance"]: one for one in lines if one["datastore"] == MULTIMODAL}
    changed = [name for name in plain if plain[name]["text"] != helped[name]["text"]]
    shown = (changed or list(plain))[:EXAMPLES]
    stage.console.print(
        "\n[bold]What retrieval changed[/bold] "
        f"({len(changed)} of {len(plain)} transcripts; the first {len(shown)} of them)"
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
        for word, good, kept in zip(normalise(heard).split(), right, same, strict=True)
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
        "  .venv/bin/mmrag transcribe YOUR_OWN.wav        # any wav, flac, ogg or mp3\n",
        soft_wrap=True,
    )


if __name__ == "__main__":
    stage.main(run, "Every stage in order, at tiny size; ends with a table of word error rates.")
