"""From speech ids to text ids: a step is forward, retrieve, transform, choose.

Clips are decoded together in a batch that any of them may join or leave between two steps. Greedy
search is beam search with one beam. Every chosen token carries its evidence: what the language
model alone thought, what it would have chosen, and which datastore entry spoke for it. Nothing here
knows words or audio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmrag.config import Decode
from mmrag.decoding.boost import Boost
from mmrag.model.contract import Speech, SpeechDecoder, TextVocabulary
from mmrag.model.lm import LMOutput
from mmrag.model.states import pad_ids
from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval.interpolation import Retrieval, retrieve_each
from mmrag.retrieval.knn import best_neighbour
from mmrag.retrieval.memory import AttendedWindow, AttentionSource, RetrievedMemory


@dataclass(frozen=True)
class Choice:
    """A token of a hypothesis and its evidence; log-probabilities in nats."""

    token: int
    logp: float
    lm_logp: float
    lm_token: int
    """What the language model alone would have chosen after the same prefix: the token itself where
    that is as likely as any, or was drawn without retrieval."""
    entry: int = NO_ENTRY
    """The nearest entry that voted for this token."""
    distance: float = float("inf")
    attended: tuple[AttendedWindow, ...] = ()
    """The windows that the model attended to most when it chose."""


@dataclass(frozen=True)
class Hypothesis:
    """A transcript being made; `stopped` once it has chosen the end token."""

    choices: tuple[Choice, ...] = ()
    logp: float = 0.0
    stopped: bool = False

    @property
    def tokens(self) -> list[int]:
        """Its ids, without the end token."""
        return [choice.token for choice in self.choices[: -1 if self.stopped else None]]

    def then(self, choice: Choice, stopped: bool = False) -> Hypothesis:
        """This hypothesis, one token on; `stopped` with the end token."""
        return Hypothesis((*self.choices, choice), self.logp + choice.logp, stopped)

    def score(self, length_penalty: float) -> float:
        """Log-probability over length to the power of `length_penalty`."""
        return self.logp / max(1, len(self.choices)) ** length_penalty


@dataclass(frozen=True)
class Clip:
    """What there is to decode, and how; `context` are ids of the vocabulary."""

    speech: Speech
    limit: int
    """Longest transcript, tokens."""
    beams: int = 1
    length_penalty: float = 0.0
    temperature: float = 0.0
    """With one beam: draw each token from the distribution to the power of 1 / temperature; 0 takes
    the likeliest."""
    retrieval: Retrieval | None = None
    attention: AttentionSource | None = None
    """The windows that the model attends to."""
    exclude_document: int = -1
    """A document whose entries must not be used; -1 for none."""
    boost: Boost | None = None
    """Phrases to favour."""
    context: Sequence[int] = ()
    """Text that stands before the speech in the prompt."""

    @property
    def queries_with_text(self) -> bool:
        """Whether its queries are states over the transcript alone, as in `KNN.query`."""
        return self.retrieval is not None and self.retrieval.settings.query == "text"


@dataclass(eq=False)
class BeamSearch:
    """One clip's beam."""

    clip: Clip
    eos: int
    """The token that ends a transcript."""
    live: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    finished: list[Hypothesis] = field(default_factory=list)
    missing_shards: int = 0
    """Shards that did not answer, at most in one step."""

    def advance(self, candidates: list[tuple[Hypothesis, Choice, int]]) -> list[int]:
        """Keep the best of (hypothesis, its next choice, its row), a beam's worth; return their
        rows.

        The search is over, and no row is returned, once as many hypotheses have stopped, or at the
        limit.
        """
        beams = self.clip.beams
        ranked = sorted(candidates, key=lambda c: c[0].logp + c[1].logp, reverse=True)
        self.live, rows = [], []
        for rank, (hypothesis, choice, row) in enumerate(ranked):
            if choice.token == self.eos:
                if rank < beams:
                    self.finished.append(hypothesis.then(choice, stopped=True))
            elif len(self.live) < beams:
                self.live.append(hypothesis.then(choice))
                rows.append(row)
        at_limit = any(len(hypothesis.choices) >= self.clip.limit for hypothesis in self.live)
        if len(self.finished) >= beams or at_limit:
            self.finished = self.finished or self.live
            self.live, rows = [], []
        return rows

    @property
    def over(self) -> bool:
        """Whether there is nothing left to extend."""
        return not self.live

    def best(self) -> Hypothesis:
        """The hypothesis of the highest score among those that stopped, or all if none did."""
        penalty = self.clip.length_penalty
        return max(self.finished or self.live, key=lambda h: h.score(penalty))


