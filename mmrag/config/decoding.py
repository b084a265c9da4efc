"""Sections of transcribing and of what is measured by it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mmrag.config.retrieval import RetrievalMode, RetrievedAttention
from mmrag.config.section import SLUG, Fraction, Operation, Section, Workers

CONDITION = r"^(noise-[0-9]+|telephone|mulaw|gsm|mp3|opus|flite-[a-z]+|spanish)$"


class Decode(Section):
    """From units to text."""

    beams: PositiveInt | None = None
    """1 for greedy search; None for 8 where a CTC head has a say, else for 1."""
    length_penalty: float = Field(ge=0)
    """Exponent of the length by which a beam's log-probability is divided."""
    tokens_per_second: PositiveFloat
    """Longest transcript, pieces a second of audio (at least 16)."""
    max_seconds: PositiveFloat
    """Longer audio is split at silence."""
    speech: float = Field(default=0.75, ge=0, le=1)
    """Probability from which on a moment counts as speech; audio without any has no transcript. 0
    to transcribe everything."""
    ctc_weight: Annotated[float, Fraction] = 0.3
    """Share of a token's score that is what the encoder's CTC head hears, where it has one; the
    rest is the language model's, with what was retrieved. 0 to decode without it."""
    ngram_weight: float = Field(default=0.2, ge=0)
    """What counts of the log-probabilities of an n-gram model, where the models have one, beside
    the rest of a token's score. 0 to decode without it."""
    agreement: float | None = Field(default=None, lt=0)
    """What the language model alone must think of a transcript made with retrieval, mean
    log-probability a token: below it, and where the transcript loops, it is made again without.
    Phrases that are boosted, which it may find as unlikely as it likes, are left out where the
    transcript loops. None to trust every transcript."""
    unclear: Operation[Literal["keep", "empty"]] = "keep"
    """What becomes of the words of a segment that is marked as unclear."""


class BatchDecode(Decode):
    """From units to text, many utterances at once."""

    batch_seconds: Operation[PositiveFloat]
    """Audio transcribed at once, seconds."""


class Tune(Section):
    """Grid of kNN settings, scored on the dev split."""

    k: tuple[PositiveInt, ...] = Field(min_length=1)
    weight: tuple[Annotated[float, Fraction], ...] = Field(min_length=1)
    temperature: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Multiples of the dev queries' median nearest distance."""
    gate: tuple[PositiveFloat | None, ...] = (None,)
    """Likewise; None for no gate."""
    certain: tuple[Annotated[float, Field(gt=0, le=1)] | None, ...] = (None,)
    """As in `knn`."""
    query: tuple[Literal["speech", "text"], ...] = ("speech",)
    """Tried with datastores of text alone; the others are always asked with speech."""
    finalists: PositiveInt
    """Settings of least dev loss, one for each weight, gate, certainty and query, that are then
    decoded and compared by WER."""
    utterances: PositiveInt | None = None
    """At most so many dev utterances are decoded; None for all."""
    attention: tuple[RetrievedAttention, ...] = ()
    """Ways to read what was retrieved that are decoded where there is an adapter; their gates are
    multiples like those above."""
    both_weight: tuple[Annotated[float, Fraction], ...] = ()
    """Weights of kNN-LM beside the chosen way to read."""
    decoy: str | None = Field(default=None, pattern=SLUG)
    """A datastore that has nothing to say about the dev split."""
    harm: float = Field(default=0.01, ge=0)
    """How much worse (relative) the decoy may make the dev split's WER; settings that let it do
    more are passed over."""


class Evaluate(Section):
    """A split transcribed in several modes."""

    split: Literal["dev", "test"]
    domain: str | None
    """Only utterances of this domain; None for all."""
    modes: tuple[RetrievalMode, ...] = Field(min_length=1)
    datastores: tuple[str, ...]
    """Datastores to compare in the modes that retrieve; those keyed without speech in mode knn
    alone."""
    lists: bool = False
    """Dynamic context: each utterance searches and reads its own list of phrases alone, where the
    corpus has lists; the datastores are then of entities, each phrase a document."""
    retriever: Operation[Literal["local", "sharded"]]
    replicas: Operation[PositiveInt]
    """Copies of each shard's actor."""
    shard_cpus: Operation[float] = Field(gt=0)
    """CPUs a shard's actor reserves."""
    shard_gpus: Operation[float] = Field(default=0.0, ge=0)
    """GPUs that it reserves, and searches its lists and codes on (`index.gpu`)."""
    resamples: PositiveInt
    """Bootstrap resamples behind each confidence interval."""
    workers: Workers

    @model_validator(mode="after")
    def _lists_are_local(self) -> Evaluate:
        if self.lists and self.retriever == "sharded":
            raise ValueError(
                "lists are searched in the workers themselves: retriever must be local"
            )
        return self


ListedWay = Literal["knn", "cross_attention", "both", "boost", "spotting", "prompt"]
"""What can be done with a list of phrases: its names are spoken and searched, read or both; or all
are favoured, or those that are spotted; or they are written before the speech."""


class Reproduce(Section):
    """The paper's experiments, on the dev and test splits of the workspace's corpus."""

    docs: Operation[Path]
    """Where `results.md`, `results.json` and the plots go; relative to the working directory."""
    utterances: PositiveInt
    """At most so many test utterances a task."""
    sweep_utterances: PositiveInt
    """At most so many for each point of a sweep."""
    phrases: tuple[PositiveInt, ...]
    """Lengths of the list that comes with an utterance (dynamic context)."""
    listed: tuple[ListedWay, ...] = Field(default=get_args(ListedWay), min_length=1)
    """What is done with these lists. Those of names that are spoken (`knn`, `cross_attention`,
    `both`) take most of the time that all tasks take."""
    carriers: tuple[str, ...] = Field(min_length=1)
    """Sentences in which a phrase is spoken for its datastore; `{phrase}` stands for it."""
    mentions: PositiveInt
    """Carriers, from the first, whose phrases are read whole."""
    boost: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Weights of phrase boosting tried on the dev split, in nats a piece."""
    harm: float | None = Field(default=None, ge=0)
    """How much worse (relative) lists none of whose phrases is said may make the dev split's WER;
    settings of phrases that let them do more are passed over. None to choose by what is said alone.
    """
    shares: tuple[Annotated[float, Fraction], ...]
    """Shares of a datastore's entries with real paired audio."""
    sizes: tuple[PositiveInt, ...]
    """Entries of a datastore; those beyond the datastore split come from the lm split."""
    strides: tuple[PositiveInt, ...]
    """Tokens from one entry to the next."""
    documents: tuple[PositiveInt, ...]
    """Documents that two-level retrieval keeps before it searches entries."""
    conditions: tuple[Annotated[str, Field(pattern=CONDITION)], ...]
    """Recordings made worse, by another synthesizer, or in another language: `noise-DB`,
    `telephone`, a codec (`mulaw`, `gsm`, `mp3`, `opus`), `flite-VOICE`, `spanish`."""
    passages: Operation[str | None] = None
    """Spoken-SQuAD's test file, whose passages voices of ours read; None for no such task."""
    topics: PositiveInt = 3
    """Of its topics so many are tested, and others to tune on."""
    tasks: Operation[tuple[str, ...] | None] = None
    """Tasks to measure, by name; None for all."""
    whisper: Operation[str | None] = None
    """A Whisper checkpoint, its directory or a hub's id, that gets rows beside our own models'."""
