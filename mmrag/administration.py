"""`mmrag datastore`: what is in a datastore's directory, and what keeps it in order."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrag import shipped
from mmrag.folders import printable

if TYPE_CHECKING:
    from mmrag.client import Service
    from mmrag.retrieval.datastore import Datastore

console = Console(highlight=False, soft_wrap=True)
KEY = "MMRAG_API_KEY"
"""Environment variable: a command line is everybody's to read."""
TEXTS = "a text a line: a phrase of up to five words, or a sentence"
LISTED = 20
"""Documents that `show` names."""


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
    adding.add_argument("file", type=Path, help=TEXTS)
    searching = command("search", _search, "what is near, token by token, to a text or a recording")
    searching.add_argument("directory", type=Path)
    searching.add_argument("query", help="a text, or an audio file of one sentence")
    searching.add_argument("-k", type=int, default=4, help="neighbours (default: %(default)s)")
    for one in (creating, adding, searching):
        one.add_argument(
            "--models", default=shipped.TINY, help="that key it (default: %(default)s)"
        )
    for name, run, help in (
        ("show", _show, "what made a datastore, and what is in it"),
        ("stats", _stats, "how a datastore is filled: segments, documents, index, bytes"),
        ("verify", _verify, "check every byte; exit status 1 where something is wrong"),
    ):
        command(name, run, help).add_argument("directory", type=Path)
    compacting = command("compact", _compact, "merge small segments, and erase what was deleted")
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
    for one in (listing, creating, adding, deleting):
        one.add_argument(
            "--url",
            help="of a running endpoint, whose datastore's name then stands for the directory; the "
            f"environment variable {KEY} holds the API key, if it wants one",
        )
    snapshot = command("snapshot", _snapshot, "give the present state a name, or go back to one")
    snapshot.add_argument("action", choices=("create", "list", "rollback", "drop"))
    snapshot.add_argument("directory", type=Path)
    snapshot.add_argument("name", nargs="?", help="of the snapshot; not for list")


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

    return Service(options.url, os.environ.get(KEY))


def _list(options: argparse.Namespace) -> bool:
    from mmrag.retrieval.datastore import Datastore
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
            told = _described(Datastore.open(path))
        except DatastoreError as error:
            print(f"mmrag: {error}", file=sys.stderr)
            failed = True
            continue
        if options.json:
            print(json.dumps({"name": path.name, **told}))
        numbers = (told[name] for name in ("entries", "deleted", "documents"))
        size = f"{told['bytes'] / 1e6:.1f}"
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
    from mmrag import contents, recogniser

    models = recogniser.load(options.models)
    added = contents.create(options.directory, texts, models, spoken=not options.text_only)
    told = {"created": str(options.directory), "added": added}
    return _told(options, told, f"{printable(options.directory)}: {added:,} entries")


def _add(options: argparse.Namespace) -> bool:
    texts = _lines(options.file)
    if options.url is not None:
        told = _service(options).add(str(options.directory), texts)
    else:
        from mmrag import contents, recogniser

        told = {"added": contents.add(options.directory, texts, recogniser.load(options.models))}
    return _told(options, told, f"{printable(options.directory)}: {told['added']:,} entries more")


def _search(options: argparse.Namespace) -> bool:
    from mmrag import contents, recogniser
    from mmrag.config import Decode

    if options.k < 1:
        raise ValueError(f"-k {options.k}: at least one neighbour")
    query = Path(options.query) if Path(options.query).is_file() else options.query
    decode = Decode(beams=1, length_penalty=0.6, tokens_per_second=16, max_seconds=30)
    models = recogniser.load(options.models)
    found = contents.look_up(options.directory, models, query, options.k, decode)
    if options.json:
        for one in found:
            print(json.dumps(asdict(one), ensure_ascii=False))
        return False
    table = Table(title=printable(options.directory), title_justify="left")
    for name in ("before", "says", "distance", "document", "around it"):
        table.add_column(name, justify="right" if name == "distance" else "left")
    for one in found:
        for number, near in enumerate(one.neighbours):
            shown = (one.token if not number else "", near.token, f"{near.distance:.4g}")
            table.add_row(*map(escape, (*shown, near.document, near.window)))
        table.add_section()
    console.print(table)
    return False


def _lines(file: Path) -> list[str]:
    from mmrag.text import read_lines

    return [line for _, line in read_lines(file)]


def _told(options: argparse.Namespace, told: dict[str, Any], line: str) -> bool:
    print(json.dumps(told)) if options.json else console.print(line, markup=False)
    return False


def _show(options: argparse.Namespace) -> bool:
    import numpy as np

    from mmrag.retrieval import snapshots
    from mmrag.retrieval.datastore import Datastore
    from mmrag.retrieval.held_out import NEAREST
    from mmrag.retrieval.index import chosen_index, saved_shards

    datastore = Datastore.open(options.directory)
    told = _described(datastore)
    documents, counts = datastore.document_counts()
    largest = np.argsort(-counts, kind="stable")[:LISTED]
    names = datastore.document_names(documents[largest])
    told["largest_documents"] = dict(zip(names, counts[largest].tolist(), strict=True))
    told["snapshots"] = [asdict(one) for one in snapshots.every(options.directory)]
    shards = [chosen_index(shard) for shard in saved_shards(options.directory)]
    told["index"] = [{"chosen": why, f"recall_at_{NEAREST}": recall} for why, recall in shards]
    if options.json:
        print(json.dumps(told))
        return False
    table = Table(title=printable(options.directory), title_justify="left", show_header=False)
    for name, value in told.items():
        if name == "identity":
            value = ", ".join(f"{role} {fingerprint}" for role, fingerprint in value.items())
        elif name == "largest_documents":
            value = "\n".join(f"{count:>6,}  {document}" for document, count in value.items())
        elif name == "index":
            value = "\n".join(map(_shard, shards))
        elif name == "snapshots":
            value = "\n".join(f"{one['name']}: {one['entries']:,} entries" for one in value)
        elif name == "bytes":
            value = ", ".join(f"{key} {size / 1e6:.1f} MB" for key, size in _sizes(datastore))
        elif isinstance(value, int):
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), str(value) or "–")
    console.print(table, markup=False)
    return False


