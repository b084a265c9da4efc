"""Audio to units: HuBERT features, a codebook, Parquet; what cannot be read is reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from cluster.parts import parts, work_off
from cluster.rejections import REJECTED, read_rejections, write_rejections
from cluster.tokenizing import EncodeFeatures, EncodeUnits
from cluster.tracking import Run
from jobs import stage
from mmrag import artifact, shipped
from mmrag.artifact import Artifact, Draft
from mmrag.config import Experiment, recipe
from mmrag.corpora import librispeech_biasing, manifest, sources
from mmrag.folders import printable
from mmrag.records import Rejection, Utterance
from mmrag.retrieval import phrases
from mmrag.speech import audio, tokenized
from mmrag.speech.audio import AudioError
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.targets import Phones
from mmrag.speech.units import Codebook, expand, information
from mmrag.storage import Location

CORPUS_SPLITS = ("lm", "text", "adapter", "datastore", "dev", "test")
WORKERS = "tokenize.workers"
SHOWN = 3
"""Rejections that an error quotes: the list has them all."""
Splits = dict[str, tuple[list[Utterance], list[Rejection]]]
"""Each split's utterances, and its lines that cannot be read."""
UNKNOWN_SECONDS = 10.0
"""What a clip whose length nobody stated counts for when parts are cut."""


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `codebook/` (unless one is named) and `tokens/<split>/part-*.parquet`."""
    settings = experiment.tokenize
    hubert = stage.load(experiment, "hubert", "hubert", "pretrain_hubert")
    source, splits, lists = opened(experiment)
    codebook = _codebook(experiment, hubert, source, splits, force)

    def work(draft: Draft, tracked: Run) -> None:
        shares = []
        for split, (utterances, _) in splits.items():
            if utterances:
                (draft.path / split).mkdir(exist_ok=True)
            shares += parts(utterances, stated_seconds, settings.part_seconds, name=f"{split}/part")
        todo = [part for part in shares if not (draft.path / f"{part.name}.parquet").exists()]
        encode = {
            "hubert": hubert.place,
            "codebook": codebook.place,
            "settings": settings,
            "directory": draft.path,
        }
        for _ in work_off([(EncodeUnits, encode)], todo, settings.workers, "units", WORKERS):
            pass
        rejected = {split: list(unread) for split, (_, unread) in splits.items()}
        for piece in sorted(draft.path.glob("*/.*.rejected.jsonl")):
            rejected[piece.parent.name] += read_rejections(piece)
        for split, reasons in rejected.items():
            if reasons and not _written(draft.path / split):
                for part in draft.path.glob("*/*.parquet"):
                    part.unlink()  # what is wrong with it may be mended: nothing counts as done
                raise nothing(experiment, split, reasons)
        everything = list(chain.from_iterable(rejected.values()))
        write_rejections(draft.path / REJECTED, everything)
        write_lists(draft.path, lists)
        _count(draft, len(everything))
        _measure(draft, splits, HubertEncoder.load(hubert.place))
        tracked.file(draft.path / REJECTED)
        aside(experiment).unlink(missing_ok=True)

    inputs = {"hubert": hubert, "codebook": codebook, "source": source}
    held = artifact.parts("*/part-*.parquet")
    return stage.make(
        experiment,
        settings.name,
        "tokens",
        recipe(settings),
        inputs,
        work,
        holds=held,
        force=force,
    )


def opened(experiment: Experiment) -> tuple[Artifact, Splits, dict[str, list[str]]]:
    """What `tokenize.source` names, else the workspace's corpus: its splits, and the phrases that
    come with its utterances, if any do.

    Raises ValueError for a corpus, or a split of it, of which nothing can be used.
    """
    settings = experiment.tokenize
    lists: dict[str, list[str]] = {}
    if settings.source is None:
        source = stage.load(experiment, "corpus", "corpus", "synthesize")
        splits = {name: _read(source.place / f"{name}.jsonl") for name in CORPUS_SPLITS}
    elif sources.named(settings.source):
        corpus = sources.read(settings.source, experiment.workspace / "sources")
        source, splits, lists = corpus.artifact, corpus.splits, corpus.phrases
    else:
        source = artifact.outside(settings.source)
        splits = _splits(source.place)
    if not any(utterances or unread for utterances, unread in splits.values()):
        raise ValueError(f"{printable(source.place)}: holds no utterance")
    for split, (utterances, unread) in splits.items():
        if unread and not utterances:
            raise nothing(experiment, split, unread)
    return source, splits, lists


def _codebook(
    experiment: Experiment,
    hubert: Artifact,
    source: Artifact,
    splits: Splits,
    force: bool,
) -> Artifact:
    """The codebook named in the settings, else one fitted on the first split."""
    settings = experiment.tokenize
    if settings.codebook:
        source = shipped.find(settings.codebook)
        directory = source / "codebook" if settings.codebook.startswith(shipped.PREFIX) else source
        named = artifact.adopt(directory, experiment.workspace / "codebook", "codebook")
        named.require("hubert", hubert)
        return named
    config = {
        "seed": experiment.seed,
        "units": settings.units,
        "sample_seconds": settings.sample_seconds,
    }

    def work(draft: Draft, tracked: Run) -> None:
        utterances = next(iter(splits.values()))[0]
        sample = _sample(utterances, settings.sample_seconds, experiment.seed)
        shares = parts(sample, stated_seconds, settings.batch_seconds)
        encode = (EncodeFeatures, {"hubert": hubert.place, "settings": settings})
        read = [
            one
            for one in work_off([encode], shares, settings.workers, "codebook", WORKERS)
            if len(one)
        ]
        if not read:
            why = "; ".join(_reasons(sample)) or "there is none"
            where = printable(source.place)
            raise AudioError(f"{where}: no audio that could be read, to fit a codebook on: {why}")
        features = np.concatenate(read)
        frame_seconds = HubertEncoder.load(hubert.place).frame_seconds
        book = Codebook.fit(features, settings.units, experiment.seed, frame_seconds)
        book.save(draft.path)
        draft.summary |= {"units": len(book), "frames_seen": len(features)}

    inputs = {"hubert": hubert, "source": source}
    return stage.make(
        experiment,
        "codebook",
        "codebook",
        config,
        inputs,
        work,
        holds=artifact.nothing,
        force=force,
    )


def _splits(path: Location) -> Splits:
    """A directory's manifests `<split>.jsonl`; a source without them is one split, `all`."""
    manifests = {name: path / f"{name}.jsonl" for name in CORPUS_SPLITS}
    named = {name: _read(file) for name, file in manifests.items() if file.is_file()}
    return named or {"all": _read(path)}


