"""/v1/datastores: what the service looks things up in, made and changed while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from inspect import signature
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from mmrag.config import SLUG
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval import upkeep
from mmrag.retrieval.wording import Entry, entries
from serve import datastore_schema, forms, schema, wordings
from serve.access import middleware
from serve.errors import ApiError
from serve.housekeeping import APART
from serve.messages import DatastoreSummary, Encoded, Room
from serve.pipeline import Pipeline
from serve.settings import Settings

ALL = "/v1/datastores"
ONE, ENTRIES = f"{ALL}/{{name}}", f"{ALL}/{{name}}/entries"
SEARCH, PREVIEW = f"{ONE}/search", f"{ONE}/preview"
PREVIEWED = 20
"""Entries that are looked at in one request: each is spoken and heard."""
UPKEEP = f"{ONE}/upkeep/{{task}}"


Body = TypeVar("Body", bound=BaseModel)


class Datastores:
    """The routes."""

    def __init__(self, settings: Settings, pipeline: Pipeline, vocabulary: Vocabulary) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._vocabulary = vocabulary

    def router(self) -> APIRouter:
        """All of them."""
        router = APIRouter()
        name = {"name": {"type": "string", "pattern": SLUG}}
        many = {"file": {"type": "string", "format": "binary"}, "text": {"type": "string"}}
        said = {name: {"type": "array", "items": one} for name, one in many.items()}
        made = _takes(datastore_schema.NewDatastore, name | said, [*name, *said])
        clip = {
            "file": many["file"],
            "k": datastore_schema.Query.model_json_schema()["properties"]["k"],
        }
        router.get(ALL)(self.datastores)
        router.post(ALL, status_code=201, openapi_extra=made)(self.create)
        router.get(ONE)(self.datastore)
        router.delete(ONE)(self.delete)
        router.get(ENTRIES, response_model_exclude_none=True)(self.documents)
        router.post(ENTRIES, openapi_extra=_takes(datastore_schema.NewEntries, said, list(said)))(
            self.add
        )
        router.delete(ENTRIES)(self.remove)
        router.post(SEARCH, openapi_extra=_takes(datastore_schema.Query, clip, ["file"]))(
            self.search
        )
        router.post(PREVIEW, response_model_exclude_none=True)(self.preview)
        router.post(UPKEEP)(self.tend)
        return router

    async def datastores(self, request: Request) -> datastore_schema.Datastores:
        """Every datastore."""
        tenant = request.state.caller.tenant
        found = await self._pipeline.call(self._pipeline.retriever.stored, tenant.name)
        return datastore_schema.Datastores(data=[_datastore(one) for one in found])

    async def create(self, request: Request) -> datastore_schema.Datastore:
        """Make a datastore, of texts or of recordings with what is said in them."""
        asked, recordings = await self._additions(request, datastore_schema.NewDatastore)
        retriever, name = self._pipeline.retriever, _qualified(request, asked.name)
        room = _room(request)
        request.state.audit["datastore"] = asked.name
        if recordings is None:
            return _datastore(await self._change(retriever.create, name, asked.entries, room))
        given = name, asked.texts, recordings, room
        return _datastore(await self._change(retriever.create_paired, *given))

    async def datastore(self, name: str, request: Request) -> datastore_schema.Datastore:
        """A datastore."""
        describe, qualified = self._pipeline.retriever.describe, _qualified(request, name)
        return _datastore(await self._pipeline.call(describe, qualified))

    async def delete(self, name: str, request: Request) -> datastore_schema.DeletedDatastore:
        """Delete a datastore."""
        await self._pipeline.call(self._pipeline.retriever.delete, _qualified(request, name))
        return datastore_schema.DeletedDatastore(id=name)

    async def documents(
        self,
        name: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[int, Query(ge=0, le=2**31)] = 0,
    ) -> datastore_schema.Documents:
        """What has been added to a datastore, `limit` documents from number `after` on."""
        retriever = self._pipeline.retriever
        listed = _qualified(request, name), after, limit + 1
        found = await self._pipeline.call(retriever.documents, *listed)
        shown = [
            datastore_schema.Document(document=document, entries=count, entry=one and _entry(one))
            for document, count, one in found[:limit]
        ]
        return datastore_schema.Documents(data=shown, has_more=len(found) > limit)

    async def add(self, name: str, request: Request) -> datastore_schema.AddedEntries:
        """Add texts, entries or recordings; the next request finds them. An entry that is there
        with another wording is replaced."""
        asked, recordings = await self._additions(request, datastore_schema.NewEntries)
        retriever, qualified = self._pipeline.retriever, _qualified(request, name)
        room = _room(request)
        if recordings is None:
            added, entries = await self._change(retriever.add, qualified, asked.entries, room)
        else:
            given = qualified, asked.texts, recordings, room
            added, entries = await self._change(retriever.add_paired, *given)
        request.state.audit["added"] = added
        return datastore_schema.AddedEntries(datastore=name, added=added, entries=entries)

    async def remove(
        self, name: str, document: Annotated[str, Query()], request: Request
    ) -> datastore_schema.DeletedEntries:
        """Delete what was added as `document`."""
        remove, qualified = self._pipeline.retriever.remove, _qualified(request, name)
        deleted, entries = await self._pipeline.call(remove, qualified, document)
        request.state.audit["deleted"] = deleted
        return datastore_schema.DeletedEntries(datastore=name, deleted=deleted, entries=entries)

    async def search(self, name: str, request: Request) -> datastore_schema.Found:
        """What a datastore finds before each token of a text, or of what is said in a recording, as
        a decoder would."""
        async with asyncio.timeout(self._settings.limits.timeout_seconds):
            query, k = await self._query(request)
            found = await self._pipeline.look_up(_qualified(request, name), query, k)
        return datastore_schema.Found(data=[asdict(one) for one in found])

    async def preview(
        self, name: str, given: datastore_schema.PreviewedEntries, request: Request
    ) -> datastore_schema.Previews:
        """What entries would be confused with, what is most alike first, and what the model hears
        of them without the datastore, which stays as it is."""
        how = self._settings.limits, self._vocabulary, self._settings.languages
        asked = wordings.checked(given.entries, PREVIEWED, "entries", *how)
        if not asked:
            raise ApiError(400, "entries: nothing to look at", None, "entries")
        preview, qualified = self._pipeline.retriever.preview, _qualified(request, name)
        found = await self._change(preview, qualified, asked)
        return datastore_schema.Previews(data=[asdict(one) for one in found])

    async def tend(
        self,
        name: str,
        task: datastore_schema.Task,
        request: Request,
        given: datastore_schema.TaskOptions | None = None,
    ) -> dict[str, Any]:
        """Look at a datastore or keep it in order: what the task tells.

        `overview`, `statistics` and `verify` change nothing; `compact` merges small segments,
        erases what was deleted (`everything`: also where there is little) and indexes anew where
        much has changed, `index` always (in so many `shards`); snapshots have a `name`.
        """
        options = (given or datastore_schema.TaskOptions()).model_dump(exclude_none=True)
        known = list(signature(upkeep.TASKS[task]).parameters.values())[1:]
        if unknown := options.keys() - {one.name for one in known}:
            [first, *_] = sorted(unknown)
            raise ApiError(400, f"{first}: {task} has no such option", None, first)
        missing = [one.name for one in known if one.default is one.empty]
        if missing and missing[0] not in options:
            raise ApiError(422, f"{missing[0]}: {task} needs one", "missing", missing[0])
        try:
            about = _qualified(request, name), task, options
            return await self._change(self._pipeline.retriever.tend, *about)
        except TimeoutError:
            if task not in APART:
                raise
            longest = f"{self._settings.limits.timeout_seconds:g} s"
            message = f"{task} takes longer than {longest} and goes on: overview tells of its end"
            raise ApiError(504, message, "timeout") from None

    async def _change(self, method: Callable[..., Any], *arguments: object) -> Any:
        """What a method of the retriever makes of texts or recordings; TimeoutError if it does not
        end in time, and then nothing was changed, or all of it."""
        async with asyncio.timeout(self._settings.limits.timeout_seconds):
            return await self._pipeline.call(method, *arguments)

    async def _query(self, request: Request) -> tuple[str | Encoded, int]:
        """What is to be looked up, from JSON or a form, and how many neighbours."""
        if not _is_form(request):
            asked = _checked(datastore_schema.Query, await request.body())
            limits = self._settings.limits
            texts = schema.bounded_texts([asked.text], 1, "text", limits, self._vocabulary)
            if not texts:
                raise ApiError(400, "text: nothing to look up", None, "text")
            return texts[0], asked.k
        form = await request.form(max_files=forms.MORE_FIELDS, max_fields=forms.MORE_FIELDS)
        forms.check_fields(form, ("file", "k"), ())
        if not isinstance(form.get("file"), UploadFile):
            raise ApiError(422, "file: send a file", "value_error", "file")
        given = {name: form[name] for name in ("k",) if name in form}
        k = _checked(datastore_schema.Query, {"text": "", **given}).k
        most = self._settings.limits.audio_seconds
        [wave], seconds = await self._recording(form["file"], most)
        request.state.quotas.audio(request.state.caller, seconds)
        encoded = await self._pipeline.encode(wave)
        if encoded is None:
            raise ApiError(400, "file: nobody speaks in the recording", None, "file")
        return encoded.units, k

    async def _recording(self, upload: UploadFile, room: float) -> tuple[list[np.ndarray], float]:
        """The one wave of a recording, and its seconds, of which there is `room` for so many."""
        content = await upload.read()
        seconds = await self._pipeline.seconds(content)
        if seconds > room:
            longest = f"{self._settings.limits.audio_seconds:g} s"
            raise ApiError(413, f"more than {longest} of audio at a time", "too_long", "file")
        waves = await self._pipeline.waves(content)
        if len(waves) != 1:
            longest = self._settings.decode.max_seconds
            message = f"a recording is longer than {longest:g} s: cut it up"
            raise ApiError(413, message, "too_long", "file")
        return waves, seconds

    async def _additions(
        self, request: Request, kind: type[datastore_schema.NewEntries]
    ) -> tuple[datastore_schema.NewEntries, list[list[Any]] | None]:
        """What is to be added, from JSON or a form: entries, or texts with the waves of a recording
        each."""
        limits, data, param = self._settings.limits, [], "texts"
        if _is_form(request):
            most = limits.texts + forms.MORE_FIELDS
            form = await request.form(max_files=most, max_fields=most)
            param, single = "text", kind.model_fields.keys() - {"texts", "entries"}
            forms.check_fields(form, single, ("file", "text"))
            data = form.getlist("file")
            if not all(isinstance(one, UploadFile) for one in data):
                raise ApiError(422, "file: send a file", "value_error", "file")
            given: Any = {name: form[name] for name in single if name in form}
            given["texts"] = form.getlist("text")
        else:
            given = await request.body()
        asked = _checked(kind, given)
        if not data:
            return asked.model_copy(update={"entries": self._entries(asked, param)}), None
        texts = schema.bounded_texts(asked.texts, limits.texts, param, limits, self._vocabulary)
        asked = asked.model_copy(update={"texts": texts})
        if len(data) != len(asked.texts):
            message = f"{len(data)} recordings and {len(asked.texts)} texts: one text each"
            raise ApiError(400, message, None, "text")
        recordings, seconds = [], 0.0
        for one in data:
            waves, own = await self._recording(one, limits.audio_seconds - seconds)
            seconds += own
            recordings.append(waves)
        request.state.quotas.audio(request.state.caller, seconds)
        return asked, recordings

    def _entries(self, asked: datastore_schema.NewEntries, param: str) -> list[Entry]:
        """The texts and the entries of a request, checked."""
        required = not isinstance(asked, datastore_schema.NewDatastore)
        if required and not asked.model_fields_set & {"texts", "entries"}:
            raise ApiError(422, "texts: Field required, or entries", "missing", "texts")
        limits = self._settings.limits
        how = limits, self._vocabulary, self._settings.languages
        texts = wordings.checked(asked.texts, limits.texts, param, *how)
        more = wordings.checked(asked.entries, limits.texts - len(texts), "entries", *how)
        every = entries([*texts, *more])
        wordings.check_length(every, param, limits)
        return every


def _qualified(request: Request, name: str) -> str:
    """How the retriever calls the caller's datastore of this name; UnknownDatastore for no name."""
    return request.state.caller.tenant.datastore(name)


