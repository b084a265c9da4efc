"""`mmrag datastore`: what is in a datastore's directory, and what keeps it in order."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrag import shipped, terminal
from mmrag.entry_options import (
    add_speaking,
    add_wording,
    refuse_speaking,
    speaking,
    worded,
    wording,
    wording_flags,
)
from mmrag.folders import printable

if TYPE_CHECKING:
    from mmrag.client import Service
    from mmrag.config import Decode
    from mmrag.retrieval.wording import Entry

console = Console(highlight=False, soft_wrap=True)
KEY = "MMRAG_API_KEY"
"""Environment variable: a command line is everybody's to read."""
TEXTS = (
    "a text a line: a phrase of up to five words, or a sentence; or a JSON object of text, "
    "display_as, pronunciations, weight and language"
)
SNAPSHOT_TASKS = {
    "create": ("create_snapshot", "made"),
    "list": ("list_snapshots", ""),
    "rollback": ("roll_back", "is what the datastore is again"),
    "drop": ("drop_snapshot", "dropped"),
}
"""Action -> the task of `upkeep`, and what is said of it."""


def add_commands(commands: Any) -> None:
    """Add `datastore` and what can be done with one to a parser's commands."""
    parser = commands.add_parser("datastore", help="look at datastores, and keep them in order")
    kinds = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], bool], help: str) -> Any:
        made = kinds.add_parser(name, help=help)
        made.add_argument("--json", action="store_true", help="one JSON object a line")
        made.set_defaults(run=run)
        return made

    listing = command("list", _list, "the datastores below a directory, or of an endpoint")
    listing.add_argument("directory", type=Path, nargs="?", help="where they lie side by side")
    creating = command("create", _create, "make a datastore, empty or of a file's lines")
    creating.add_argument("directory", type=Path)
    creating.add_argument("file", type=Path, nargs="?", help=TEXTS)
    creating.add_argument(
        "--text-only", action="store_true", help="texts are read, and not said by a synthesizer"
    )
    adding = command("add", _add, "put a file's lines into a datastore")
    adding.add_argument("directory", type=Path)
    adding.add_argument("file", type=Path, nargs="?", help=TEXTS)
    adding.add_argument("--text", help="one entry more, to which the options below belong")
    searching = command("search", _search, "what is near, token by token, to a text or a recording")
    searching.add_argument("directory", type=Path)
    searching.add_argument("query", help="a text, or an audio file of one sentence")
    searching.add_argument("-k", type=int, default=4, help="neighbours (default: %(default)s)")
    searching.add_argument(
        "--hear",
        action="store_true",
        help="what the text, as an entry, would be confused with, and what the models hear when it "
        "is said, without the datastore",
    )
    for one in (adding, searching):
        add_wording(one)
    for one in (creating, adding, searching):
        add_speaking(one)
        one.add_argument(
            "--models",
            help=f"that key it (default: {shipped.DEFAULT}); not with --url, which has its own",
        )
    kept = []
    for name, run, help in (
        ("show", _show, "what made a datastore, and what is in it"),
        ("stats", _stats, "how a datastore is filled: segments, documents, index, bytes"),
        ("verify", _verify, "check every byte; exit status 1 where something is wrong"),
    ):
        kept.append(command(name, run, help))
        kept[-1].add_argument("directory", type=Path)
    compacting = command(
        *("compact", _compact),
        "merge small segments, erase what was deleted, and index it anew where much has changed",
    )
    compacting.add_argument("directory", type=Path)
    compacting.add_argument(
        "--all", action="store_true", help="also where there is little to merge or to erase"
    )
    indexing = command("index", _index, "index it anew, beside the index that there is")
    indexing.add_argument("directory", type=Path)
    indexing.add_argument(
        "--shards", type=int, default=1, help="in so many shards (default: %(default)s)"
    )
    indexing.add_argument("--kind", choices=("auto", "flat"), default="auto")
    indexing.add_argument(
        "--entry-bytes", type=int, help="auto: memory that an entry may take, its code and 8 bytes"
    )
    indexing.add_argument("--min-recall", type=float, help="below which it is not used")
    deleting = command("delete", _delete, "delete documents, by name")
    deleting.add_argument("directory", type=Path)
    deleting.add_argument("documents", nargs="+", metavar="DOCUMENT")
    snapshot = command("snapshot", _snapshot, "give the present state a name, or go back to one")
    snapshot.add_argument("action", choices=("create", "list", "rollback", "drop"))
    snapshot.add_argument("directory", type=Path)
    snapshot.add_argument("name", nargs="?", help="of the snapshot; not for list")
    changing = (creating, adding, deleting, compacting, indexing, snapshot)
    for one in (listing, searching, *kept, *changing):
        one.add_argument(
            "--url",
            help="of a running endpoint, whose datastore's name then stands for the directory; the "
            f"environment variable {KEY} holds the API key, if it wants one",
        )