def _stats(options: argparse.Namespace) -> bool:
    import numpy as np

    from mmrag.retrieval.datastore import Datastore, read_list
    from mmrag.retrieval.phrases import typical_distance

    datastore = Datastore.open(options.directory)
    sizes = [one["entries"] for one in read_list(options.directory)["segments"]]
    _, counts = datastore.document_counts()
    shares = (5, 50, 95)
    told = {
        "entries": datastore.entries,
        "deleted": len(datastore.deleted),
        "segments": len(sizes),
        "segment_entries": dict(zip(("smallest", "largest"), _ends(sizes), strict=True)),
        "documents": len(counts),
        "document_entries": {
            f"p{share}": int(np.percentile(counts, share)) if len(counts) else 0 for share in shares
        },
        "typical_distance": typical_distance(datastore),
        "bytes_per_entry": {
            name: round(size / max(1, datastore.entries), 1) for name, size in _sizes(datastore)
        },
    }
    if options.json:
        print(json.dumps(told))
        return False
    table = Table(title=printable(options.directory), title_justify="left", show_header=False)
    for name, value in told.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {one:,}" for key, one in value.items())
        elif isinstance(value, float):
            value = f"{value:.4g}"
        table.add_row(name.replace("_", " "), str(value))
    console.print(table, markup=False)
    return False


def _ends(sizes: list[int]) -> tuple[int, int]:
    return (min(sizes), max(sizes)) if sizes else (0, 0)


def _shard(chosen: tuple[str, float | None]) -> str:
    why, recall = chosen
    return why if recall is None else f"{why}; recall {recall:.3f}"


def _verify(options: argparse.Namespace) -> bool:
    from mmrag.retrieval.verify import verify

    problems = 0
    for problem in verify(options.directory):
        problems += 1
        print(json.dumps({"problem": problem}) if options.json else problem)
    if not problems and not options.json:
        console.print(f"{printable(options.directory)} is whole")
    return problems > 0


def _compact(options: argparse.Namespace) -> bool:
    from mmrag.retrieval.compaction import compact

    done = compact(options.directory, everything=options.all)
    if options.json:
        print(json.dumps(asdict(done)))
    elif done.made:
        console.print(
            f"{done.merged} segments became {done.made}; {done.erased} deleted entries are erased"
        )
    else:
        console.print("there is nothing to merge or to erase")
    return False


def _index(options: argparse.Namespace) -> bool:
    from mmrag.config import Index
    from mmrag.retrieval.index import build_again

    given = {"entry_bytes": options.entry_bytes, "min_recall": options.min_recall}
    given = {name: value for name, value in given.items() if value is not None}
    settings = Index(kind=options.kind, shards=options.shards, **given)
    for shard in build_again(options.directory, settings):
        told = {"entries": shard.stop - shard.start, "chosen": shard.why, "recall": shard.recall}
        _told(options, told, _shard((shard.why, shard.recall)))
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
    from mmrag.retrieval import snapshots

    if (options.name is None) != (options.action == "list"):
        how = "without a name" if options.action == "list" else "with a name"
        raise ValueError(f"snapshot {options.action} goes {how}")
    if options.action == "list":
        for one in snapshots.every(options.directory):
            line = f"{one.name}: {one.entries:,} entries, of which {one.deleted:,} are deleted"
            print(json.dumps(asdict(one)) if options.json else line)
        return False
    getattr(snapshots, options.action)(options.directory, options.name)
    done = {"create": "made", "rollback": "is what the datastore is again", "drop": "dropped"}
    told = {"snapshot": options.name, "done": options.action}
    line = f"snapshot {options.name}: {done[options.action]}"
    print(json.dumps(told) if options.json else line)
    return False


def _described(datastore: Datastore) -> dict[str, Any]:
    """What there is to tell of a datastore."""
    told = datastore.description
    return {
        "audio": told.audio,
        "identity": told.identity,
        "width": told.width,
        "window": told.window,
        "metric": told.metric,
        "entries": datastore.entries,
        "deleted": len(datastore.deleted),
        "documents": len(datastore.document_counts()[0]),
        "segments": len(datastore.segments),
        "bytes": sum(size for _, size in _sizes(datastore)),
    }


def _sizes(datastore: Datastore) -> list[tuple[str, int]]:
    """Bytes on the disk: keys, windows, the rest of the segments, the index."""
    sizes = {"keys": 0, "windows": 0, "names and numbers": 0, "index": 0}
    indexes = {one.name for one in datastore.directory.glob("index*")}
    for file in datastore.directory.rglob("*"):
        if file.is_file():
            kind = file.stem if file.stem in sizes else "names and numbers"
            kind = "index" if file.relative_to(datastore.directory).parts[0] in indexes else kind
            sizes[kind] += file.stat().st_blocks * 512
    return list(sizes.items())


def _audio(kind: str) -> str:
    return {"paired": "recordings", "spoken": "synthetic speech", "none": "text"}[kind]