def decode(
    lm: SpeechDecoder,
    vocabulary: TextVocabulary,
    speech: Sequence[Speech],
    limits: Sequence[int],
    settings: Decode,
    retrieval: Retrieval | Sequence[Retrieval | None] | None = None,
    exclude_documents: Sequence[int] | None = None,
    boosts: Sequence[Boost] | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
    attention_sources: Sequence[AttentionSource | None] | None = None,
) -> list[Hypothesis]:
    """Transcribe clips given as unit ids (vocabulary ids), at most `limits` tokens each.

    `retrieval` is one for all clips, or one a clip, as is everything after it; each as in `Clip`.
    ValueError where there is one too many or too few.
    """
    clips = len(speech)
    one_each = {
        "limit": limits,
        "retrieval": retrieval if isinstance(retrieval, Sequence) else [retrieval] * clips,
        "exclude_document": exclude_documents,
        "boost": boosts,
        "context": contexts,
        "attention": attention_sources,
    }
    given = {name: values for name, values in one_each.items() if values is not None}
    for name, values in given.items():
        if len(values) != clips:
            raise ValueError(f"{name}: {len(values)} for {clips} clips")
    shared = {"beams": settings.beams, "length_penalty": settings.length_penalty}
    batch = Batch(lm, vocabulary)
    searches = batch.join(
        [
            Clip(one, **shared, **{name: values[n] for name, values in given.items()})
            for n, one in enumerate(speech)
        ]
    )
    while batch.searches:
        batch.step()
    return [search.best() for search in searches]


class Batch:
    """Clips that are decoded together, a token a step."""

    def __init__(self, lm: SpeechDecoder, vocabulary: TextVocabulary) -> None:
        self.retrieval_seconds = 0.0
        """Spent looking things up, so far."""
        self._lm = lm
        self._vocabulary = vocabulary
        self._allowed = torch.from_numpy(vocabulary.transcript_ids()).to(lm.device)
        self._allowed_first = torch.from_numpy(vocabulary.first_ids()).to(lm.device)
        self._rows: _Rows | None = None

    @property
    def searches(self) -> list[BeamSearch]:
        """Those that go on."""
        return list(dict.fromkeys(self._rows.owners)) if self._rows else []

    @property
    def rows(self) -> int:
        """Hypotheses that the next step extends."""
        return len(self._rows.owners) if self._rows else 0

    @torch.inference_mode()
    def join(self, clips: Sequence[Clip]) -> list[BeamSearch]:
        """Read the clips' prompts and choose their first tokens; one search a clip."""
        if not clips:
            return []
        fresh = _Rows(self._lm, self._vocabulary, clips)
        searches = list(fresh.owners)
        self._step(fresh)
        if fresh.owners:
            self._rows = self._rows.join(fresh) if self._rows else fresh
        return searches

    @torch.inference_mode()
    def step(self) -> None:
        """Choose one more token for every hypothesis; searches that are over leave."""
        if self._rows:
            self._step(self._rows)
        if self._rows and not self._rows.owners:
            self._rows = None

    @torch.inference_mode()
    def leave(self, search: BeamSearch) -> None:
        """Give up a search; one that is not here is no error."""
        if self._rows and search in self._rows.owners:
            kept = [row for row, owner in enumerate(self._rows.owners) if owner is not search]
            self._rows.select(kept)
            if not kept:
                self._rows = None

    def _step(self, batch: _Rows) -> None:
        """Forward, retrieve, transform, choose."""
        device, owners = batch.ids.device, batch.owners
        places = torch.arange(batch.ids.shape[1], device=device)
        at = places == (batch.lengths - 1)[:, None]
        output = self._lm(batch.ids, batch.cache, batch.lengths, at)
        lm_logp = self._logp(output.logits, owners)
        exclude = [owner.clip.exclude_document for owner in owners]
        exclude = exclude if max(exclude) >= 0 else None

        started = time.perf_counter()
        logp, shares = self._attend(batch, at, output, lm_logp, exclude)
        queries = output.keys[at]
        if batch.text_states:
            queries = queries.index_copy(
                0, batch.text_query_rows, batch.text_states.read(batch.text_query_ids)
            )
        retrievals = [owner.clip.retrieval for owner in owners]
        logp, neighbours, missing = retrieve_each(logp, queries, retrievals, exclude)
        self.retrieval_seconds += time.perf_counter() - started
        for row, shards in (*enumerate(missing), *batch.missing_shards):
            owners[row].missing_shards = max(owners[row].missing_shards, shards)
        live = [h for owner in dict.fromkeys(owners) for h in owner.live]
        logp = _boosted(logp, owners, live)

        choices = choose(
            logp,
            lm_logp,
            neighbours,
            2 * max(owner.clip.beams for owner in owners),
            shares,
            [owner.clip.temperature for owner in owners],
        )
        first = {owner: row for row, owner in reversed(list(enumerate(owners)))}
        kept: list[int] = []
        for owner in dict.fromkeys(owners):
            candidates = [
                (hypothesis, choice, first[owner] + offset)
                for offset, hypothesis in enumerate(owner.live)
                for choice in choices[first[owner] + offset]
            ]
            kept += owner.advance(candidates)
        batch.select(kept)

    def _logp(self, logits: Tensor, owners: Sequence[BeamSearch]) -> Tensor:
        """Next-token log-probabilities (B, V) over what may stand there."""
        allowed = self._allowed
        if any(not owner.live[0].choices for owner in owners):
            first = [not owner.live[0].choices for owner in owners]
            first = torch.tensor(first, device=logits.device)[:, None]
            allowed = torch.where(first, self._allowed_first, self._allowed)
        return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)

    def _attend(
        self,
        batch: _Rows,
        at: Tensor,
        output: LMOutput,
        lm_logp: Tensor,
        exclude: Sequence[int] | None,
    ) -> tuple[Tensor, list[Sequence[AttendedWindow]] | None]:
        """What the next tokens (B, V) look like to the rows that read, and what they attended to;
        to the others as `lm_logp` has it."""
        if not batch.memory:
            return lm_logp, None
        rows = batch.attention_rows
        if len(rows) == len(batch.owners):
            logits, shares = batch.memory.read(
                batch.ids, batch.lengths, at, output, lm_logp, exclude
            )
            return self._logp(logits, batch.owners), shares.rows()
        seen = replace(output, keys=output.keys[rows], states=output.states[rows])
        excluded = exclude and [exclude[row] for row in rows.tolist()]
        logits, own = batch.memory.read(
            batch.ids[rows], batch.lengths[rows], at[rows], seen, lm_logp[rows], excluded
        )
        shares: list[Sequence[AttendedWindow]] = [()] * len(batch.owners)
        for row, share in zip(rows.tolist(), own.rows(), strict=True):
            shares[row] = share
        reading = [batch.owners[row] for row in rows.tolist()]
        return lm_logp.index_copy(0, rows, self._logp(logits, reading)), shares


