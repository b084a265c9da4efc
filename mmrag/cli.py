"""The `mmrag` command: transcribe files in this process, with the models of a workspace."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from mmrag import artifact, shipped
from mmrag.artifact import ArtifactError
from mmrag.audio import AudioError
from mmrag.config import KNN, Decode, as_dict
from mmrag.datastore import Datastore, DatastoreError
from mmrag.decode import Retrieval
from mmrag.index import LocalRetriever, saved_shards
from mmrag.records import Transcript
from mmrag.transcribe import Recogniser, transcribe
from mmrag.tune import chosen

console = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit status 1 if a file could not be transcribed, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        recogniser = Recogniser.load(options.models, options.device)
        datastore = _datastore(options, recogniser)
        retrieval = _retrieval(options, datastore)
        settings = Decode(
            beams=options.beams,
            length_penalty=0.6,
            tokens_per_second=16,
            batch_seconds=options.max_seconds,
            max_seconds=options.max_seconds,
        )
    except (ArtifactError, DatastoreError, ValueError) as error:
        sys.exit(f"mmrag: {error}")
    failed = False
    for file in options.files:
        try:
            for transcript in transcribe(file, recogniser, settings, retrieval, datastore):
                _print(file, transcript, options.json)
        except AudioError as error:
            print(f"mmrag: {error}", file=sys.stderr)
            failed = True
    sys.exit(1 if failed else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmrag", description="Speech recognition with retrieval.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("transcribe", help="transcribe audio files")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="wav, flac, ogg, mp3")
    command.add_argument(
        "--models",
        type=shipped.find,
        default=shipped.TINY,
        help="directory with hubert/, codebook/ and lm/, or a model of the package "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--datastore",
        metavar="DIR",
        help="datastore to look things up in: a directory, or a name in MODELS/datastores",
    )
    command.add_argument("--weight", type=float, help="kNN weight (default: as tuned, else 0.3)")
    command.add_argument("--beams", type=int, default=1, help="1 is greedy (default: %(default)s)")
    command.add_argument(
        "--max-seconds",
        type=_max_seconds,
        default=20.0,
        help="split longer audio (default: %(default)s)",
    )
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--json", action="store_true", help="one JSON object a stretch of audio")
    return parser


def _max_seconds(text: str) -> float:
    if not float(text) >= 1:
        raise argparse.ArgumentTypeError(f"{text} leaves no room to cut: at least 1 second")
    return float(text)


def _datastore(options: argparse.Namespace, recogniser: Recogniser) -> Datastore | None:
    if options.datastore is None:
        return None
    named = options.models / "datastores" / options.datastore
    datastore = Datastore.open(named if named.is_dir() else options.datastore)
    datastore.require({role: recogniser.identity[role] for role in ("lm", "codebook")})
    return datastore


def _retrieval(options: argparse.Namespace, datastore: Datastore | None) -> Retrieval | None:
    if datastore is None:
        return None
    knn = {"k": 16, "weight": 0.3, "temperature": 10.0}
    tuned = options.models / "tuned" / datastore.directory.name
    if tuned.is_dir():
        made = artifact.load(datastore.directory, "datastore")
        artifact.load(tuned, "tuned").require("datastore", made)
        knn = as_dict(chosen(tuned))
    else:
        print(f"mmrag: {datastore.directory} is not tuned (jobs.tune): {knn}", file=sys.stderr)
    if options.weight is not None:
        knn["weight"] = options.weight
    retriever = LocalRetriever.load(saved_shards(datastore.directory), datastore)
    return Retrieval(retriever, KNN(**knn))


def _print(file: Path, transcript: Transcript, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": str(file), **asdict(transcript)}, ensure_ascii=False))
        return
    marked = " ".join(
        f"[bold green]{escape(word.text)}[/]" if word.changed else escape(word.text)
        for word in transcript.words
    )
    console.print(f"{escape(str(file))}  {transcript.start:.1f}–{transcript.end:.1f} s\n  {marked}")
    for word in transcript.words:
        if word.changed and word.source:
            source = word.source
            console.print(
                f"    [green]{escape(word.text)}[/]  p {word.lm_probability:.2f} -> "
                f"{word.probability:.2f}  from {escape(source.document)}, distance "
                f"{source.distance:.1f}: “{escape(source.text)}”"
            )
