"""The language model, or an adapter for it: Ray Train + DeepSpeed through all phases in one run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cluster.packing import pack
from cluster.progress import METRICS, SKIPPED, records
from cluster.tracking import Run
from cluster.train import REJECTED, fit, held
from jobs import models, plan, stage
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import ConfigError, Experiment, Train, as_dict, recipe
from mmrag.model import pretrained
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import parameter_count
from mmrag.model.packed import Packed
from mmrag.model.vocabulary import BasePieces, SentencePieces, Vocabulary, sampled
from mmrag.retrieval.datastore import Datastore
from mmrag.speech import tokenized
from mmrag.speech.units import Codebook
from mmrag.storage import Location

SPLITS = ("lm", "text")
NO_CURVE = ("step", "phase", "tokens")
"""What of a record is no figure to follow."""
SHOWN: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.3f}".format,
    "ctc_loss": "ctc {:.3f}".format,
    "gradient_norm": "|g| {:.2f}".format,
    "learning_rate": "lr {:.1e}".format,
    "tokens_per_second": "{:,.0f} tokens/s".format,
    "tokens_per_second_per_gpu": "({:,.0f} a worker)".format,
    "mfu": "MFU {:.1%}".format,
    "data_wait": "data {:.0%}".format,
    "padding": "padding {:.0%}".format,
    "peak_gpu_bytes": lambda size: f"GPU {size / 2**30:.1f} GiB",
    "peak_rss_bytes": lambda size: f"RSS {size / 2**30:.1f} GiB",
}
"""What the line of a step says, as far as it was measured (`cluster.measures`)."""
SHOWN_OF_DEV: dict[str, Callable[[float], str]] = {
    "dev_loss": "dev loss {:.3f}".format,
    "dev_text_loss": "as text {:.3f}".format,
    "dev_wer": "dev WER {:.1%}".format,
}
"""What is said of the dev split beside it (`cluster.validation`)."""


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `lm/`; or, with a section `adapter`, `adapter/`."""
    return (_lm if experiment.adapter is None else _adapter)(experiment, force)


def _lm(experiment: Experiment, force: bool) -> Artifact:
    """Train the language model on the lm and text splits of `tokens/`."""
    made = stage.load(experiment, experiment.tokenize.name, "tokens", "tokenize")
    codebook = stage.load(experiment, "codebook", "codebook", "tokenize")
    made.require("codebook", codebook)
    settings = experiment.train
    inputs = {"tokens": made, "codebook": codebook}
    if settings.base and (base := _base(experiment, codebook)):
        inputs["base"] = base
    splits = [made.place / split for split in SPLITS if (made.place / split).exists()]
    config = recipe(
        {
            "seed": experiment.seed,
            "lm": experiment.lm,
            "vocabulary": experiment.vocabulary,
            "train": settings,
        }
    )

    def work(draft: Draft, tracked: Run) -> None:
        if not (draft.path / Vocabulary.FILE).exists():
            _vocabulary(experiment, splits, len(Codebook.load(codebook.place))).save(draft.path)
        vocabulary = Vocabulary.load(draft.path)
        parameters = parameter_count(experiment.lm, vocabulary.size)
        stage.console.print(
            f"  {parameters / 1e6:.1f} M parameters, {vocabulary.pieces.size} word pieces + "
            f"{vocabulary.units} units, {_workers(settings)}, ZeRO-{settings.zero_stage}"
        )

        _report_unspeakable(Packed(pack(splits, draft.path, draft.path), vocabulary))
        log, after = _log(settings, tracked), _logged(tracked)
        fit(experiment, splits, draft.path, log, dev=_dev(settings, made), after=after)
        draft.summary |= _counts(draft.path, parameters, settings)

    logs = (METRICS, SKIPPED)
    return stage.make(
        experiment, "lm", "lm", config, inputs, work, logs=logs, holds=held, force=force
    )


