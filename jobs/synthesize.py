"""A speech corpus: sentences planned by seed and spoken, recordings of people, as FLAC + JSONL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from cluster.parts import Part, cut, in_order, work_off
from cluster.recording import RenderSpeech
from cluster.rejections import PIECES, REJECTED, Unread, join_rejections
from cluster.tracking import Run
from jobs import stage
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import Experiment, Synthesize, recipe
from mmrag.corpora import manifest, recordings, sentences
from mmrag.corpora.recordings import Rerecorded
from mmrag.corpora.synthetic import SPLITS, Planned, stream
from mmrag.corpora.voices import kokoro
from mmrag.records import Rejection, Utterance
from mmrag.storage import located

PART_UTTERANCES = 64
SPLITS_RECORDED = ("lm", "dev", "test")


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `corpus/`: a manifest `<split>.jsonl` for each split, and `audio/`.

    What could not be spoken or read is in `rejected.jsonl`. Raises OSError for a synthesizer whose
    files are absent, ImportError for one that is not installed, ArtifactError for a text file or
    manifest that is not there.
    """
    settings = experiment.synthesize
    config = recipe({"seed": experiment.seed}, settings)
    if "kokoro" in {*settings.voices, *(settings.held_out_voices or ())}:
        kokoro.ready(settings.kokoro)

    def work(draft: Draft, tracked: Run) -> None:
        speak = (RenderSpeech, {"directory": draft.path, "kokoro": settings.kokoro})
        done = FindRecorded(draft.path)

        def record(reading: Plan | Again, title: str) -> None:
            key = "synthesize.workers"
            for answer in work_off([speak], reading, settings.workers, title, key, done=done):
                if isinstance(answer, Unread):
                    answer.keep(draft.path)

        record(Plan(settings, experiment.seed), "speaking")
        if settings.copies:
            record(Again(settings, experiment.seed, draft.path), "recording again")
        rejected = sorted(draft.path.glob(PIECES))
        for split in SPLITS:
            stems = [*_written(draft.path, split), *_written(draft.path, f"{split}-again")]
            path = draft.path / f"{split}.jsonl"
            draft.summary[f"{split}_utterances"] = _join(path, stems)
            tracked.file(path)
            rejected += [stem.with_name(f"{stem.name}.rejected") for stem in stems]
        draft.summary["rejected"] = join_rejections(draft.path / REJECTED, rejected)
        tracked.file(draft.path / REJECTED)

    return stage.make(
        experiment,
        "corpus",
        "corpus",
        config,
        _inputs(settings),
        work,
        bulk=("audio/",),
        holds=artifact.parts(".*[0-9].jsonl"),
        force=force,
    )


@dataclass(frozen=True)
class Plan:
    """Plans a corpus, and cuts each split into parts.

    The utterances of the part that is filled are there, and those of the one before it; of the
    others what `stream` says.
    """

    settings: Synthesize
    seed: int

    def __call__(self) -> Iterator[Part[Planned | Rerecorded] | Unread]:
        planned = stream(self.settings, self.seed)
        yield from cut(self._rejected(), lambda _: 1, PART_UTTERANCES, name="files")
        for split, each in planned.items():
            whole = chain(each, self._recorded(split))
            yield from cut(whole, lambda _: 1, PART_UTTERANCES, name=split)

    def _rejected(self) -> Iterator[Rejection]:
        """The lines of text files and manifests that are no utterances."""
        if self.settings.sentences:
            yield from sentences.left_out(self.settings.sentences.files)
        read = self._read(*SPLITS_RECORDED)
        yield from (one for one in read if isinstance(one, Rejection))

    def _recorded(self, split: str) -> Iterator[Rerecorded]:
        return (one for one in self._read(split) if isinstance(one, Rerecorded))

    def _read(self, *splits: str) -> Iterator[Rerecorded | Rejection]:
        """What the manifests of these splits hold."""
        if self.settings.recordings:
            named = manifests(self.settings)
            files = {split: located(named[split]) for split in splits if split in named}
            for _, one in recordings.plan(files, self.settings.recordings.copies, self.seed):
                yield one


@dataclass(frozen=True)
class Again:
    """Reads what `directory` has of the lm split, and plans further recordings of it: of what is
    said by synthesizers that have `copies`."""

    settings: Synthesize
    seed: int
    directory: Path

    def __call__(self) -> Iterator[Part[Rerecorded]]:
        again = recordings.again(self._said(), self.seed)
        yield from cut(again, lambda _: 1, PART_UTTERANCES, name="lm-again")

    def _said(self) -> Iterator[tuple[Utterance, int]]:
        """What synthesizers said, and how often it is to stand.

        It was written in the order of the plan, which is read beside it; recordings of people, of
        which the plan does not know, come last.
        """
        planned = stream(self.settings, self.seed)["lm"]
        for stem in _written(self.directory, "lm"):
            for said in manifest.read(stem.with_name(f"{stem.name}.jsonl")):
                if isinstance(said, Utterance):
                    voice = next((one.voice for one in planned if one.id == said.id), None)
                    if voice is None:
                        return
                    yield said, self.settings.copies.get(voice.engine, 1)


@dataclass(frozen=True)
class FindRecorded:
    """The name of a part that is in `directory` already, None for another."""

    directory: Path

    def __call__(self, part: Part[Planned | Rerecorded]) -> str | None:
        return part.name if (self.directory / f".{part.name}.jsonl").exists() else None


def _written(directory: Path, name: str) -> list[Path]:
    """The parts of that name in `directory`, in order, without the suffix of their rows."""
    rows = directory.glob(f".{name}-[0-9]*.jsonl")
    stems = (row.with_name(row.name.removesuffix(".jsonl")) for row in rows)
    return sorted(stems, key=lambda stem: in_order(stem.name))


def _join(path: Path, stems: Iterable[Path]) -> int:
    """Write the rows of parts as one manifest; how many there are."""
    count = 0
    with path.open("wb") as stream:
        for stem in stems:
            with stem.with_name(f"{stem.name}.jsonl").open("rb") as rows:
                for row in rows:
                    stream.write(row)
                    count += 1
    return count


def manifests(settings: Synthesize) -> dict[str, str]:
    """Split -> manifest of recordings, where there is one."""
    if settings.recordings is None:
        return {}
    named = {split: getattr(settings.recordings, split, None) for split in SPLITS_RECORDED}
    return {split: path for split, path in named.items() if path is not None}


def _inputs(settings: Synthesize) -> dict[str, Artifact]:
    """The files that the corpus is made from. The first text file of a name is called by it, a
    further one by a number as well."""
    texts = dict.fromkeys(settings.sentences.files) if settings.sentences else ()
    roles = [f"sentences/{located(path).stem}" for path in texts]
    named: dict[str, str] = {}
    for path, role in zip(texts, roles, strict=True):
        further = (f"{role}-{number}" for number in count(2))
        free = (one for one in further if one not in {*roles, *named})
        named[next(free) if role in named else role] = path
    named |= {f"recordings/{split}": path for split, path in manifests(settings).items()}
    return {role: artifact.outside(path) for role, path in named.items()}


if __name__ == "__main__":
    stage.main(run, __doc__)
