"""The `mmrag` command: transcribe files in this process, with the models of a workspace, or ask a
running endpoint to.

What the models need takes seconds to load, and is imported where this process transcribes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from mmrag import administration, shipped, terminal
from mmrag.administration import KEY
from mmrag.artifact import ArtifactError
from mmrag.client import Answer, Service, ServiceError
from mmrag.entry_options import SPEAKING, add_speaking
from mmrag.folders import printable
from mmrag.lookup_options import add_lookup, found_by
from mmrag.records import Transcript, Word
from mmrag.retrieval.wording import read_entries
from mmrag.storage import Location, located

IN_PROCESS = {
    "models": shipped.DEFAULT,
    "weight": None,
    "beams": None,
    "language": None,
    "max_seconds": None,
    "speech_threshold": 0.75,
    "trust": False,
    "unclear": "keep",
    "device": None,
    **dict.fromkeys(SPEAKING),
}
"""Options that an endpoint decides for itself, and what they are if nobody gives them."""
AGREEMENT = -2.5
"""As in `Decode`."""
AUDIO = "wav, flac, mp3, ogg, webm, m4a, mp4, 3gp, amr and others, whatever the name"
WHISPER_SECONDS = 30.0
"""Longest segment that a Whisper is given where nobody says so."""
TAIL_LETTERS = 400
"""Letters of a growing transcript that are shown: its end, which has to fit on a small terminal."""
console = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit status 1 if a file could not be transcribed, 2 for wrong usage, 130 if
    it was interrupted."""
    with terminal.command("mmrag"):
        sys.exit(1 if _run(arguments) else 0)