def _adapter(experiment: Experiment, force: bool) -> Artifact:
    """Train a cross-attention adapter for the workspace's language model, which stays as it is."""
    settings, contexts = experiment.train, experiment.adapter.contexts
    if {form for phase in settings.phases for form in phase.mixture} != {"speech_first"}:
        raise ConfigError("an adapter is trained on transcription alone: mixture {speech_first: 1}")
    if settings.ctc_weight:
        raise ConfigError("train.ctc_weight: an adapter has nothing that spells; it takes 0")
    if settings.dev.wer_steps:
        raise ConfigError(
            "train.dev.wer_steps: an adapter reads what is retrieved, which python -m jobs.tune "
            "measures on the dev split; it takes 0"
        )
    heard_by = models.adaptable(experiment)
    lm, made = heard_by.made, models.corpus(experiment, heard_by)
    inputs = {"lm": lm, "tokens": made}
    for name in (contexts.phrases, contexts.retrieved, contexts.wrong):
        store = stage.load(experiment, f"datastores/{name}", "datastore", "build_datastore")
        store.require("lm", lm)
        inputs[f"datastore {name}"] = store
        window = Datastore.open(store.place).description.window
        if window > experiment.adapter.shape.window:
            raise ConfigError(
                f"adapter.shape.window {experiment.adapter.shape.window}: the windows of datastore "
                f"{name} have {window} tokens"
            )
    for name in (contexts.retrieved, contexts.wrong):
        near = stage.load(experiment, f"neighbours/{name}", "neighbours", "retrieve")
        near.require("datastore", inputs[f"datastore {name}"])
        inputs[f"neighbours {name}"] = near
    config = recipe({"seed": experiment.seed, "adapter": experiment.adapter, "train": settings})

    def work(draft: Draft, tracked: Run) -> None:
        with torch.device("meta"):
            shape = Adapter(experiment.adapter.shape, experiment.lm)
        parameters = sum(each.numel() for each in shape.parameters())
        stage.console.print(
            f"  {parameters / 1e6:.1f} M parameters of an adapter, {_workers(settings)}, "
            f"ZeRO-{settings.zero_stage}"
        )
        if settings.dev.loss_steps:
            stage.console.print("  no dev loss: python -m jobs.tune measures an adapter")
        splits = [made.place / contexts.split]
        packed = pack(splits, lm.place, draft.path)
        _report_unspeakable(Packed(packed, Vocabulary.load(lm.place)))
        log, after = _log(settings, tracked), _logged(tracked)
        fit(experiment, splits, draft.path, log, lm.place, after=after)
        draft.summary |= _counts(draft.path, parameters, settings)

    return stage.make(
        experiment,
        "adapter",
        "adapter",
        config,
        inputs,
        work,
        logs=(METRICS, SKIPPED),
        holds=held,
        force=force,
    )


def _report_unspeakable(packed: Packed) -> None:
    """Say that utterances are not trained on, because the vocabulary cannot write their text."""
    if rejected := packed.counts["rejected"]:
        stage.console.print(
            f"  {rejected} utterances left out, whose text this model cannot write: {REJECTED}"
        )


def _workers(settings: Train) -> str:
    """`4 workers`, or `2 to 4 workers`."""
    fewest, most = settings.workers.fewest, settings.workers.most
    return f"{most} workers" if fewest == most else f"{fewest} to {most} workers"


def _counts(directory: Path, parameters: int, settings: Train) -> dict[str, Any]:
    """What a finished training is summed up by."""
    rejected = directory / REJECTED
    taken = [record for record in records(directory) if "loss" in record]
    return {
        "parameters": parameters,
        "steps": settings.steps,
        "final_loss": round(taken[-1]["loss"], 4) if taken else None,
        "skipped": len(records(directory, SKIPPED)),
        "rejected": rejected.read_bytes().count(b"\n") if rejected.exists() else 0,
    }