def _room(request: Request) -> Room:
    """What the caller's tenant may have."""
    quotas = request.state.caller.tenant.quotas
    return Room(quotas.datastores, quotas.entries)


def _is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith(middleware.FORM)


def _checked(kind: type[Body], given: bytes | dict[str, Any]) -> Body:
    """A body of this kind; ApiError (422), which names the field, for another."""
    try:
        return kind.model_validate_json(given) if isinstance(given, bytes) else kind(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        named = ".".join(map(str, problem["loc"])) or None
        message = f"{named or 'body'}: {problem['msg']}"
        raise ApiError(422, message, problem["type"], named) from None


def _takes(kind: type[Body], form: dict[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """The OpenAPI description of a body that is JSON of this kind, or a form of these fields."""
    recordings = {"type": "object", "properties": form, "required": list(required)}
    content = {middleware.JSON: kind.model_json_schema(), middleware.FORM: recordings}
    kinds = {name: {"schema": one} for name, one in content.items()}
    return {"requestBody": {"required": True, "content": kinds}}


def _entry(one: Entry) -> datastore_schema.Entry | None:
    """An entry that says more than its text."""
    return None if one.plain else datastore_schema.Entry(**one.fields())


def _datastore(stored: DatastoreSummary) -> datastore_schema.Datastore:
    return datastore_schema.Datastore(
        id=stored.name, entries=stored.entries, documents=stored.documents, audio=stored.audio
    )
