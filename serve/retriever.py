"""The retriever: datastores by name, their index shards, and the phrases that come with a request.

It keeps the datastores' directory, starts the shards' actors and hands out handles to them, which
the decoder then searches itself. The directory is the truth: every replica sees what another has
changed when it next resolves the name, and a restart finds everything.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from cluster.pool import PooledRetriever, serve_pooled
from cluster.shards import ShardedRetriever, serve_shards
from mmrag import durable
from mmrag.artifact import ArtifactError
from mmrag.decoding.spotting import spells_all
from mmrag.decoding.tune import tuned
from mmrag.retrieval import datastore as stored
from mmrag.retrieval import upkeep
from mmrag.retrieval.confusion import Preview, common_words, confusable, written
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.display import Display
from mmrag.retrieval.index import index_directory, save_index, saved_shards
from mmrag.retrieval.phrases import Phrases, are_phrases, fresh
from mmrag.retrieval.reindexing import TooManyShardsError, behind
from mmrag.retrieval.segment import DatastoreError, Segment, join
from mmrag.retrieval.snapshots import SnapshotError
from mmrag.retrieval.terms import anything
from mmrag.retrieval.wording import Entry
from serve import logs, shelf
from serve.access.tenants import DEFAULT, directory_of, own_name, place_of, tenant_at, tenant_of
from serve.additions import Additions
from serve.handles import by_reference
from serve.housekeeping import APART, Housekeeping
from serve.messages import (
    DatastoreExists,
    DatastoreSummary,
    InvalidRequest,
    QuotaExceeded,
    ResolvedDatastore,
    Room,
    Unavailable,
    UnknownDatastore,
)
from serve.model import described, retrieval_defaults, tuned_below
from serve.phrases import SpokenPhrases
from serve.pronouncing import Pronouncing
from serve.settings import Settings

KEPT_OPEN = 500
"""Datastores in the pool that a replica has open itself: each maps a dozen files a segment."""
SHARD_CPUS = "retriever.shard_cpus"
"""The setting of what each actor of a datastore reserves."""
log = logging.getLogger("ray.serve")


@dataclass
class OpenDatastore:
    """A datastore that is being served."""

    datastore: Datastore
    retriever: ShardedRetriever
    uid: str
    version: tuple[int, ...]
    index: str
    """The directory of the index that the retriever searches, or of one before it."""
    found: ResolvedDatastore


class Retriever:
    """Owns the datastores."""

    def __init__(
        self, settings: Settings, encoder: DeploymentHandle, decoder: DeploymentHandle
    ) -> None:
        self._settings = settings
        self._decoder = by_reference(decoder)
        logs.install(settings.logs)
        known = described(settings)
        self._keyed_by, self._vocabulary = known.keyed_by, known.vocabulary
        self._words: list[str] | None = None
        self._pronouncing = Pronouncing()
        models = by_reference(encoder), self._decoder, known.vocabulary
        self._additions = Additions(*models, settings.speaking)
        self._tuned = tuned_below(settings)
        self._app = serve.get_replica_context().app_name
        self._root = settings.datastores
        self._root.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, OpenDatastore] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._phrases = SpokenPhrases(self._additions, known.width)
        self._preload = list(settings.preload)
        self._housekeeping = Housekeeping(settings.retriever.shard_cpus, SHARD_CPUS)
        self._taking_up: dict[str, asyncio.Task] = {}

    async def alive(self) -> None:
        """Returns: this replica takes calls."""

    async def check_health(self) -> None:
        """Open what is preloaded, and call every open shard, which keeps it alive.

        RuntimeError if none of a datastore's shards answers.
        """
        while self._preload:
            await self.resolve(self._preload.pop())
        for name, one in list(self._open.items()):
            missing = await asyncio.to_thread(
                one.retriever.ping, self._settings.retriever.answer_seconds
            )
            if missing:
                await asyncio.to_thread(self._serve, one.datastore, one.uid, one.index)
                self._open.pop(name, None)

    async def resolve(self, name: str) -> ResolvedDatastore:
        """A datastore's shards and retrieval parameters.

        Raises UnknownDatastore, or DatastoreError if it is damaged or another model's.
        """
        async with self._locks[name]:
            return (await self._opened(name)).found

    async def stored(self, tenant: str = DEFAULT) -> list[DatastoreSummary]:
        """Every datastore of a tenant that can be read."""
        found = []
        for path in self._all(tenant):
            try:
                found.append(await asyncio.to_thread(shelf.summary, path))
            except (UnknownDatastore, DatastoreError) as error:  # just deleted, or damaged
                log.warning("%s", error)
        return found

    async def describe(self, name: str) -> DatastoreSummary:
        """A datastore, without starting its shards."""
        return await asyncio.to_thread(shelf.summary, self._path(name))

    async def create(
        self, name: str, given: Sequence[Entry], room: Room | None = None
    ) -> DatastoreSummary:
        """Make a datastore of these entries; DatastoreExists if the name is taken, QuotaExceeded
        where the tenant has no `room` for it."""
        self._require_room(name, room)
        hurried = self._additions.hurried(given)
        return await self._create(name, await self._additions.spoken(given, hurried), room)

    async def create_paired(
        self,
        name: str,
        texts: Sequence[str],
        waves: Sequence[Sequence[np.ndarray]],
        room: Room | None = None,
    ) -> DatastoreSummary:
        """Make a datastore of recordings and what is said in them."""
        self._require_room(name, room)
        return await self._create(name, await self._additions.paired(texts, waves), room)

    async def add(
        self, name: str, given: Sequence[Entry], room: Room | None = None
    ) -> tuple[int, int]:
        """Add entries, those that are there already left out, and those that are there with another
        wording replaced: entries added, and all there are.

        When it returns, every shard knows them.
        """
        async with self._locks[name]:
            new = fresh((await self._opened(name)).datastore, given)
        # Meanwhile it is searched: a synthesizer may take long.
        segments = await self._additions.spoken(new, self._additions.hurried(new))
        async with self._locks[name]:
            one = await self._opened(name)
            replaced = one.datastore.entries_of(each.text for each in new)
            return await self._append(one, name, segments, room, replaced.tolist())

    async def add_paired(
        self,
        name: str,
        texts: Sequence[str],
        waves: Sequence[Sequence[np.ndarray]],
        room: Room | None = None,
    ) -> tuple[int, int]:
        """Add recordings and what is said in them."""
        async with self._locks[name]:
            one = await self._opened(name)
            return await self._append(one, name, await self._additions.paired(texts, waves), room)

    async def preview(self, name: str, given: Sequence[Entry]) -> list[Preview]:
        """What entries would be confused with in a datastore, which stays as it is, and what the
        model hears of them without it."""
        async with self._locks[name]:
            temperature = (await self._opened(name)).found.knn.temperature
        if self._words is None:
            self._words = await asyncio.to_thread(common_words, self._vocabulary)
        datastore = await asyncio.to_thread(Datastore.open, self._path(name))
        documents = [
            document for document, _ in await asyncio.to_thread(shelf.documents, datastore)
        ]
        hurried = self._additions.hurried(given)
        pronounce, previews = self._pronouncing.of(tenant_of(name)), []
        for one in given:
            spoken = join(await self._additions.spoken([one], hurried))
            among = datastore, documents, self._words, self._vocabulary, pronounce
            found = await asyncio.to_thread(confusable, one, spoken, *among, temperature)
            heard = await self._additions.heard(one, hurried)
            writes = written(one, self._vocabulary)
            shows = Display.of([one], self._vocabulary.spoken).of_text(writes)
            previews.append(Preview(one.text, writes, shows, heard, tuple(found)))
        return previews

    async def documents(
        self, name: str, after: int, limit: int
    ) -> list[tuple[str, int, Entry | None]]:
        """`limit` documents, from number `after` on, with how many entries they are, and as what
        they were given; deleted ones left out."""

        def read() -> list[tuple[str, int, Entry | None]]:
            datastore = Datastore.open(self._path(name))
            listed = shelf.documents(datastore)[after : after + limit]
            worded = datastore.wordings(document for document, _ in listed)
            return [(document, count, worded.get(document)) for document, count in listed]

        return await asyncio.to_thread(read)

    async def remove(self, name: str, document: str) -> tuple[int, int]:
        """Delete a document's entries: how many, and what is left. Unknown ones are none."""
        async with self._locks[name]:
            one = await self._opened(name)
            entries = one.datastore.entries_of([document])
            await asyncio.to_thread(stored.delete, one.datastore.directory, entries.tolist())
            await self._refreshed(one, name)
            self._housekeeping.tidy(one.datastore.directory)
            return len(entries), shelf.count(one.datastore)

    async def tend(self, name: str, task: str, given: dict[str, Any]) -> dict[str, Any]:
        """What a task of `retrieval.upkeep` tells of a datastore. Raises InvalidRequest for what
        cannot be done, DatastoreError if it is damaged."""
        path, work = self._path(name), upkeep.TASKS[task]
        try:
            if task in APART and (task != "compact" or await asyncio.to_thread(behind, path)):
                return await self._housekeeping.apart(work, path, given)
            told = await asyncio.to_thread(work, path, **given)
        except TooManyShardsError as error:
            raise InvalidRequest(str(error), "shards") from None
        except (SnapshotError, ValueError) as error:
            raise InvalidRequest(str(error)) from None
        if task == "roll_back":  # to what the index may have left out
            self._housekeeping.tidy(path)
        if "problems" in told:  # which are said of files
            own = own_name(name)
            told = {"problems": [one.replace(str(path), own) for one in told["problems"]]}
        return told

    async def delete(self, name: str) -> None:
        """Delete a datastore."""
        async with self._locks[name]:
            path = self._path(name)
            one = self._open.pop(name, None)
            aside = self._root / f".deleted-{uuid4().hex}"
            await asyncio.to_thread(path.rename, aside)
            if one is not None:
                await asyncio.to_thread(one.retriever.close)
            await asyncio.to_thread(shutil.rmtree, aside, True)

    async def phrases(
        self, given: Sequence[Entry], tenant: str = DEFAULT, spoken: bool = True
    ) -> tuple[str, Segment]:
        """Phrases for one request, and a digest of them and of whose they are: `spoken`, as
        entries, else as they are worded. InvalidRequest for one that cannot be spoken."""
        if not spoken:
            return self._phrases.worded(given, tenant)
        return await self._phrases.of(given, tenant)

    def _path(self, name: str) -> Path:
        """The directory of a datastore; UnknownDatastore if there is none."""
        path = place_of(self._root, name)
        if not shelf.is_one(path):
            raise UnknownDatastore(f"no datastore {own_name(name)!r}")
        return path

    def _all(self, tenant: str) -> list[Path]:
        """The directories of a tenant's datastores."""
        directory = directory_of(self._root, tenant)
        return sorted(filter(shelf.is_one, directory.iterdir())) if directory.exists() else []

    async def _opened(self, name: str) -> OpenDatastore:
        """The datastore as it is now, its shards started and up to date."""
        path = self._path(name)
        version = shelf.version(path)
        one = self._open.get(name)
        if one is not None:
            self._open[name] = self._open.pop(name)  # the last to be dropped
        uid = _digest(self._app, path, version[:2])
        if one is not None and one.uid == uid:
            if index_directory(path).name != one.index and name not in self._taking_up:
                self._taking_up[name] = asyncio.create_task(self._take_up(name, one))
            if one.version != version:
                await self._refreshed(one, name)
            return one
        one = self._open[name] = await asyncio.to_thread(self._start, name, path, uid, version)
        pooled = [n for n, o in self._open.items() if isinstance(o.retriever, PooledRetriever)]
        for oldest in pooled[:-KEPT_OPEN]:  # the pool closes its own
            del self._open[oldest]
        return one

    def _start(self, name: str, path: Path, uid: str, version: tuple[int, ...]) -> OpenDatastore:
        datastore = Datastore.open(path)
        datastore.require(self._keyed_by)
        save_index(path)
        index = index_directory(path).name
        retriever = self._serve(datastore, uid, index)
        # The first search: a shard that is not there shows here, and not in a transcript.
        if datastore.entries and retriever.search(datastore.keys(0, 1), 1).missing_shards:
            raise Unavailable(f"datastore {own_name(name)!r}: a shard does not answer")
        found = self._found(datastore, retriever, uid, version, index)
        return OpenDatastore(datastore, retriever, uid, version, index, found)

    async def _take_up(self, name: str, one: OpenDatastore) -> None:
        """Search the index that was built beside the one in use. Its actors start while the others
        answer; those end when nobody has asked them for long."""
        try:
            index = index_directory(one.datastore.directory).name
            retriever = await asyncio.to_thread(self._serve, one.datastore, one.uid, index)
            async with self._locks[name]:
                if self._open.get(name) is one:
                    one.retriever, one.index = retriever, index
                    await self._refreshed(one, name)
        except (DatastoreError, RayError, OSError, ValueError) as error:  # deleted, or no room
            log.warning("%s is searched by its old index: %s", name, error)
        finally:
            del self._taking_up[name]

    def _serve(self, datastore: Datastore, uid: str, index: str) -> ShardedRetriever:
        settings = self._settings.retriever
        if self._small(datastore):
            pooled = _digest(uid, index)  # which the pool has not opened with another index
            return serve_pooled(
                *(datastore.directory, pooled, f"mmrag-{self._app}", settings.pool.actors),
                settings.shard_cpus,
                round(settings.pool.memory_mb * 1e6),
                answer_seconds=settings.answer_seconds,
                idle_seconds=settings.idle_seconds,
                key=SHARD_CPUS,
            )
        return serve_shards(
            datastore.directory,
            settings.shard_replicas,
            settings.shard_cpus,
            num_gpus=settings.shard_gpus,
            owner=f"mmrag-shard-{uid}",
            answer_seconds=settings.answer_seconds,
            idle_seconds=settings.idle_seconds,
            key=SHARD_CPUS,
            local=self._settings.local,
        )

    def _small(self, datastore: Datastore) -> bool:
        """Whether it is one for the pool."""
        single = len(saved_shards(datastore.directory)) == 1
        return single and datastore.entries <= self._settings.retriever.pool.entries

    async def _refreshed(self, one: OpenDatastore, name: str) -> None:
        """Let the shards and every later request see what has changed on disk."""

        def refresh() -> None:
            version = shelf.version(one.datastore.directory)
            one.datastore.refresh()
            if isinstance(one.retriever, PooledRetriever) and not self._small(one.datastore):
                one.retriever.close()
                one.retriever = self._serve(one.datastore, one.uid, one.index)
            one.retriever.refresh()
            one.found = self._found(one.datastore, one.retriever, one.uid, version, one.index)
            one.version = version

        await asyncio.to_thread(refresh)

    def _found(
        self,
        datastore: Datastore,
        retriever: ShardedRetriever,
        uid: str,
        version: tuple[int, ...],
        index: str,
    ) -> ResolvedDatastore:
        defaults = retrieval_defaults(self._settings, self._tuned, datastore)
        chosen = defaults
        with suppress(ArtifactError):  # another datastore of that name was tuned for
            chosen = tuned(self._tuned, datastore.directory) or defaults
        read = chosen.attention or defaults.attention
        documents = shelf.documents(datastore)
        whole = None
        if len(documents) <= read.whole:
            names = [document for document, _ in documents]
            whole = Phrases(datastore).first_mentions(names) if names else np.empty(0, np.int64)
        key = f"{uid}-{'-'.join(map(str, version))}-{index}"
        called = [document for document, _ in documents]
        listed = not called or are_phrases(datastore, self._vocabulary, called)
        found = key, uid, retriever, chosen.knn, chosen.both, read, whole
        where = datastore.directory
        phrases, worded = where if listed else None, where if datastore.wordings else None
        spotted = where if listed or anything(datastore, self._vocabulary) else None
        spelled = spotted is not None and spells_all(datastore.wordings().values())
        about = phrases, worded, tenant_at(self._root, where), spotted, spelled
        return ResolvedDatastore(*found, *about)

    def _require_room(self, name: str, room: Room | None, more: int = 0) -> None:
        """Raises DatastoreExists, InvalidRequest where there are as many as there may be, and
        QuotaExceeded where the tenant may have no more of them, or not `more` entries."""
        if place_of(self._root, name).exists():
            raise DatastoreExists(f"there is a datastore {own_name(name)!r} already")
        most, there = self._settings.limits.datastores, len(self._all(tenant_of(name)))
        if room is not None and room.datastores is not None and there >= room.datastores:
            raise QuotaExceeded("datastores", f"{room.datastores} datastores are there already")
        if there >= most:
            raise InvalidRequest(f"{most} datastores are there already")
        self._require_entries(name, room, more)

    def _require_entries(self, name: str, room: Room | None, more: int) -> None:
        """Raises QuotaExceeded where the tenant of a datastore may not have so many more entries.
        Other additions that are under way just now are not seen."""
        if room is None or room.entries is None:
            return
        there = sum(shelf.summary(one).entries for one in self._all(tenant_of(name)))
        if there + more > room.entries:
            message = f"{there} of {room.entries} entries are there already, and {more} more"
            raise QuotaExceeded("entries", f"{message} are too many" if more else message)

    async def _create(
        self, name: str, segments: Sequence[Segment], room: Room | None
    ) -> DatastoreSummary:
        async with self._locks[name]:
            described, _ = await self._decoder.describe.remote()

            def make() -> DatastoreSummary:
                self._require_room(
                    name, room, shelf.entries_in(segments)
                )  # again: they take their time
                path = place_of(self._root, name)
                durable.make_directory(path.parent)
                aside = self._root / f".new-{uuid4().hex}"
                stored.create(aside, described)
                shelf.publish(aside, segments)
                save_index(aside)
                try:
                    durable.rename(aside, path)
                except OSError:
                    shutil.rmtree(aside)
                    own = own_name(name)
                    raise DatastoreExists(f"there is a datastore {own!r} already") from None
                return shelf.summary(path)

            return await asyncio.to_thread(make)

    async def _append(
        self,
        one: OpenDatastore,
        name: str,
        segments: Sequence[Segment],
        room: Room | None,
        instead_of: Sequence[int] = (),
    ) -> tuple[int, int]:
        before = one.datastore.entries
        if segments:
            more = shelf.entries_in(segments) - len(instead_of)
            await asyncio.to_thread(self._require_entries, name, room, more)
            await asyncio.to_thread(shelf.publish, one.datastore.directory, segments, instead_of)
            await self._refreshed(one, name)
            self._housekeeping.tidy(one.datastore.directory)
        return one.datastore.entries - before, shelf.count(one.datastore)


def _digest(*about: object) -> str:
    """Of what a datastore is, as the actors know it."""
    return hashlib.sha256(" ".join(map(str, about)).encode()).hexdigest()[:16]