def _dev(settings: Train, tokens: Artifact) -> Location | None:
    """The split that is measured on; None where there is none, or nothing is to be measured.

    ConfigError if word error rates are wanted of a split that is not there.
    """
    split = tokens.place / settings.dev.split
    if not (settings.dev.loss_steps or settings.dev.wer_steps):
        return None
    if split.exists():
        return split
    if settings.dev.wer_steps:
        raise ConfigError(
            f"train.dev.wer_steps: there is no split {settings.dev.split} in {tokens.path}"
        )
    stage.console.print(f"  no dev loss: there is no split {settings.dev.split}")
    return None


def _logged(tracked: Run) -> int:
    """The step of the last record that MLflow has; -1 for none."""
    last = tracked.last_step("loss")
    return -1 if last is None else last - 1  # there a step is counted when it is done


def _log(settings: Train, tracked: Run) -> Callable[[dict[str, Any]], None]:
    """Says on the terminal and to MLflow what a step measured."""

    def log(record: dict[str, Any]) -> None:
        step, total = record["step"] + 1, settings.steps
        if "skipped" in record:
            stage.console.print(f"  not taken: {record['skipped']}", markup=False)
            return
        if "checkpoint_upload_seconds" in record:
            names = ("checkpoint_stall_seconds", "checkpoint_upload_seconds")
            tracked.log({name: record[name] for name in names if name in record}, step)
        dev = any(name.startswith("dev_") for name in record)
        if step % settings.log_steps and step != total and not dev:
            return
        # All at once: a run that goes on asks for the last step of one of them.
        tracked.log({name: one for name, one in record.items() if name not in NO_CURVE}, step)
        where = f"  {record['phase']:<13} step {step}/{total}  "
        stage.console.print(where + "  ".join(_shown(record, SHOWN)))
        if dev:
            stage.console.print(where + "  ".join(_shown(record, SHOWN_OF_DEV)))

    return log


def _shown(record: dict[str, Any], shown: dict[str, Callable[[float], str]]) -> list[str]:
    return [show(record[name]) for name, show in shown.items() if name in record]


def _base(experiment: Experiment, codebook: Artifact) -> Artifact | None:
    """The base model where it is one of ours; None for a foreign one. ConfigError for one whose
    shape or word pieces are not the experiment's, ArtifactError for one whose units are not."""
    base, found = experiment.train.base, None
    if own := pretrained.ours(base):
        found = artifact.load(own, "lm")
        if found.inputs["codebook"] != codebook.inputs.get("base"):  # its units mean the same
            found.require("codebook", codebook)
    theirs = as_dict(pretrained.base_config(base))
    ours = as_dict(experiment.lm)
    differing = [f"lm.{key}={theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise ConfigError(f"train.base {base} has another shape; it takes {' '.join(differing)}")
    named = experiment.vocabulary.tokenizer is not None
    if found is None and not named:
        raise ConfigError(f"train.base {base} needs its own word pieces: vocabulary.tokenizer")
    if found and named:
        raise ConfigError(f"train.base {base} has its own word pieces: vocabulary.tokenizer=null")
    return found


def _vocabulary(experiment: Experiment, splits: list[Location], units: int) -> Vocabulary:
    settings, base = experiment.vocabulary, experiment.train.base
    if base and (own := pretrained.ours(base)):
        return Vocabulary.load(own)
    if settings.tokenizer:
        return Vocabulary(BasePieces(Path(settings.tokenizer)), units)

    def texts() -> Iterator[str]:
        for split in splits:
            yield from tokenized.read_texts(split)

    chosen = sampled(texts, settings.sentences, experiment.seed)
    return Vocabulary(SentencePieces.train(chosen, settings.pieces, settings.threads), units)


PLANNED = "With --plan, what it will take is printed instead (--plan --help)."

if __name__ == "__main__":
    if "--plan" in sys.argv:
        plan.main(sys.argv[1:])
    else:
        stage.main(run, f"{__doc__} {PLANNED}")
