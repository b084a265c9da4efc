"""Corpora of others by name, `reader:path`: which reader, and its splits, which nobody holds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmrag import artifact
from mmrag.artifact import Artifact, ArtifactError
from mmrag.corpora import (
    huggingface,
    lhotse_cuts,
    librispeech_biasing,
    slue_voxpopuli,
    spoken_squad,
)
from mmrag.corpora.splits import Corpus, CorpusError, Row
from mmrag.storage import Location, is_url

READERS: dict[str, Callable[..., Corpus]] = {
    "lhotse": lhotse_cuts.read,
    "huggingface": huggingface.read,
    "slue_voxpopuli": slue_voxpopuli.read,
    "spoken_squad": spoken_squad.read,
    "librispeech_biasing": librispeech_biasing.read,
}
AUDIO_APART = ("spoken_squad", "librispeech_biasing")
"""Readers that take a second path, of the audio: `reader:path:audio`."""


@dataclass(frozen=True)
class Split:
    """The rows of a split: read anew each time that somebody goes through them."""

    reader: str
    paths: tuple[Path, ...]
    unpacked: Location
    name: str

    def __iter__(self) -> Iterator[Row]:
        return iter(_corpus(self.reader, self.paths, self.unpacked).splits[self.name])


@dataclass(frozen=True)
class Source:
    """A corpus: what it is, and its splits in our order."""

    artifact: Artifact
    """Its fingerprint, of the files that were named."""
    splits: dict[str, Split]
    phrases: dict[str, list[str]] = field(default_factory=dict)
    """Utterance id -> the phrases that come with it."""


def named(source: str) -> bool:
    """Whether `source` is for a reader of this module.

    Raises CorpusError for the name of a reader that there is not.
    """
    reader, colon, _ = source.partition(":")
    if is_url(source):
        return False
    if colon and reader in READERS:
        return True
    if colon and re.fullmatch(r"[a-z_]+", reader) and not Path(source).exists():
        raise CorpusError(f"{source}: no reader {reader!r}, there are {', '.join(READERS)}")
    return False


def read(source: str, unpacked: Location) -> Source:
    """Open `reader:path`; what has to be unpacked goes below `unpacked`.

    Raises CorpusError or ArtifactError, which name the path, and ImportError, which names the extra
    that is not installed.
    """
    reader, _, path = source.partition(":")
    paths = tuple(_paths(reader, path))
    corpus = _corpus(reader, paths, unpacked)
    splits = {name: Split(reader, paths, unpacked, name) for name in corpus.splits}
    return Source(_fingerprinted(reader, paths), splits, corpus.phrases)


def _corpus(reader: str, paths: Sequence[Path], unpacked: Location) -> Corpus:
    if reader == "huggingface":
        return huggingface.read(paths[0], unpacked)
    return READERS[reader](*paths)


def _paths(reader: str, told: str) -> list[Path]:
    """The paths after the reader's name, absolute; two where the audio is apart."""
    path, colon, audio = told.rpartition(":")
    apart = reader in AUDIO_APART and colon and not Path(told).exists()
    if is_url(told):
        raise CorpusError(
            f"{reader}:{told}: this reader reads local files: copy them here, or make a manifest, "
            "which is read from any URL"
        )
    named = [path, audio] if apart else [told]
    if not all(named):
        raise CorpusError(f"{reader}:{told}: names no path")
    paths = [Path(each).expanduser() for each in named]
    if apart and not paths[1].is_dir():
        raise CorpusError(f"{reader}:{told}: no directory of audio {paths[1]}")
    if reader != "librispeech_biasing" and not paths[0].exists():
        raise ArtifactError(f"no such file or directory: {paths[0].absolute()}")
    return [each.absolute() for each in paths]


def _fingerprinted(reader: str, paths: Sequence[Path]) -> Artifact:
    """The files that were named, as one input."""
    files = librispeech_biasing.tables(paths[0]) if reader == "librispeech_biasing" else paths[:1]
    each = [artifact.outside(path).fingerprint for path in [*files, *paths[1:]]]
    digest = each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()[:16]
    return Artifact(paths[0], artifact.OUTSIDE, digest, config={}, inputs={})
