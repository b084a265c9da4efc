"""Audio to units: HuBERT features, a codebook, Parquet; what cannot be read is reported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
import ray

from cluster.parts import Part, cut, parts, work_off
from cluster.rejections import (
    PIECES,
    REJECTED,
    Unread,
    join_rejections,
    read_rejections,
    write_rejections,
)
from cluster.tokenizing import (
    NOT_COMPARED,
    Agreement,
    EncodeFeatures,
    FindWritten,
    Frames,
    PhoneCounts,
    WrittenPart,
    operators,
)
from cluster.tracking import Run
from jobs import stage
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import ConfigError, Experiment, Tokenize, recipe
from mmrag.corpora import librispeech_biasing, manifest, sources
from mmrag.folders import printable
from mmrag.records import Rejection, Utterance
from mmrag.retrieval import phrases
from mmrag.speech import audio
from mmrag.speech.audio import AudioError
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.units import Codebook, information_of
from mmrag.storage import Location

CORPUS_SPLITS = ("lm", "text", "adapter", "datastore", "dev", "test")
WORKERS = "tokenize.workers"
SHOWN = 3
"""Rejections that an error quotes: the list has them all."""
Rows = Iterable[Utterance | Rejection]
"""A split's utterances and what of it cannot be read: read anew each time they are gone through."""
Splits = Mapping[str, Rows]
UNKNOWN_SECONDS = 10.0
"""What a clip whose length nobody stated counts for when parts are cut."""


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `codebook/` (unless one is named) and `tokens/<split>/part-*.parquet`."""
    settings = experiment.tokenize
    hubert = stage.load(experiment, "hubert", "hubert", "pretrain_hubert")
    source, splits, lists = opened(experiment)
    codebook = _codebook(experiment, hubert, source, splits, force)

    def work(draft: Draft, tracked: Run) -> None:
        encoder = HubertEncoder.load(hubert.place)
        frames = Frames(encoder.field, encoder.hop)
        counted = {split: Counted() for split in splits}
        for answer in work_off(
            operators(settings, hubert.place, codebook.place, draft.path, frames),
            CutSplits(splits, settings.part_seconds),
            settings.workers,
            "units",
            WORKERS,
            done=FindWritten(draft.path, frames),
        ):
            if isinstance(answer, Unread):
                answer.keep(draft.path)
            else:
                counted[answer.name.partition("/")[0]].add(answer)
        pieces = {split: sorted((draft.path / split).glob(PIECES)) for split in splits}
        for split, rejected in pieces.items():
            if not counted[split].utterances and any(one.stat().st_size for one in rejected):
                for part in draft.path.glob("*/*.parquet"):
                    part.unlink()  # what is wrong with it may be mended: nothing counts as done
                raise nothing(
                    experiment, split, chain.from_iterable(map(read_rejections, rejected))
                )
        everything = join_rejections(draft.path / REJECTED, chain.from_iterable(pieces.values()))
        write_lists(draft.path, lists)
        draft.summary |= _summary(counted, everything, encoder.alphabet)
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
        splits = {name: Listing(source.place / f"{name}.jsonl") for name in CORPUS_SPLITS}
    elif sources.named(settings.source):
        corpus = sources.read(settings.source, experiment.workspace / "sources")
        source, splits, lists = corpus.artifact, corpus.splits, corpus.phrases
    else:
        source = artifact.outside(settings.source)
        splits = _splits(source.place)
    _check(experiment, source, splits)
    return source, splits, lists


def _check(experiment: Experiment, source: Artifact, splits: Splits) -> None:
    """Go through each split as far as the first utterance of it."""
    empty = True
    for split, rows in splits.items():
        rejected = False
        for row in rows:
            empty = False
            if isinstance(row, Utterance):
                break
            rejected = True
        else:
            if rejected:
                raise nothing(experiment, split, _rejections(rows))
    if empty:
        raise ValueError(f"{printable(source.place)}: holds no utterance")


@dataclass(frozen=True)
class Listing:
    """A manifest's utterances and its unreadable lines, or the audio files of a directory."""

    path: Location

    def __post_init__(self) -> None:
        """Raises ManifestError or AudioError for what is not there."""
        if not self.path.is_dir():
            manifest.read(self.path)

    def __iter__(self) -> Iterator[Utterance | Rejection]:
        if not self.path.is_dir():
            yield from manifest.read(self.path)
            return
        files, rejected = audio.find(self.path)
        for file in files:
            yield Utterance(id=file.relative_to(self.path).as_posix(), audio=file)
        yield from rejected


