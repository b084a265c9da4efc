"""What the routes of datastores take and give, as OpenAPI shows it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmrag.config import SLUG
from mmrag.retrieval import upkeep

Task = Literal[*upkeep.TASKS]
"""Of `retrieval.upkeep`."""


class Datastore(BaseModel):
    """A datastore: entries are tokens, documents what was added."""

    id: str
    object: Literal["datastore"] = "datastore"
    entries: int
    documents: int
    audio: str


class Datastores(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Datastore]


class DeletedDatastore(BaseModel):
    """A datastore that is gone."""

    id: str
    object: Literal["datastore"] = "datastore"
    deleted: Literal[True] = True


class Entry(BaseModel):
    """A name or phrase that says how it is written, how it is said and how much it weighs."""

    model_config = ConfigDict(extra="forbid")

    text: str
    """What the model writes, in its letters."""
    display_as: str | None = None
    """What transcripts have in its place; as `text` stands where it is left out."""
    pronunciations: list[str] | None = None
    """Respellings ("zole pie dem"), or IPA between slashes ("/zɒlˈpɪdɛm/")."""
    weight: float | None = Field(default=None, ge=0, le=2)
    """0: never retrieved; 1 where it is left out."""
    language: str | None = None
    """In which it is said, of those that the model understands."""


ENTRY = {"anyOf": [{"type": "string"}, Entry.model_json_schema()]}
"""A text, or more than that; `retrieval.wording` checks it."""


class Document(BaseModel):
    """A phrase, a sentence or a recording of a datastore."""

    document: str
    entries: int
    entry: Entry | None = None
    """As it was given, where that was more than a text."""


class Documents(BaseModel):
    """Some of them."""

    object: Literal["list"] = "list"
    data: list[Document]
    has_more: bool


class AddedEntries(BaseModel):
    """What a datastore has gained."""

    object: Literal["datastore.entries"] = "datastore.entries"
    datastore: str
    added: int
    entries: int


class DeletedEntries(BaseModel):
    """What a datastore has lost."""

    object: Literal["datastore.entries"] = "datastore.entries"
    datastore: str
    deleted: int
    entries: int


class NewEntries(BaseModel):
    """Texts to add: names and other phrases (at most five words), or sentences; and entries, which
    say more."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = []
    entries: list[str | dict[str, Any]] = Field(default=[], json_schema_extra={"items": ENTRY})


class NewDatastore(NewEntries):
    """A datastore to make."""

    name: str = Field(pattern=SLUG)


class Query(BaseModel):
    """What to look up."""

    model_config = ConfigDict(extra="forbid")

    text: str
    k: int = Field(default=4, ge=1, le=100)
    """Neighbours."""


class Neighbour(BaseModel):
    """An entry near to where a text has come to: what it says comes next, and what was said around
    it."""

    token: str
    distance: float
    entry: int
    document: str
    window: str


class Lookup(BaseModel):
    """A token, and what a decoder would have found in its place."""

    token: str
    neighbours: list[Neighbour]


class Found(BaseModel):
    """Every token of a text."""

    object: Literal["list"] = "list"
    data: list[Lookup]


class PreviewedEntries(BaseModel):
    """What is to be looked at before it is put in."""

    model_config = ConfigDict(extra="forbid")

    entries: list[str | dict[str, Any]] = Field(json_schema_extra={"items": ENTRY})


class Heard(BaseModel):
    """A sentence about an entry, and what the model hears of it without the datastore."""

    pronunciation: str
    sentence: str
    heard: str
    right: bool


class Confusable(BaseModel):
    """What an entry may be confused with: of a datastore's documents and of common words."""

    text: str
    kind: Literal["entry", "word"]
    sound: float
    """Share of their phones that is alike, 0 to 1."""
    loses: float | None = None
    """Of the votes where the new entry is said, the share that this would take."""
    takes: float | None = None
    """Of the votes where this is said, the share that the new entry would take."""


class Preview(BaseModel):
    """An entry before it is put in."""

    text: str
    writes: str
    """What the model writes for it."""
    shows: str
    """What a transcript has in its place."""
    heard: list[Heard]
    confused_with: list[Confusable]


class Previews(BaseModel):
    """One an entry."""

    object: Literal["list"] = "list"
    data: list[Preview]


class TaskOptions(BaseModel):
    """What a task is told."""

    model_config = ConfigDict(extra="forbid")

    everything: bool | None = None
    """compact: also where there is little to merge or to erase."""
    name: str | None = None
    """Of a snapshot."""
    shards: int | None = Field(default=None, ge=1, le=64)
    """index: in so many."""
    kind: Literal["auto", "flat"] | None = None
    """index: as it is chosen, or every key compared."""
    entry_bytes: int | None = Field(default=None, ge=1)
    """index: memory that an entry may take."""
    min_recall: float | None = Field(default=None, gt=0, le=1)
    """index: below which it is not used."""
