"""Sections of what is stored, how it is searched and how it is used."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
)

from mmrag.config.section import SLUG, Fraction, Layout, Operation, Section, Voices, Workers

RetrievalMode = Literal["none", "spotting", "knn", "cross_attention", "both"]
"""How what is given is used: phrases are spotted in what a CTC head hears, and favoured; neighbours
of the decoder's states vote (kNN-LM); an adapter attends to them; or the last two together."""
MOST_TAKES = 8
"""Voices that may say the same."""


class Index(Section):
    """How one shard's keys are searched."""

    kind: Literal["auto", "flat", "ivfsq", "ivfpq"]
    """flat compares every key; ivfsq and ivfpq compare codes in a few lists, and then keys: codes
    of a few bits for each dimension, or of a byte for several. auto chooses for each shard, and
    says why."""
    shards: PositiveInt
    entry_bytes: PositiveInt = 336
    """auto: memory that an entry may take in an index that is built."""
    min_recall: float | None = Field(default=None, gt=0, le=1)
    """Recall of the 16 nearest, on held-out queries, below which a shard is not built."""
    lists: PositiveInt = 1024
    """Inverted lists, where there are any."""
    code_bytes: PositiveInt = 64
    """ivfpq: bytes a key; must divide the key's width, unless keys are turned."""
    residual: bool = True
    """Whether a code stands for what a key differs by from its list's centroid, which is
    nearer to the truth and slower to compare, or for the key itself."""
    turned: bool = False
    """ivfpq: whether keys are turned into eight dimensions a byte before they are coded (OPQ)."""
    fast_scan: bool = False
    """ivfpq: whether codes of half a byte, twice as many, are compared in registers: quicker, and
    not mapped but read by every process that opens the index."""
    scalar_bits: Literal[0, 4, 6, 8] = 0
    """ivfsq: bits a dimension of the codes. ivfpq: of the longer codes that choose whose keys are
    read; 0 for none."""
    probes: PositiveInt = 32
    """Lists visited a query."""
    refine: PositiveInt = 16
    """ivfpq with scalar_bits: candidates whose longer codes are compared, for each neighbour asked
    for."""
    rerank: PositiveInt = 8
    """Candidates whose keys are read for each neighbour asked for, and re-ranked exactly."""
    gpu: Operation[bool | None] = None
    """Whether lists and codes are trained and filled on this machine's GPU; None where FAISS
    finds one that has such codes. Unless False, they are searched on one where they are opened."""


class Datastore(Section):
    """Entries: one a text token, keyed by the language model's own state."""

    name: Operation[str] = Field(pattern=SLUG)
    source: Operation[str | None] = None
    """A tokens directory, a file of text lines, or a manifest (`.jsonl`) of texts and entities;
    None for the workspace's datastore split. What it holds counts, and not where it lies."""
    splits: tuple[str, ...] = ("datastore",)
    """The splits of a tokens directory that are read; `all` where it has no splits."""
    domain: str | None = None
    """Only utterances of this domain; None for all."""
    utterances: PositiveInt | None = None
    """At most so many utterances, from the first; None for all."""
    audio: Literal["paired", "none", "spoken"]
    """Key over the utterance's own units, over text alone, or over units of synthetic speech."""
    voices: Voices = Field(default={"espeak": 1.0})
    """Who says what is spoken."""
    kokoro: Operation[str | None] = None
    """As in `synthesize`."""
    paired_share: float = Field(default=1, ge=0, le=1)
    """With audio paired, the share of the utterances whose units are used; the others are keyed
    over text alone."""
    metric: Literal["l2", "ip", "cosine"]
    entries: Literal["all", "entities"] = "all"
    """An entry for every token, or for the tokens of the utterances' entities alone; an entity is
    then a document of its own, whatever sentence spoke of it."""
    window: PositiveInt
    """Tokens around an entry that make up its value."""
    batch_tokens: Operation[PositiveInt]
    part_utterances: Layout[PositiveInt]
    """Utterances in one segment."""
    local: Operation[str | None] = None
    """A directory on each machine's own disk to which the shards served there copy their keys,
    where the datastore's is a share; None to read them where they are."""
    index: Index
    workers: Workers


class Speaking(Section):
    """Who says texts that are to be heard again: a key is what a model hears of that."""

    voices: Voices = Field(default={"espeak": 1.0})
    """Synthesizer -> its share of what is said. IPA, and what is in a language that is named, are
    espeak-ng's whatever the shares."""
    kokoro: Operation[str | None] = None
    """As in `synthesize`."""
    takes: int = Field(default=1, ge=1, le=MOST_TAKES)
    """Voices that say each sentence, one after the other: it then has as many keys."""


ESPEAK = Speaking()
"""Who speaks where nobody says who: espeak-ng, each sentence once."""


class KNN(Section):
    """How neighbours re-weight the next token (arXiv 1911.00172)."""

    k: PositiveInt
    weight: float = Fraction
    """w in w * p_kNN + (1 - w) * p_LM."""
    temperature: PositiveFloat
    gate: PositiveFloat | None = None
    """Largest distance of the nearest neighbour at which retrieval is heard; None for any."""
    certain: float | None = Field(default=None, gt=0, le=1)
    """Probability of the language model's best token from which on nothing is looked up: a model
    so sure is left alone. None to look everything up."""
    settled: bool = False
    """Whether nothing is looked up either where no neighbour could change the likeliest token. A
    greedy transcript is the same without; its probabilities are then the model's alone there, and
    no entry speaks for them. Beams, drawn tokens and boosted phrases are searched for all the same.
    """
    patience: int = Field(default=0, ge=0)
    """Searches in a row that found nothing within the gate, from which on as many steps as there
    were such searches pass without one; 0 for never."""
    follow: int = Field(default=0, ge=0)
    """Steps after a search for which the entries behind those that were found stand for another
    search, while they say what is chosen and lie within the gate (arXiv 2201.12431); 0 for none.
    Searches of another process are never spared so."""
    agreeing: PositiveInt = 2
    """Entries that must have said the chosen token for those behind them to be followed."""
    recent: Operation[int] = Field(default=0, ge=0)
    """Queries whose neighbours are kept, to be given at once to a query that is the same to the
    last bit; all are forgotten when the datastore changes. Only of what this process searches."""
    query: Literal["speech", "text"] = "speech"
    """The state that asks: over speech and transcript, or over the transcript read alone, as the
    keys of a text-only datastore were."""


class RetrievedAttention(Section):
    """How retrieved windows are attended to (arXiv 2406.09618, section 3.2)."""

    k: PositiveInt
    """Windows that a search brings."""
    stride: PositiveInt
    """Tokens for which they are read, until the next search."""
    whole: int = Field(ge=0)
    """A request's own list of at most so many windows is read whole, without a search."""
    gate: PositiveFloat | None = None
    """Largest distance of the nearest entry at which what was found is read; None for any."""
    certain: float | None = Field(default=None, gt=0, le=1)
    """As in `knn`: a model so sure of its next token looks nothing up."""


class Spotting(Section):
    """Which of a list's phrases are favoured in a clip: those that a CTC head hears in it."""

    least: float = Field(default=-3.5, le=0)
    """How likely a phrase of a hundred has to be heard: log-probability, nats, for each of its
    letters but two. Nearer to 0, fewer are spotted: what is said is missed oftener, and what is not
    said harms less."""
    weight: PositiveFloat = 3.0
    """Nats that a spotted phrase earns a piece."""
    floor: float | None = Field(default=-4.0, le=0)
    """Log-probability, nats, that each of its pieces has at least, however little the language
    model expects it. None: what that and `weight` come to."""