def run(options: argparse.Namespace) -> bool:
    """Do what was asked for; whether something is wrong. Errors end the program, by name."""
    from mmrag.artifact import ArtifactError
    from mmrag.client import ServiceError
    from mmrag.retrieval.segment import DatastoreError

    known = (ArtifactError, DatastoreError, ServiceError, ImportError, OSError, ValueError)
    try:
        return options.run(options)
    except known as error:
        sys.exit(f"mmrag: {error}")


def _service(options: argparse.Namespace) -> Service:
    from mmrag.client import Service

    if getattr(options, "models", None):
        raise ValueError("--models goes without --url: an endpoint has its own")
    refuse_speaking(options, "an endpoint has texts said by its own voices")
    return Service(options.url, os.environ.get(KEY))


def _list(options: argparse.Namespace) -> bool:
    from mmrag.retrieval import upkeep
    from mmrag.retrieval.segment import DatastoreError

    if (options.url is None) == (options.directory is None):
        raise ValueError("list: a directory, or the --url of an endpoint")
    if options.url is not None:
        return _listed(options)
    table = Table(title=f"datastores in {printable(options.directory)}", title_justify="left")
    for name in ("name", "keyed over", "entries", "deleted", "documents", "segments", "MB"):
        table.add_column(name, justify="left" if name in ("name", "keyed over") else "right")
    failed = False
    for path in sorted(options.directory.iterdir()):
        if not (path / "datastore.json").is_file():
            continue
        try:
            told = upkeep.summary(path)
        except DatastoreError as error:
            print(f"mmrag: {error}", file=sys.stderr)
            failed = True
            continue
        if options.json:
            print(json.dumps({"name": path.name, **told}))
        numbers = (told[name] for name in ("entries", "deleted", "documents"))
        size = f"{sum(told['bytes'].values()) / 1e6:.1f}"
        table.add_row(
            *(printable(Path(path.name)), _audio(told["audio"]), *(f"{n:,}" for n in numbers)),
            *(str(told["segments"]), size),
        )
    if not options.json:
        console.print(table)
    return failed


def _listed(options: argparse.Namespace) -> bool:
    """The datastores of an endpoint."""
    found = _service(options).datastores()
    if options.json:
        for one in found:
            print(json.dumps(one))
        return False
    table = Table(title=f"datastores of {options.url}", title_justify="left")
    for name in ("name", "keyed over", "entries", "documents"):
        table.add_column(name, justify="left" if name in ("name", "keyed over") else "right")
    for one in found:
        counts = (f"{one[name]:,}" for name in ("entries", "documents"))
        table.add_row(one["id"], _audio(one["audio"]), *counts)
    console.print(table)
    return False


def _create(options: argparse.Namespace) -> bool:
    texts = _lines(options.file) if options.file else []
    if options.url is not None:
        if options.text_only:
            raise ValueError("--text-only: an endpoint has texts said by its synthesizer")
        made = _service(options).create(str(options.directory), texts)
        return _told(options, made, f"{options.directory}: {made['entries']:,} entries")
    if options.text_only:
        refuse_speaking(options, "with --text-only nobody speaks")
    from mmrag import contents, recogniser

    voices = speaking(options)
    models = recogniser.load(options.models or shipped.DEFAULT)
    with terminal.progress("putting texts in") as progress:
        given = options.directory, texts, models, not options.text_only
        added = contents.create(*given, progress=progress, speaking=voices)
    told = {"created": str(options.directory), "added": added}
    return _told(options, told, f"{printable(options.directory)}: {added:,} entries")


def _add(options: argparse.Namespace) -> bool:
    texts = _lines(options.file) if options.file else []
    if options.text is not None:
        texts = [*texts, worded(options, options.text)]
    elif wording(options):
        raise ValueError(f"{wording_flags(options)} goes with --text")
    elif options.file is None:
        raise ValueError("add: a file, or --text")
    if options.url is not None:
        told = _service(options).add(str(options.directory), texts)
    else:
        from mmrag import contents, recogniser

        voices = speaking(options)
        models = recogniser.load(options.models or shipped.DEFAULT)
        with terminal.progress("putting texts in") as progress:
            told = {"added": contents.add(options.directory, texts, models, progress, voices)}
    return _told(options, told, f"{printable(options.directory)}: {told['added']:,} entries more")