@dataclass(frozen=True)
class CutSplits:
    """Reads the splits' parts, `<split>/part-00000` and on, each of about so many seconds."""

    splits: Splits
    part_seconds: float

    def __call__(self) -> Iterator[Part[Utterance] | Unread]:
        for split, rows in self.splits.items():
            yield from cut(rows, stated_seconds, self.part_seconds, name=f"{split}/part")


@dataclass
class Counted:
    """What a split's parts hold together."""

    utterances: int = 0
    units: int = 0
    seconds: float = 0.0
    phones: PhoneCounts = field(default_factory=Counter)
    agreement: Agreement = NOT_COMPARED

    def add(self, part: WrittenPart) -> None:
        """Count one more part."""
        self.utterances += part.count.utterances
        self.units += part.count.units
        self.seconds += part.count.seconds
        self.phones.update(part.phones)
        self.agreement += part.agreement


def _codebook(
    experiment: Experiment,
    hubert: Artifact,
    source: Artifact,
    splits: Splits,
    force: bool,
) -> Artifact:
    """The codebook named in the settings, else one fitted on the first split.

    One that is named belongs to the encoder; or to the base that the encoder was trained further
    from: then each unit is where the encoder now has what the base heard as that unit, and goes on
    meaning what it meant.
    """
    settings = experiment.tokenize
    config = {
        "seed": experiment.seed,
        "units": settings.units,
        "sample_seconds": settings.sample_seconds,
    }
    inputs = {"hubert": hubert, "source": source}
    base: Artifact | None = None
    encoders = [hubert]
    if settings.codebook:
        base = stage.part(settings.codebook, "codebook")
        if hubert.inputs.get("base", "none") != base.inputs.get("hubert"):
            named = artifact.adopt(base.place, experiment.workspace / "codebook", "codebook")
            named.require("hubert", hubert)
            return named
        config["units"], inputs["base"] = len(Codebook.load(base.place)), base
        encoders.append(_base(experiment, hubert))

    def work(draft: Draft, tracked: Run) -> None:
        rows = next(iter(splits.values()))
        drawing = _sample.remote(rows, settings.sample_seconds, experiment.seed)
        sample: list[Utterance] = ray.get(drawing)
        heard = [_features(encoder, sample, settings) for encoder in encoders]
        if not len(heard[0]):
            why = "; ".join(_reasons(sample)) or "there is none"
            where = printable(source.place)
            raise AudioError(f"{where}: no audio that could be read, to fit a codebook on: {why}")
        if base:
            features, before = heard
            book = Codebook.load(base.place)
            book = book.moved(book.assign(before), features)
        else:
            [features] = heard
            frame_seconds = HubertEncoder.load(hubert.place).frame_seconds
            book = Codebook.fit(features, settings.units, experiment.seed, frame_seconds)
        book.save(draft.path)
        draft.summary |= {"units": len(book), "frames_seen": len(features)}

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


def _base(experiment: Experiment, hubert: Artifact) -> Artifact:
    """The encoder that `hubert` was trained further from."""
    if not experiment.pretrain.base:
        raise ConfigError(
            f"tokenize.codebook {experiment.tokenize.codebook} belongs to the encoder that hubert/ "
            "was trained further from: pretrain.base has to name it"
        )
    found = stage.part(experiment.pretrain.base, "hubert")
    hubert.require("base", found)
    return found


def _features(encoder: Artifact, sample: Sequence[Utterance], settings: Tokenize) -> np.ndarray:
    """What an encoder hears in clips (N, D) float16, of all of them together."""
    shares = parts(sample, stated_seconds, settings.batch_seconds)
    encode = (EncodeFeatures, {"hubert": encoder.place, "settings": settings})
    answers = work_off([encode], shares, settings.workers, "codebook", WORKERS, ordered=True)
    read = [one for one in answers if len(one)]
    return np.concatenate(read) if read else np.empty((0, 0), np.float16)