class _Rows:
    """The hypotheses of a batch, row by row: whose they are, what was read, what comes next."""

    def __init__(
        self, lm: SpeechDecoder, vocabulary: TextVocabulary, clips: Sequence[Clip]
    ) -> None:
        prompts = [vocabulary.prompt(clip.speech, clip.context) for clip in clips]
        self.owners = [BeamSearch(clip, vocabulary.eos) for clip in clips]
        self.ids, self.lengths = pad_ids(prompts, lm.device)
        """The tokens to read next (B, T) and how many of them there are (B,)."""
        longest = max(clip.limit for clip in clips)
        capacity = self.ids.shape[1] + longest
        self.cache = lm.cache([clip.speech for clip in clips], capacity)
        self.memory: RetrievedMemory | None = None
        self.text_states: _TextOnlyStates | None = None
        sources = [clip.attention for clip in clips if clip.attention is not None]
        if sources:
            self.memory = RetrievedMemory(lm, sources, capacity)
        asking = sum(clip.queries_with_text for clip in clips)
        if asking:
            self.text_states = _TextOnlyStates(lm, vocabulary, asking, longest)
        self._place()

    @property
    def text_query_ids(self) -> Tensor:
        """The newest token of the rows that ask with text (B', 1)."""
        return self.ids[self.text_query_rows, -1:]

    @property
    def missing_shards(self) -> list[tuple[int, int]]:
        """Rows that looked for something to read, with the shards that did not answer them."""
        missing = self.memory.missing_shards if self.memory else []
        return list(zip(self.attention_rows.tolist(), missing, strict=True))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, which may repeat, and read what their searches chose last."""
        for name, places in (
            ("memory", self.attention_rows),
            ("text_states", self.text_query_rows),
        ):
            part = getattr(self, name)
            if part is None:
                continue
            number = {row: n for n, row in enumerate(places.tolist())}
            kept = [number[row] for row in rows if row in number]
            if not kept:
                setattr(self, name, None)
            elif kept != list(range(len(number))):
                part.select(kept)
        if rows and list(rows) != list(range(len(self.owners))):  # a copy of the cache: spare it
            self.cache = self.cache.select(torch.tensor(rows, device=self.ids.device))
        self.owners = [self.owners[row] for row in rows]
        last = [h.choices[-1].token for o in dict.fromkeys(self.owners) for h in o.live]
        self.ids = torch.tensor(last, device=self.ids.device)[:, None]
        self.lengths = torch.ones_like(self.ids[:, 0])
        self._place()

    def join(self, other: _Rows) -> _Rows:
        """These rows, then those of `other`; every row has one token to read."""
        for name in ("memory", "text_states"):  # first: a memory may refuse the other
            mine, new = getattr(self, name), getattr(other, name)
            if mine and new:
                mine.join(new)
            else:
                setattr(self, name, mine or new)
        self.owners += other.owners
        self.cache = self.cache.join(other.cache)
        self.ids = torch.cat((self.ids, other.ids))
        self.lengths = torch.cat((self.lengths, other.lengths))
        self._place()
        return self

    def _place(self) -> None:
        """Number the rows that read, and those that ask with text."""
        clips = [owner.clip for owner in self.owners]
        read = [row for row, clip in enumerate(clips) if clip.attention is not None]
        ask = [row for row, clip in enumerate(clips) if clip.queries_with_text]
        self.attention_rows = torch.tensor(read, device=self.ids.device, dtype=torch.long)
        self.text_query_rows = torch.tensor(ask, device=self.ids.device, dtype=torch.long)


def _boosted(logp: Tensor, owners: Sequence[BeamSearch], live: Sequence[Hypothesis]) -> Tensor:
    """`logp` (B, V) with what the rows' phrases earn."""
    rows = [row for row, owner in enumerate(owners) if owner.clip.boost is not None]
    if not rows:
        return logp
    earned = torch.zeros_like(logp)
    for row in rows:
        earned[row] = owners[row].clip.boost.bonus(live[row].tokens).to(logp)
    return logp + earned