def _previewed(options: argparse.Namespace) -> bool:
    """What an entry would be confused with."""
    [told] = _preview(options, worded(options, options.query))
    if options.json:
        print(json.dumps(told, ensure_ascii=False))
        return False
    line = f"{told['text']}: the model writes “{told['writes']}”, transcripts “{told['shows']}”"
    console.print(line, markup=False)
    for one in told["heard"]:
        verdict = "heard" if one["right"] else "not heard"
        said = f"  said as {one['pronunciation']}: “{one['heard']}” ({verdict})"
        console.print(said, markup=False)
    table = Table(title="may be confused with", title_justify="left")
    for name in ("what", "kind", "sounds alike", "loses votes", "takes votes"):
        table.add_column(name, justify="left" if name in ("what", "kind") else "right")
    for one in told["confused_with"]:
        shares = (one.get(name) for name in ("sound", "loses", "takes"))
        shown = ("–" if share is None else f"{share:.0%}" for share in shares)
        table.add_row(escape(one["text"]), one["kind"], *shown)
    console.print(table if told["confused_with"] else "nothing is like it")
    return False


def _preview(options: argparse.Namespace, one: Entry) -> list[dict[str, Any]]:
    if options.url is not None:
        return _service(options).preview(str(options.directory), [one])
    from mmrag import contents, recogniser
    from mmrag.decoding.tune import default, tuned
    from mmrag.retrieval.datastore import Datastore

    voices, name = speaking(options), options.models or shipped.DEFAULT
    models, store = recogniser.load(name), Datastore.open(options.directory)
    foreign = recogniser.is_whisper(name)  # whose checkpoint holds nothing of ours
    below = store.directory.parent.parent if foreign else shipped.find(name)
    chosen = tuned(below, store.directory) or default(below, store)
    how = _plainly(), chosen.knn.temperature, voices
    found = contents.preview(options.directory, models, [one], *how)
    return [asdict(told) for told in found]


def _plainly() -> Decode:
    """How what is looked up is transcribed."""
    from mmrag.config import Decode

    return Decode(length_penalty=0.6, tokens_per_second=16, max_seconds=30)


def _search(options: argparse.Namespace) -> bool:
    if options.hear:
        return _previewed(options)
    if wording(options):
        raise ValueError(f"{wording_flags(options)} goes with --hear")
    refuse_speaking(options, "nobody speaks without --hear")
    if options.k < 1:
        raise ValueError(f"-k {options.k}: at least one neighbour")
    found = _looked_up(options)
    if options.json:
        for one in found:
            print(json.dumps(one, ensure_ascii=False))
        return False
    table = Table(title=_named(options), title_justify="left")
    for name in ("before", "says", "distance", "document", "around it"):
        table.add_column(name, justify="right" if name == "distance" else "left")
    for one in found:
        for number, near in enumerate(one["neighbours"]):
            shown = (one["token"] if not number else "", near["token"], f"{near['distance']:.4g}")
            table.add_row(*map(escape, (*shown, near["document"], near["window"])))
        table.add_section()
    console.print(table)
    return False


def _looked_up(options: argparse.Namespace) -> list[dict[str, Any]]:
    query = Path(options.query)
    asked = query if query.is_file() else options.query
    if options.url is not None:
        return _service(options).look_up(str(options.directory), asked, options.k)
    from mmrag import contents, recogniser

    models = recogniser.load(options.models or shipped.DEFAULT)
    found = contents.look_up(options.directory, models, asked, options.k, _plainly())
    return [asdict(one) for one in found]


def _lines(file: Path) -> list[Entry]:
    from mmrag.retrieval.wording import read_entries

    return read_entries(file)


def _told(options: argparse.Namespace, told: dict[str, Any], line: str) -> bool:
    print(json.dumps(told)) if options.json else console.print(line, markup=False)
    return False