def _splits(path: Location) -> Splits:
    """A directory's manifests `<split>.jsonl`; a source without them is one split, `all`."""
    manifests = {name: path / f"{name}.jsonl" for name in CORPUS_SPLITS}
    named = {name: Listing(file) for name, file in manifests.items() if file.is_file()}
    return named or {"all": Listing(path)}


def write_lists(directory: Path, lists: dict[str, list[str]]) -> None:
    """The phrases that come with each utterance, and sentences about each to build a datastore of:
    what dynamic context needs. Nothing where the corpus has none."""
    if lists:
        written = librispeech_biasing.written(lists)
        (directory / phrases.LISTS).write_text("".join(written), encoding="utf-8")
        everyone = sorted(set(chain.from_iterable(lists.values())))
        manifest.write(directory / phrases.SENTENCES, phrases.utterances(everyone))


def nothing(experiment: Experiment, split: str, rejected: Iterable[Rejection]) -> ValueError:
    """The error of a split of which nothing can be used; the whole list lies beside the output."""
    path = aside(experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = write_rejections(path, rejected)
    shown = "".join(f"\n  {_shown(one)}" for one in read_rejections(path, SHOWN))
    more = f"\n  … all of them in {printable(path)}"
    return ValueError(f"nothing of {split!r} can be used: {count} rejected:{shown}{more}")


def _rejections(rows: Rows) -> Iterator[Rejection]:
    return (row for row in rows if isinstance(row, Rejection))


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


def stated_seconds(utterance: Utterance) -> float:
    """How long a clip is, as far as anybody said."""
    if utterance.audio is None:
        return 1.0
    return UNKNOWN_SECONDS if utterance.duration is None else utterance.duration


@ray.remote(num_cpus=0)
def _sample(rows: Rows, seconds: float, seed: int) -> list[Utterance]:
    """Clips in random order, until there are `seconds` of them.

    The rows are gone through twice: for how long each is, of which 16 bytes each are held, and for
    those that are drawn.
    """
    utterances = (row for row in rows if isinstance(row, Utterance))
    lengths = np.fromiter(
        (math.nan if one.audio is None else stated_seconds(one) for one in utterances), np.float64
    )
    order = np.random.default_rng(seed).permutation(len(lengths))
    chosen: dict[int, int] = {}
    filled = 0.0
    for index in order:
        if filled >= seconds:
            break
        if not math.isnan(length := lengths[index].item()):
            chosen[index.item()] = len(chosen)
            filled += length
    del order
    utterances = (row for row in rows if isinstance(row, Utterance))
    drawn = {chosen[n]: one for n, one in enumerate(utterances) if n in chosen}
    return [drawn[place] for place in range(len(drawn))]


def _summary(
    counted: Mapping[str, Counted], rejected: int, alphabet: str | None
) -> dict[str, float]:
    """What the parts hold, and how much units tell of the phones in each split but the codebook's
    own, as far as it is known when those are said; with an `alphabet`, how many letters are heard
    in them."""
    seconds = math.fsum(one.seconds for one in counted.values())
    units = sum(one.units for one in counted.values())
    summary = {
        "utterances": sum(one.utterances for one in counted.values()),
        "hours_of_audio": round(seconds / 3600, 2),
        "units_a_second": round(units / seconds, 1) if seconds else 0.0,
        "rejected": rejected,
    }
    if alphabet is not None:
        summary["letters"] = len(alphabet)
    compared = sum((one.agreement for one in counted.values()), NOT_COMPARED)
    if compared.frames:
        summary["bf16_units_alike"] = round(compared.alike / compared.frames, 4)
    for split, one in islice(counted.items(), 1, None):
        if one.phones:
            summary[f"phone_information_{split}"] = round(_information(one.phones), 3)
    return summary


def _information(counts: PhoneCounts) -> float:
    """How much units tell of the phones that they were counted with."""
    units, phones = (sorted({pair[side] for pair in counts}) for side in (0, 1))
    places = [{name: place for place, name in enumerate(names)} for names in (units, phones)]
    table = np.zeros((len(units), len(phones)), np.int64)
    for (unit, phone), count in counts.items():
        table[places[0][unit], places[1][phone]] = count
    return information_of(table)


if __name__ == "__main__":
    stage.main(run, __doc__)
