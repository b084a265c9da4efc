"""The `mmrag` command: transcribe files in this process, with the models of a workspace."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from mmrag import artifact, shipped
from mmrag.artifact import ArtifactError
from mmrag.audio import AudioError
from mmrag.config import KNN, Decode, Read, as_dict
from mmrag.datastore import Datastore, DatastoreError
from mmrag.decode import Retrieval
from mmrag.index import LocalRetriever, SubsetRetriever, saved_shards
from mmrag.phrases import Phrases, remember
from mmrag.reading import Reading
from mmrag.records import Transcript
from mmrag.transcribe import Recogniser, transcribe
from mmrag.tune import BOTH, SETTINGS, chosen, chosen_read

RETRIEVALS = ("none", "knn", "cross_attention", "both")
UNTUNED = {"k": 16, "weight": 0.3, "temperature": 10.0}
"""kNN settings for a datastore that nobody tuned."""
WHOLE = Read(k=8, stride=1, whole=300)
AGREEMENT = -2.5
"""As in `Decode`."""
CACHE = Path(os.environ.get("MMRAG_CACHE") or Path.home() / ".cache" / "mmrag") / "phrases"
console = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit status 1 if a file could not be transcribed, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        recogniser = Recogniser.load(options.models, options.device)
        found = _found(options, recogniser)
        settings = Decode(
            beams=options.beams,
            length_penalty=0.6,
            tokens_per_second=16,
            batch_seconds=options.max_seconds,
            max_seconds=options.max_seconds,
            speech=options.speech_threshold,
            agreement=None if options.trust else AGREEMENT,
        )
    except (ArtifactError, DatastoreError, OSError, ValueError, ImportError) as error:
        sys.exit(f"mmrag: {error}")
    failed = False
    for file in options.files:
        try:
            for transcript in transcribe(file, recogniser, settings, **found):
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
    command.add_argument(
        "--phrases",
        type=Path,
        metavar="FILE",
        help="phrases to listen for, one a line (names, drugs, products); spoken by a synthesizer "
        "once and remembered",
    )
    command.add_argument(
        "--retrieval",
        choices=RETRIEVALS,
        help="neighbours vote (knn), the adapter reads them (cross_attention), or both; default: "
        "knn with a datastore, cross_attention with phrases",
    )
    command.add_argument("--weight", type=float, help="kNN weight (default: as tuned, else 0.3)")
    command.add_argument("--beams", type=int, default=1, help="1 is greedy (default: %(default)s)")
    command.add_argument(
        "--max-seconds",
        type=_max_seconds,
        default=4.0,
        help="split longer audio in pauses; mmrag:tiny has heard single sentences and loses itself "
        "in longer stretches (default: %(default)s)",
    )
    command.add_argument(
        "--speech-threshold",
        type=float,
        default=0.75,
        help="probability of speech from which on audio is transcribed; 0: all of it "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--trust",
        action="store_true",
        help="keep transcripts that retrieval made loop or that the language model finds absurd; "
        "else they are made again without",
    )
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--json", action="store_true", help="one JSON object a stretch of audio")
    return parser


def _max_seconds(text: str) -> float:
    if not float(text) >= 1:
        raise argparse.ArgumentTypeError(f"{text} leaves no room to cut: at least 1 second")
    return float(text)


def _found(options: argparse.Namespace, recogniser: Recogniser) -> dict[str, Any]:
    """What `transcribe` is given to look things up in."""
    if options.datastore is not None and options.phrases is not None:
        raise ValueError("--datastore or --phrases: one of them")
    if options.phrases is not None:
        return _phrases(options, recogniser)
    if options.datastore is None:
        if options.retrieval not in (None, "none"):
            raise ValueError(f"--retrieval {options.retrieval} needs a --datastore or --phrases")
        return {}
    named = options.models / "datastores" / options.datastore
    datastore = Datastore.open(named if named.is_dir() else options.datastore)
    datastore.require({role: recogniser.identity[role] for role in ("lm", "codebook")})
    mode = options.retrieval or "knn"
    if mode == "none":
        return {}
    retriever = LocalRetriever.load(saved_shards(datastore.directory), datastore)
    found: dict[str, Any] = {"source": retriever}
    knn, read = _tuned(options, datastore, mode)
    if mode in ("knn", "both"):
        found["retrieval"] = Retrieval(retriever, knn)
    if mode in ("cross_attention", "both"):
        found["reading"] = Reading(recogniser.bank(retriever), read, retriever)
    return found


def _tuned(options: argparse.Namespace, datastore: Datastore, mode: str) -> tuple[KNN, Read]:
    """Settings as `jobs.tune` chose them for this datastore, or plain ones, with a word of it."""
    knn, read = dict(UNTUNED), WHOLE
    tuned = options.models / "tuned" / datastore.directory.name
    if tuned.is_dir():
        made = artifact.load(datastore.directory, "datastore")
        artifact.load(tuned, "tuned").require("datastore", made)
        beside = mode == "both" and (tuned / BOTH).exists()
        knn = as_dict(chosen(tuned, BOTH if beside else SETTINGS))
        read = chosen_read(tuned) or read
    else:
        print(f"mmrag: {datastore.directory} is not tuned (jobs.tune): {knn}", file=sys.stderr)
    if options.weight is not None:
        knn["weight"] = options.weight
    return KNN(**knn), read


def _phrases(options: argparse.Namespace, recogniser: Recogniser) -> dict[str, Any]:
    """The phrases of a file, as a small datastore that is read whole."""
    mode = options.retrieval or "cross_attention"
    if mode == "none":
        return {}
    listed = [line.strip() for line in options.phrases.read_text().splitlines() if line.strip()]
    identity = {role: recogniser.identity[role] for role in ("lm", "codebook")}
    datastore = remember(
        CACHE, listed, recogniser.lm, recogniser.vocabulary, identity, recogniser.speaker()
    )
    retriever = SubsetRetriever(datastore, np.arange(datastore.entries))
    found: dict[str, Any] = {"source": retriever}
    if mode in ("knn", "both"):
        knn = UNTUNED if options.weight is None else {**UNTUNED, "weight": options.weight}
        found["retrieval"] = Retrieval(retriever, KNN(**knn))
    if mode in ("cross_attention", "both"):
        windows = Phrases(datastore).first_mentions()
        found["reading"] = Reading(recogniser.bank(retriever), WHOLE, retriever, windows)
    return found


def _print(file: Path, transcript: Transcript, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": str(file), **asdict(transcript)}, ensure_ascii=False))
        return
    marked = " ".join(
        f"[bold green]{escape(word.text)}[/]" if word.changed else escape(word.text)
        for word in transcript.words
    )
    marked = marked or "[dim](nothing said)[/]"
    console.print(f"{escape(str(file))}  {transcript.start:.1f}–{transcript.end:.1f} s\n  {marked}")
    for word in transcript.words:
        if word.changed and word.source:
            source = word.source
            evidence = [escape(source.document)]
            if source.attention is not None:
                evidence.append(f"attention {source.attention:.0%}")
            if source.distance is not None:
                evidence.append(f"distance {source.distance:.1f}")
            console.print(
                f"    [green]{escape(word.text)}[/]  p {word.lm_probability:.2f} -> "
                f"{word.probability:.2f}  from {', '.join(evidence)}: “{escape(source.text)}”"
            )
