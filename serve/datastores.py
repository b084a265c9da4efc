"""/v1/datastores: what the service looks things up in, made and changed while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from inspect import signature
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from mmrag.config import SLUG
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval import upkeep
from serve import forms, middleware, schema
from serve.errors import ApiError
from serve.housekeeping import APART
from serve.messages import DatastoreSummary
from serve.pipeline import Pipeline
from serve.settings import Settings

ALL = "/v1/datastores"
ONE, ENTRIES = f"{ALL}/{{name}}", f"{ALL}/{{name}}/entries"
SEARCH = f"{ONE}/search"
UPKEEP = f"{ONE}/upkeep/{{task}}"


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
        made = _takes(schema.NewDatastore, name)
        router.get(ALL)(self.datastores)
        router.post(ALL, status_code=201, openapi_extra=made)(self.create)
        router.get(ONE)(self.datastore)
        router.delete(ONE)(self.delete)
        router.get(ENTRIES)(self.documents)
        router.post(ENTRIES, openapi_extra=_takes(schema.NewEntries, {}))(self.add)
        router.delete(ENTRIES)(self.remove)
        router.post(SEARCH)(self.search)
        router.post(UPKEEP)(self.tend)
        return router

    async def datastores(self) -> schema.Datastores:
        """Every datastore."""
        found = await self._pipeline.call(self._pipeline.retriever.stored)
        return schema.Datastores(data=[_datastore(one) for one in found])

    async def create(self, request: Request) -> schema.Datastore:
        """Make a datastore, of texts or of recordings with what is said in them."""
        asked, recordings = await self._additions(request, schema.NewDatastore)
        retriever, given = self._pipeline.retriever, [asked.name, asked.texts]
        if recordings is None:
            return _datastore(await self._change(retriever.create, *given))
        return _datastore(await self._change(retriever.create_paired, *given, recordings))

    async def datastore(self, name: str) -> schema.Datastore:
        """A datastore."""
        return _datastore(await self._pipeline.call(self._pipeline.retriever.describe, name))

    async def delete(self, name: str) -> schema.DeletedDatastore:
        """Delete a datastore."""
        await self._pipeline.call(self._pipeline.retriever.delete, name)
        return schema.DeletedDatastore(id=name)

    async def documents(
        self,
        name: str,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[int, Query(ge=0, le=2**31)] = 0,
    ) -> schema.Documents:
        """What has been added to a datastore, `limit` documents from number `after` on."""
        retriever = self._pipeline.retriever
        found = await self._pipeline.call(retriever.documents, name, after, limit + 1)
        shown = [schema.Document(document=d, entries=n) for d, n in found[:limit]]
        return schema.Documents(data=shown, has_more=len(found) > limit)

    async def add(self, name: str, request: Request) -> schema.AddedEntries:
        """Add texts or recordings; the next request finds them."""
        asked, recordings = await self._additions(request, schema.NewEntries)
        retriever, given = self._pipeline.retriever, [name, asked.texts]
        if recordings is None:
            added, entries = await self._change(retriever.add, *given)
        else:
            added, entries = await self._change(retriever.add_paired, *given, recordings)
        return schema.AddedEntries(datastore=name, added=added, entries=entries)

    async def remove(self, name: str, document: Annotated[str, Query()]) -> schema.DeletedEntries:
        """Delete what was added as `document`."""
        retriever = self._pipeline.retriever
        deleted, entries = await self._pipeline.call(retriever.remove, name, document)
        return schema.DeletedEntries(datastore=name, deleted=deleted, entries=entries)

    async def search(self, name: str, asked: schema.Query) -> schema.Found:
        """What a datastore finds before each token of a text, as a decoder would."""
        limits = self._settings.limits
        [text] = schema.bounded_texts([asked.text], 1, "text", limits, self._vocabulary)
        found = await self._pipeline.call(self._pipeline.retriever.resolve, name)
        decoder = self._pipeline.decoder
        return schema.Found(
            data=[asdict(one) for one in await self._change(decoder.look_up, found, text, asked.k)]
        )

    async def tend(
        self, name: str, task: schema.Task, given: schema.TaskOptions | None = None
    ) -> dict[str, Any]:
        """Look at a datastore or keep it in order: what the task tells.

        `overview`, `statistics` and `verify` change nothing; `compact` merges small segments,
        erases what was deleted (`everything`: also where there is little) and indexes anew where
        much has changed, `index` always (in so many `shards`); snapshots have a `name`.
        """
        options = (given or schema.TaskOptions()).model_dump(exclude_none=True)
        known = list(signature(upkeep.TASKS[task]).parameters.values())[1:]
        if unknown := options.keys() - {one.name for one in known}:
            [first, *_] = sorted(unknown)
            raise ApiError(400, f"{first}: {task} has no such option", None, first)
        missing = [one.name for one in known if one.default is one.empty]
        if missing and missing[0] not in options:
            raise ApiError(422, f"{missing[0]}: {task} needs one", "missing", missing[0])
        try:
            return await self._change(self._pipeline.retriever.tend, name, task, options)
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

    async def _additions(
        self, request: Request, kind: type[schema.NewEntries]
    ) -> tuple[schema.NewEntries, list[list[Any]] | None]:
        """What is to be added, from JSON or a form; with the waves of each recording, if any."""
        limits, data, param = self._settings.limits, [], "texts"
        if request.headers["content-type"].lower().startswith(middleware.FORM):
            most = limits.texts + forms.MORE_FIELDS
            form = await request.form(max_files=most, max_fields=most)
            param, single = "text", kind.model_fields.keys() - {"texts"}
            forms.check_fields(form, single, ("file", "text"))
            data = form.getlist("file")
            if not all(isinstance(one, UploadFile) for one in data):
                raise ApiError(422, "file: send a file", "value_error", "file")
            given: Any = {name: form[name] for name in single if name in form}
            given["texts"] = form.getlist("text")
        else:
            given = await request.body()
        try:
            asked = kind.model_validate_json(given) if isinstance(given, bytes) else kind(**given)
        except ValidationError as error:
            problem = error.errors()[0]
            named = ".".join(map(str, problem["loc"])) or None
            message = f"{named or 'body'}: {problem['msg']}"
            raise ApiError(422, message, problem["type"], named) from None
        texts = schema.bounded_texts(asked.texts, limits.texts, param, limits, self._vocabulary)
        asked = asked.model_copy(update={"texts": texts})
        if not data:
            schema.check_length(texts, param, limits)
            return asked, None
        if len(data) != len(asked.texts):
            message = f"{len(data)} recordings and {len(asked.texts)} texts: one text each"
            raise ApiError(400, message, None, "text")
        recordings, seconds = [], 0.0
        for one in data:
            content = await one.read()
            seconds += await self._pipeline.seconds(content)
            if seconds > limits.audio_seconds:
                message = f"more than {limits.audio_seconds:g} s of audio at a time"
                raise ApiError(413, message, "too_long", "file")
            recordings.append(await self._pipeline.waves(content))
            if len(recordings[-1]) != 1:
                longest = self._settings.decode.max_seconds
                message = f"a recording is longer than {longest:g} s: cut it up"
                raise ApiError(413, message, "too_long", "file")
        return asked, recordings


def _takes(kind: type[schema.NewEntries], form: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI description of a body that is JSON of this kind, or a form with recordings."""
    many = {"file": {"type": "string", "format": "binary"}, "text": {"type": "string"}}
    fields = form | {name: {"type": "array", "items": one} for name, one in many.items()}
    recordings = {"type": "object", "properties": fields, "required": list(fields)}
    content = {middleware.JSON: kind.model_json_schema(), middleware.FORM: recordings}
    kinds = {name: {"schema": one} for name, one in content.items()}
    return {"requestBody": {"required": True, "content": kinds}}


def _datastore(stored: DatastoreSummary) -> schema.Datastore:
    return schema.Datastore(
        id=stored.name, entries=stored.entries, documents=stored.documents, audio=stored.audio
    )
