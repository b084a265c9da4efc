"""`mmrag datastore`: what is in a datastore's directory, and what keeps it in order."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mmrag.folders import printable

if TYPE_CHECKING:
    from mmrag.retrieval.datastore import Datastore

console = Console(highlight=False, soft_wrap=True)
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

    listing = command("list", _list, "the datastores below a directory")
    listing.add_argument("directory", type=Path, help="where datastores lie side by side")
    for name, run, help in (
        ("show", _show, "what made a datastore, and what is in it"),
        ("verify", _verify, "check every byte; exit status 1 where something is wrong"),
    ):
        command(name, run, help).add_argument("directory", type=Path)
    compacting = command("compact", _compact, "merge small segments, and erase what was deleted")
    compacting.add_argument("directory", type=Path)
    compacting.add_argument(
        "--all", action="store_true", help="also where there is little to merge or to erase"
    )
    deleting = command("delete", _delete, "delete documents, by name")
    deleting.add_argument("directory", type=Path)
    deleting.add_argument("documents", nargs="+", metavar="DOCUMENT")
    snapshot = command("snapshot", _snapshot, "give the present state a name, or go back to one")
    snapshot.add_argument("action", choices=("create", "list", "rollback", "drop"))
    snapshot.add_argument("directory", type=Path)
    snapshot.add_argument("name", nargs="?", help="of the snapshot; not for list")


def run(options: argparse.Namespace) -> bool:
    """Do what was asked for; whether something is wrong. Errors end the program, by name."""
    from mmrag.retrieval.segment import DatastoreError

    try:
        return options.run(options)
    except (DatastoreError, OSError, ValueError) as error:
        sys.exit(f"mmrag: {error}")


def _list(options: argparse.Namespace) -> bool:
    from mmrag.retrieval.datastore import Datastore
    from mmrag.retrieval.segment import DatastoreError

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


def _delete(options: argparse.Namespace) -> bool:
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
    for file in datastore.directory.rglob("*"):
        if file.is_file():
            kind = file.stem if file.stem in sizes else "names and numbers"
            kind = "index" if "index" in file.relative_to(datastore.directory).parts else kind
            sizes[kind] += file.stat().st_blocks * 512
    return list(sizes.items())


def _audio(kind: str) -> str:
    return {"paired": "recordings", "spoken": "synthetic speech", "none": "text"}[kind]