def _run(arguments: Sequence[str] | None) -> bool:
    """Whether a file could not be transcribed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if "run" in options:
        return administration.run(options)
    given = [name for name in IN_PROCESS if getattr(options, name) is not None]
    if options.url is not None and given:
        parser.error(f"--url goes without {', '.join(map(_flag, given))}: it is the endpoint's own")
    for name in IN_PROCESS.keys() - given:
        setattr(options, name, IN_PROCESS[name])
    return _here(options) if options.url is None else _there(options)


def _here(options: argparse.Namespace) -> bool:
    """Transcribe in this process; whether a file could not be."""
    from mmrag import recogniser as recognisers
    from mmrag.config import Decode, explain
    from mmrag.retrieval.segment import DatastoreError
    from mmrag.speech.audio import AudioError, stated
    from mmrag.transcribe import transcribe

    try:
        device = options.device or _device()
        recogniser = recognisers.load(options.models, device, options.language)
        if options.max_seconds is None:
            options.max_seconds = min(recogniser.window_seconds, WHISPER_SECONDS)
            if not recognisers.is_whisper(options.models):
                options.max_seconds = shipped.segment_seconds(options.models)
        settings = Decode(
            beams=options.beams,
            length_penalty=0.6,
            tokens_per_second=16,
            max_seconds=options.max_seconds,
            speech=options.speech_threshold,
            agreement=None if options.trust else AGREEMENT,
            unclear=options.unclear,
        )
        found = found_by(options, recogniser)
    except (ArtifactError, DatastoreError, OSError, ValueError, ImportError) as error:
        sys.exit(explain(error, "mmrag"))
    failed = False
    for file in options.files:
        try:
            seconds = stated(file)
            made = transcribe(file, recogniser, settings, **found)
            _print_each(file, made, options.json, seconds)
        except (AudioError, OSError) as error:
            _say(str(error))
            failed = True
    return failed


def _print_each(
    file: Location, transcripts: Iterator[Transcript], as_json: bool, seconds: float | None
) -> None:
    """Print transcripts as they come; meanwhile a terminal says how far they are of all `seconds`,
    and how much faster than the recording plays."""
    of = "" if seconds is None else f" of {seconds:.0f}"
    name = _visible(printable(file))
    with terminal.status_line() as show:
        started = time.perf_counter()
        show(f"0{of} s: {name}")
        for transcript in transcripts:
            show("")
            _print(file, transcript, as_json)
            pace = transcript.end / (time.perf_counter() - started)
            show(f"{transcript.end:.0f}{of} s, {pace:.1f} times real time: {name}")


def _there(options: argparse.Namespace) -> bool:
    """Have the endpoint at `options.url` transcribe; whether it could not a file."""
    try:
        service = Service(options.url, os.environ.get(KEY))
        phrases = [] if options.phrases is None else read_entries(options.phrases)
        if options.retrieval not in (None, "none") and not (options.datastore or phrases):
            raise ValueError(f"--retrieval {options.retrieval} needs a --datastore or --phrases")
    except (OSError, ValueError) as error:
        sys.exit(f"mmrag: {error}")
    failed = False
    for file in options.files:
        asked = options.datastore, phrases, options.retrieval, options.shortlist
        parts = service.transcribe(file, *asked)
        try:
            answer = _followed(parts, visibly=console.is_terminal and not options.json)
        except (ServiceError, OSError) as error:
            _complain(file, getattr(error, "strerror", None) or str(error))
            failed = True
            continue
        _print(file, answer.transcript, options.json)
        if answer.missing_shards:
            what = f"{answer.missing_shards} index shards did not answer"
            _complain(file, f"{what}: what they hold was not found")
    return failed


def _followed(parts: Iterator[str | Answer], visibly: bool) -> Answer:
    """Follow a transcript in the making to its end; while it grows, `visibly`, it is shown."""
    told = ""
    showing = Live(console=console, transient=True, auto_refresh=False)
    with showing if visibly else nullcontext():
        while isinstance(part := next(parts), str):
            told += part
            if visibly:
                # Wrapped, against what the console says: what is taken back has to be counted.
                end = Text(_visible(told[-TAIL_LETTERS:]), "dim", no_wrap=False, overflow="fold")
                showing.update(end, refresh=True)
    return part


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmrag", description="Speech recognition with retrieval.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("transcribe", help="transcribe audio files")
    command.add_argument("files", nargs="+", type=_file, metavar="FILE", help=AUDIO)
    command.add_argument(
        "--models",
        type=_models,
        help="directory with hubert/, codebook/ and lm/, a model of the package "
        f"(default: {IN_PROCESS['models']}), or a Whisper checkpoint: whisper:DIRECTORY",
    )
    command.add_argument(
        "--language", help="what is spoken, by ISO 639-1; for a multilingual Whisper"
    )
    add_lookup(command)
    add_speaking(command)
    command.add_argument(
        "--beams", type=int, help="1 is greedy (default: 8 with mmrag:small, 1 with others)"
    )
    command.add_argument(
        "--max-seconds",
        type=_max_seconds,
        help="split longer audio in pauses; models that have heard single sentences lose "
        f"themselves in longer segments (default: {shipped.segment_seconds(shipped.DEFAULT):g} for "
        f"{shipped.DEFAULT}, {shipped.segment_seconds(shipped.TINY):g} for others; for a Whisper, "
        "its window)",
    )
    command.add_argument(
        "--speech-threshold",
        type=float,
        help="probability of speech from which on audio is transcribed; 0: all of it "
        f"(default: {IN_PROCESS['speech_threshold']})",
    )
    command.add_argument(
        "--trust",
        action="store_true",
        default=None,
        help="keep transcripts that retrieval or phrases made loop, and what retrieval made that "
        "the language model finds absurd; else they are made again without",
    )
    command.add_argument(
        "--unclear",
        choices=("keep", "empty"),
        help="what becomes of the words of a segment that is too unsure to be relied on (default: "
        f"{IN_PROCESS['unclear']})",
    )
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument(
        "--url",
        help="let a running endpoint transcribe (make serve: http://127.0.0.1:8000); it decides "
        f"for itself on {', '.join(map(_flag, IN_PROCESS))}; the environment variable {KEY} holds "
        "the API key, if it wants one",
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a segment of audio; with --url, one a file",
    )
    administration.add_commands(commands)
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _models(name: str) -> str:
    """A model's name, checked as far as that needs no model."""
    try:
        shipped.find(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _file(name: str) -> Location:
    try:
        return located(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _max_seconds(text: str) -> float:
    if not float(text) >= 1:
        raise argparse.ArgumentTypeError(f"{text} leaves no room to cut: at least 1 second")
    return float(text)


def _print(file: Location, transcript: Transcript, as_json: bool) -> None:
    if as_json:
        fields = {"file": printable(file), **asdict(transcript)}
        told = json.dumps(fields, ensure_ascii=False)
        print(told if terminal.shows(told) else json.dumps(fields))
        return
    marked = " ".join(map(_marked, transcript.words))
    if transcript.unclear or any(word.unclear for word in transcript.words):
        marked = f"{marked} [dim](unclear)[/]".strip()
    marked = marked or "[dim](nothing said)[/]"
    console.print(
        f"{_shown(printable(file))}  {transcript.start:.1f}–{transcript.end:.1f} s\n  {marked}"
    )
    for word in transcript.words:
        if word.changed and word.source:
            source = word.source
            evidence = [] if source.document == source.text else [_shown(source.document)]
            if source.attention is not None:
                evidence.append(f"attention {source.attention:.0%}")
            if source.distance is not None:
                evidence.append(f"distance {source.distance:.1f}")
            where = f"{', '.join(evidence)}: " if evidence else ""
            console.print(
                f"    [green]{_shown(word.text)}[/]  p {word.lm_probability:.2f} -> "
                f"{word.probability:.2f}  from {where}“{_shown(source.text)}”"
            )


def _marked(word: Word) -> str:
    """A word as it is shown: green where retrieval changed it, dim where it is unclear."""
    style = " ".join(("bold green",) * word.changed + ("dim",) * word.unclear)
    return f"[{style}]{_shown(word.text)}[/]" if style else _shown(word.text)


def _complain(file: Location, reason: str) -> None:
    _say(f"{printable(file)}: {reason}")


def _say(what: str) -> None:
    """One line, whatever is in it."""
    print(_visible(f"mmrag: {' '.join(what.split())}"), file=sys.stderr)


def _shown(text: str) -> str:
    """Text as the console's markup says it."""
    return escape(_visible(text))


def _visible(text: str) -> str:
    """Text without what a terminal would obey: others may have named what is retrieved."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