class _TextOnlyStates:
    """Reads the transcripts so far as if nobody had spoken: queries for keys of text alone."""

    def __init__(
        self, lm: SpeechDecoder, vocabulary: TextVocabulary, rows: int, limit: int
    ) -> None:
        self._lm = lm
        self._prompt = vocabulary.prompt(None)
        self._cache = lm.cache([None] * rows, len(self._prompt) + limit)

    def read(self, ids: Tensor) -> Tensor:
        """The state (B, D) after the newest tokens `ids` (B, 1); first of all, after the prompt."""
        if not self._cache.lengths.any():
            ids = torch.tensor([self._prompt] * len(ids), device=ids.device)
        at = torch.zeros_like(ids, dtype=torch.bool)
        return self._lm(ids, self._cache, at=at).keys[:, -1]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, which may repeat."""
        self._cache = self._cache.select(torch.tensor(rows, device=self._cache.lengths.device))

    def join(self, other: _TextOnlyStates) -> None:
        """Go on with the rows of `other`, too."""
        self._cache = self._cache.join(other._cache)


def choose(
    logp: Tensor,
    lm_logp: Tensor,
    neighbours: Neighbours,
    candidates: int,
    shares: Sequence[Sequence[AttendedWindow]] | None = None,
    temperatures: Sequence[float] | None = None,
) -> list[list[Choice]]:
    """The `candidates` likeliest next tokens of each row, with their evidence.

    A row in which fewer are possible (neighbours alone, weight 1) has fewer. A row of a
    temperature above 0 has one token, drawn.
    """
    temperatures = temperatures or [0.0] * len(logp)
    best = logp.topk(min(candidates, logp.shape[1]))
    for row, temperature in enumerate(temperatures):
        if temperature > 0:
            behind = logp[row] - logp[row].max()  # 0 for the best, however small the temperature
            drawn = (behind / temperature).softmax(-1).multinomial(1)[0]
            best.values[row, 0], best.indices[row, 0] = logp[row, drawn], drawn
    tokens = best.indices.cpu()
    alone = lm_logp.gather(1, best.indices).cpu()
    most, preferred = (one.tolist() for one in lm_logp.max(-1))
    untouched = (logp == lm_logp).all(-1).tolist()
    distances = torch.from_numpy(neighbours.distances)
    voters = torch.from_numpy(neighbours.tokens)
    columns = [best_neighbour(distances, voters, column) for column in tokens.unbind(1)]
    rows = []
    for row, values in enumerate(best.values.tolist()):
        choices = []
        for rank, value in enumerate(values):
            if value == -math.inf or (rank > 0 and temperatures[row] > 0):
                break
            column = int(columns[rank][row])
            entry, distance = NO_ENTRY, float("inf")
            if column >= 0:
                entry = int(neighbours.entries[row, column])
                distance = float(neighbours.distances[row, column])
            token, lm_value = int(tokens[row, rank]), float(alone[row, rank])
            drawn = untouched[row] and temperatures[row] > 0
            choice = Choice(
                token,
                value,
                lm_value,
                token if drawn or lm_value == most[row] else preferred[row],  # of equals, this one
                entry,
                distance,
                tuple(shares[row]) if shares else (),
            )
            choices.append(choice)
        rows.append(choices)
    return rows