def _read(path: Location) -> tuple[list[Utterance], list[Rejection]]:
    """A manifest's utterances and its unreadable lines, or the audio files of a directory."""
    if path.is_dir():
        files, rejected = audio.find(path)
        return [
            Utterance(id=file.relative_to(path).as_posix(), audio=file) for file in files
        ], rejected
    lines = list(manifest.read(path))
    utterances = [line for line in lines if isinstance(line, Utterance)]
    return utterances, [line for line in lines if isinstance(line, Rejection)]


def write_lists(directory: Path, lists: dict[str, list[str]]) -> None:
    """The phrases that come with each utterance, and sentences about each to build a datastore of:
    what dynamic context needs. Nothing where the corpus has none."""
    if lists:
        written = librispeech_biasing.written(lists)
        (directory / phrases.LISTS).write_text("".join(written), encoding="utf-8")
        everyone = sorted(set(chain.from_iterable(lists.values())))
        manifest.write(directory / phrases.SENTENCES, phrases.utterances(everyone))


def nothing(experiment: Experiment, split: str, rejected: Sequence[Rejection]) -> ValueError:
    """The error of a split of which nothing can be used; the whole list lies beside the output."""
    path = aside(experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rejections(path, rejected)
    shown = "".join(f"\n  {_shown(one)}" for one in rejected[:SHOWN])
    more = f"\n  … all of them in {printable(path)}"
    return ValueError(f"nothing of {split!r} can be used: {len(rejected)} rejected:{shown}{more}")


def aside(experiment: Experiment) -> Path:
    """Where what was rejected is listed when there is no output to hold the list."""
    return artifact.made_at(experiment.workspace / f"{experiment.tokenize.name}.rejected.jsonl")


def _shown(rejection: Rejection) -> str:
    """Its reason, and its source unless the reason begins with it."""
    known = rejection.reason.startswith(rejection.source)
    return rejection.reason if known else f"{rejection.source}: {rejection.reason}"


def _reasons(sample: Sequence[Utterance]) -> list[str]:
    """Why the first of the clips cannot be read."""
    reasons = []
    for one in sample[:SHOWN]:
        try:
            audio.duration(one.audio, enough=1.0)
        except AudioError as error:
            reasons.append(str(error))
    return reasons


def _written(split: Path) -> bool:
    """Whether a split's parts hold any utterance."""
    return any(
        next(tokenized.read_part(part), None) is not None
        for part in sorted(split.glob("part-*.parquet"))
    )


def stated_seconds(utterance: Utterance) -> float:
    """How long a clip is, as far as anybody said."""
    if utterance.audio is None:
        return 1.0
    return UNKNOWN_SECONDS if utterance.duration is None else utterance.duration


def _sample(utterances: Sequence[Utterance], seconds: float, seed: int) -> list[Utterance]:
    """Clips in random order, until there are `seconds` of them."""
    order = np.random.default_rng(seed).permutation(len(utterances))
    sample, filled = [], 0.0
    for index in order.tolist():
        if filled < seconds and utterances[index].audio is not None:
            sample.append(utterances[index])
            filled += stated_seconds(utterances[index])
    return sample


def _count(draft: Draft, rejected: int) -> None:
    counted = [tokenized.count_part(part) for part in draft.path.glob("*/part-*.parquet")]
    seconds = math.fsum(one.seconds for one in counted)
    units = sum(one.units for one in counted)
    draft.summary |= {
        "utterances": sum(one.utterances for one in counted),
        "hours_of_audio": round(seconds / 3600, 2),
        "units_a_second": round(units / seconds, 1) if seconds else 0.0,
        "rejected": rejected,
    }


def _measure(draft: Draft, splits: Splits, encoder: HubertEncoder) -> None:
    """How much units tell of the phones in each split but the codebook's own, as far as it is known
    when those are said."""
    for split, (utterances, _) in list(splits.items())[1:]:
        phones = Phones([one.phones for one in utterances]).framed(encoder.field, encoder.hop)
        timed = {one.id: number for number, one in enumerate(utterances) if one.phones}
        told, said = [], []
        for part in sorted((draft.path / split).glob("part-*.parquet")) if timed else ():
            for one in tokenized.read_part(part):
                if one.utterance.id in timed:
                    told.append(expand(one.units))
                    classes = phones[timed[one.utterance.id]].numpy()[: len(told[-1])]
                    said.append(np.pad(classes, (0, len(told[-1]) - len(classes))))
        if told:
            known = information(np.concatenate(told), np.concatenate(said))
            draft.summary[f"phone_information_{split}"] = round(known, 3)


if __name__ == "__main__":
    stage.main(run, __doc__)