def _show(options: argparse.Namespace) -> bool:
    told = _done(options, "overview")
    if options.json:
        print(json.dumps(told))
        return False
    lines = {
        "identity": lambda made: ", ".join(map(" ".join, made.items())),
        "largest_documents": lambda counts: "\n".join(
            f"{count:>6,}  {document}" for document, count in counts.items()
        ),
        "index": lambda shards: "\n".join(_shard(*shard.values()) for shard in shards),
        "snapshots": lambda named: "\n".join(
            f"{one['name']}: {one['entries']:,} entries" for one in named
        ),
        "bytes": lambda sizes: ", ".join(
            f"{key} {size / 1e6:.1f} MB" for key, size in sizes.items()
        ),
    }
    return _tabled(options, told, lines)


def _stats(options: argparse.Namespace) -> bool:
    told = _done(options, "statistics")
    if options.json:
        print(json.dumps(told))
        return False
    return _tabled(options, told, {})


def _tabled(
    options: argparse.Namespace, told: dict[str, Any], lines: Mapping[str, Callable[[Any], str]]
) -> bool:
    """A row a value, as `lines` or its kind say."""
    table = Table(title=_named(options), title_justify="left", show_header=False)
    for name, value in told.items():
        if name in lines:
            value = lines[name](value)
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {one:,}" for key, one in value.items())
        elif isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, int):
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), str(value) or "–")
    console.print(table, markup=False)
    return False


def _shard(why: str, recall: float | None) -> str:
    return why if recall is None else f"{why}; recall {recall:.3f}"


def _verify(options: argparse.Namespace) -> bool:
    problems = _done(options, "verify")["problems"]
    for problem in problems:
        print(json.dumps({"problem": problem}) if options.json else problem)
    if not problems and not options.json:
        console.print(f"{_named(options)} is whole")
    return bool(problems)


def _compact(options: argparse.Namespace) -> bool:
    done = _done(options, "compact", everything=options.all)
    lines = []
    if done["made"]:
        line = "{merged} segments became {made}; {erased} deleted entries are erased"
        lines.append(line.format(**done))
    if again := done["index"]:
        lines.append(f"indexed anew, since {again['why']}:")
        lines += [_shard(one["chosen"], one["recall"]) for one in again["shards"]]
    return _told(options, done, "\n".join(lines) or "there is nothing to merge or to erase")


def _index(options: argparse.Namespace) -> bool:
    given = {"entry_bytes": options.entry_bytes, "min_recall": options.min_recall}
    given = {name: value for name, value in given.items() if value is not None}
    done = _done(options, "index", kind=options.kind, shards=options.shards, **given)
    for one in done["shards"]:
        _told(options, one, _shard(one["chosen"], one["recall"]))
    return False


def _delete(options: argparse.Namespace) -> bool:
    if options.url is not None:
        service = _service(options)
        for document in options.documents:
            told = service.remove(str(options.directory), document)
            _told(options, told, f"{document}: {told['deleted']} entries deleted")
        return False
    from mmrag.retrieval.datastore import Datastore, delete

    datastore = Datastore.open(options.directory)
    failed = False
    for document in options.documents:
        entries = datastore.entries_of([document])
        if not len(entries):
            print(f"mmrag: {datastore} has no document {document!r}", file=sys.stderr)
            failed = True
            continue
        delete(options.directory, entries)
        told = {"document": document, "deleted": len(entries)}
        console.print(
            json.dumps(told) if options.json else f"{document}: {len(entries)} entries deleted",
            markup=False,
        )
    return failed


def _snapshot(options: argparse.Namespace) -> bool:
    if (options.name is None) != (options.action == "list"):
        how = "without a name" if options.action == "list" else "with a name"
        raise ValueError(f"snapshot {options.action} goes {how}")
    task, done = SNAPSHOT_TASKS[options.action]
    if options.action == "list":
        for one in _done(options, task)["snapshots"]:
            line = "{name}: {entries:,} entries, of which {deleted:,} are deleted".format(**one)
            _told(options, one, line)
        return False
    told = _done(options, task, name=options.name)
    return _told(options, told, f"snapshot {options.name}: {done}")


def _done(options: argparse.Namespace, task: str, **given: Any) -> dict[str, Any]:
    """What a task of `upkeep` tells, done here or by an endpoint."""
    if options.url is not None:
        return _service(options).tend(str(options.directory), task, given)
    from mmrag.retrieval import upkeep

    return getattr(upkeep, task)(options.directory, **given)


def _named(options: argparse.Namespace) -> str:
    """A datastore as its user knows it."""
    return f"{options.directory} of {options.url}" if options.url else printable(options.directory)


def _audio(kind: str) -> str:
    return {"paired": "recordings", "spoken": "synthetic speech", "none": "text"}[kind]
