"""From speech ids to text ids: a step is forward, retrieve, transform, choose.

Greedy search is beam search with one beam. Every chosen token carries its evidence: what the
language model alone thought, what it would have chosen, and which datastore entry spoke for it.
Nothing here knows words or audio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mmrag.boost import Boost
from mmrag.config import KNN, Decode
from mmrag.knn import best_neighbour, gate, knn_logp, mix, unsure
from mmrag.layers import Cache
from mmrag.lm import LM
from mmrag.reading import Reader, Reading, Share
from mmrag.records import NO_ENTRY, Neighbours, Retriever
from mmrag.vocabulary import EOS, PAD, Vocabulary


@dataclass(frozen=True)
class Retrieval:
    """A datastore to ask at every step, and how far to trust it."""

    retriever: Retriever
    settings: KNN


@dataclass(frozen=True)
class Choice:
    """A token of a hypothesis and its evidence; log-probabilities in nats."""

    token: int
    logp: float
    lm_logp: float
    lm_token: int
    """What the language model alone would have chosen after the same prefix."""
    entry: int = NO_ENTRY
    """The nearest entry that voted for this token."""
    distance: float = float("inf")
    read: tuple[Share, ...] = ()
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
        return [choice.token for choice in self.choices if choice.token != EOS]

    def then(self, choice: Choice) -> Hypothesis:
        """This hypothesis, one token on."""
        stopped = choice.token == EOS
        return Hypothesis((*self.choices, choice), self.logp + choice.logp, stopped)

    def score(self, length_penalty: float) -> float:
        """Log-probability over length to the power of `length_penalty`."""
        return self.logp / max(1, len(self.choices)) ** length_penalty


@dataclass
class Search:
    """One clip's beam."""

    limit: int
    live: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    finished: list[Hypothesis] = field(default_factory=list)

    def advance(self, candidates: list[tuple[Hypothesis, Choice, int]], beams: int) -> list[int]:
        """Keep the best `beams` of (hypothesis, its next choice, its row); return their rows.

        The search is over, and no row is returned, once `beams` hypotheses have stopped, or at
        the limit.
        """
        ranked = sorted(candidates, key=lambda c: c[0].logp + c[1].logp, reverse=True)
        self.live, rows = [], []
        for rank, (hypothesis, choice, row) in enumerate(ranked):
            if choice.token == EOS:
                if rank < beams:
                    self.finished.append(hypothesis.then(choice))
            elif len(self.live) < beams:
                self.live.append(hypothesis.then(choice))
                rows.append(row)
        at_limit = any(len(hypothesis.choices) >= self.limit for hypothesis in self.live)
        if len(self.finished) >= beams or at_limit:
            self.finished = self.finished or self.live
            self.live, rows = [], []
        return rows

    def best(self, length_penalty: float) -> Hypothesis:
        """The hypothesis of the highest score among those that stopped, or all if none did."""
        return max(self.finished, key=lambda h: h.score(length_penalty))


@torch.inference_mode()
def decode(
    lm: LM,
    vocabulary: Vocabulary,
    speech: Sequence[Sequence[int]],
    limits: Sequence[int],
    settings: Decode,
    retrieval: Retrieval | Sequence[Retrieval | None] | None = None,
    exclude_documents: Sequence[int] | None = None,
    boosts: Sequence[Boost] | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
    readings: Sequence[Reading | None] | None = None,
) -> list[Hypothesis]:
    """Transcribe clips given as unit ids (vocabulary ids), at most `limits` tokens each.

    `retrieval` is one for all clips, or one a clip. `exclude_documents` names a document a clip
    whose entries must not be used (-1 for none). `boosts` has the phrases that a clip favours,
    `contexts` text (ids) that stands before its speech in the prompt, `readings` the windows that
    the model attends to.
    """
    if not speech:
        return []
    if readings is not None and len(readings) != len(speech):
        raise ValueError(f"{len(readings)} readings for {len(speech)} clips")
    device = lm.embedding.weight.device
    allowed = torch.from_numpy(vocabulary.transcript_ids()).to(device)
    before = contexts or [()] * len(speech)
    prompts = [vocabulary.prompt(u, text) for u, text in zip(speech, before, strict=True)]
    ids, lengths = _pad(prompts, device)
    capacity = ids.shape[1] + max(limits)
    cache = Cache(lm.config, len(prompts), capacity, like=lm.embedding.weight)
    silent = _query(retrieval) == "text"
    listener = _TextReader(lm, vocabulary, len(prompts), max(limits)) if silent else None
    reader = Reader(lm, readings, capacity) if any(readings or ()) else None
    searches = [Search(limit) for limit in limits]
    owners = list(range(len(searches)))
    excluded = list(exclude_documents) if exclude_documents is not None else None
    own = isinstance(retrieval, Sequence)
    if own and len(retrieval) != len(speech):
        raise ValueError(f"{len(retrieval)} retrievals for {len(speech)} clips")

    while owners:
        at = torch.arange(ids.shape[1], device=device) == (lengths - 1)[:, None]
        output = lm(ids, cache, lengths, at)
        lm_logp = output.logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        exclude = [excluded[owner] for owner in owners] if excluded is not None else None
        asked = [retrieval[owner] for owner in owners] if own else retrieval
        logp, shares = lm_logp, None
        if reader:
            logits, shares = reader.read(ids, lengths, at, output, lm_logp, exclude)
            logp = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        queries = output.keys[at] if listener is None else listener.read(ids)
        logp, neighbours = retrieve(logp, queries, asked, exclude)
        if boosts is not None:
            live = [h for owner in dict.fromkeys(owners) for h in searches[owner].live]
            logp = logp + torch.stack(
                [boosts[o].bonus(h.tokens) for o, h in zip(owners, live, strict=True)]
            ).to(logp)

        choices = choose(logp, lm_logp, neighbours, 2 * settings.beams, shares)
        rows: list[int] = []
        next_owners: list[int] = []
        for owner in dict.fromkeys(owners):
            search = searches[owner]
            first = owners.index(owner)
            candidates = [
                (hypothesis, choice, first + offset)
                for offset, hypothesis in enumerate(search.live)
                for choice in choices[first + offset]
            ]
            kept = search.advance(candidates, settings.beams)
            rows += kept
            next_owners += [owner] * len(kept)
        owners = next_owners
        if owners:
            if rows != list(range(len(cache.lengths))):  # a copy of the whole cache: spare it
                cache = cache.select(torch.tensor(rows, device=device))
                if listener:
                    listener.select(torch.tensor(rows, device=device))
                if reader:
                    reader.select(rows)
            last = [h.choices[-1].token for o in dict.fromkeys(owners) for h in searches[o].live]
            ids = torch.tensor(last, device=device)[:, None]
            lengths = torch.ones_like(ids[:, 0])
    return [search.best(settings.length_penalty) for search in searches]


def _query(retrieval: Retrieval | Sequence[Retrieval | None] | None) -> str:
    """What asks, as in `KNN.query`; clips that are decoded together agree on it."""
    all = retrieval if isinstance(retrieval, Sequence) else [retrieval]
    kinds = {one.settings.query for one in all if one is not None} or {"speech"}
    if len(kinds) > 1:
        raise ValueError("clips decoded together ask with speech and with text: choose one")
    return kinds.pop()


class _TextReader:
    """Reads the transcripts so far as if nobody had spoken: queries for keys of text alone."""

    def __init__(self, lm: LM, vocabulary: Vocabulary, rows: int, limit: int) -> None:
        self._lm = lm
        self._prompt = vocabulary.prompt(None)
        like = lm.embedding.weight
        self._cache = Cache(lm.config, rows, len(self._prompt) + limit, like=like)

    def read(self, ids: Tensor) -> Tensor:
        """The state (B, D) after the newest tokens `ids` (B, 1); first of all, after the prompt."""
        if not self._cache.lengths.any():
            ids = torch.tensor([self._prompt] * len(ids), device=ids.device)
        at = torch.zeros_like(ids, dtype=torch.bool)
        return self._lm(ids, self._cache, at=at).keys[:, -1]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, which may repeat."""
        self._cache = self._cache.select(rows)


def retrieve(
    lm_logp: Tensor,
    keys: Tensor,
    retrieval: Retrieval | Sequence[Retrieval | None] | None,
    exclude_documents: Sequence[int] | None = None,
) -> tuple[Tensor, Neighbours]:
    """The next-token log-probabilities (B, V) after retrieval with `keys` (B, D).

    `retrieval` is one for all rows, or one a row: rows that share one are searched together.
    Without retrieval, with weight 0, where the model is certain and behind a shut gate they are
    `lm_logp` itself, and the neighbours are none: what was not heard is no evidence.
    """
    if isinstance(retrieval, Sequence):
        return _retrieve_apart(lm_logp, keys, retrieval, exclude_documents)
    if retrieval is None or retrieval.settings.weight == 0:
        return lm_logp, Neighbours.none(len(lm_logp), 1)
    knn = retrieval.settings
    logp, neighbours = lm_logp, Neighbours.none(len(lm_logp), knn.k)
    rows = unsure(lm_logp, knn.certain).nonzero()[:, 0]
    if len(rows):
        queries = keys[rows].float().cpu().numpy()
        excluded = exclude_documents and [exclude_documents[row] for row in rows.tolist()]
        found = retrieval.retriever.search(queries, knn.k, excluded)
        logp = lm_logp.index_copy(0, rows, interpolate(lm_logp[rows], found, knn))
        neighbours = _placed(neighbours, rows.tolist(), _heard(found, knn.gate))
    return logp, neighbours


def _retrieve_apart(
    lm_logp: Tensor,
    keys: Tensor,
    retrievals: Sequence[Retrieval | None],
    exclude_documents: Sequence[int] | None,
) -> tuple[Tensor, Neighbours]:
    """`retrieve`, with each row's own retrieval."""
    k = max((one.settings.k for one in retrievals if one is not None), default=1)
    logp, neighbours = lm_logp.clone(), Neighbours.none(len(lm_logp), k)
    for retrieval in {id(one): one for one in retrievals if one is not None}.values():
        rows = [row for row, one in enumerate(retrievals) if one is retrieval]
        excluded = exclude_documents and [exclude_documents[row] for row in rows]
        logp[rows], found = retrieve(lm_logp[rows], keys[rows], retrieval, excluded)
        neighbours = _placed(neighbours, rows, found)
    return logp, neighbours


def interpolate(lm_logp: Tensor, found: Neighbours, knn: KNN) -> Tensor:
    """`lm_logp` (B, V) mixed with what the neighbours say."""
    distances = torch.from_numpy(found.distances).to(lm_logp.device)
    tokens = torch.from_numpy(found.tokens).to(lm_logp.device)
    said = knn_logp(distances, tokens, knn.temperature, lm_logp.shape[1])
    return mix(lm_logp, said, knn.weight * gate(distances, knn.gate))


def choose(
    logp: Tensor,
    lm_logp: Tensor,
    neighbours: Neighbours,
    candidates: int,
    shares: Sequence[Sequence[Share]] | None = None,
) -> list[list[Choice]]:
    """The `candidates` likeliest next tokens of each row, with their evidence.

    A row in which fewer are possible (neighbours alone, weight 1) has fewer.
    """
    best = logp.topk(min(candidates, logp.shape[1]))
    tokens = best.indices.cpu()
    alone = lm_logp.gather(1, best.indices).cpu()
    preferred = lm_logp.argmax(-1).tolist()
    distances = torch.from_numpy(neighbours.distances)
    voters = torch.from_numpy(neighbours.tokens)
    columns = [best_neighbour(distances, voters, column) for column in tokens.unbind(1)]
    rows = []
    for row, values in enumerate(best.values.tolist()):
        choices = []
        for rank, value in enumerate(values):
            if value == -math.inf:
                break
            column = int(columns[rank][row])
            entry, distance = NO_ENTRY, float("inf")
            if column >= 0:
                entry = int(neighbours.entries[row, column])
                distance = float(neighbours.distances[row, column])
            choice = Choice(
                int(tokens[row, rank]),
                value,
                float(alone[row, rank]),
                preferred[row],
                entry,
                distance,
                tuple(shares[row]) if shares else (),
            )
            choices.append(choice)
        rows.append(choices)
    return rows


@torch.inference_mode()
def read_states(
    lm: LM,
    vocabulary: Vocabulary,
    texts: Sequence[Sequence[int]],
    speech: Sequence[Sequence[int] | None],
    *,
    logits: bool,
) -> tuple[Tensor, np.ndarray, list[slice], Tensor]:
    """Read whole transcripts at once: the state before each token of `[text, end]`.

    Returns the keys (N, D) float32, the tokens that follow them (N,), each clip's slice of the N,
    and the next-token log-probabilities (N, V) over transcript ids, (0, V) unless asked for.
    """
    device = lm.embedding.weight.device
    prompts = [vocabulary.prompt(units) for units in speech]
    ids, _ = _pad([[*p, *text] for p, text in zip(prompts, texts, strict=True)], device)
    at = torch.zeros_like(ids, dtype=torch.bool)
    slices, start = [], 0
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        at[row, len(prompt) - 1 : len(prompt) + len(text)] = True
        slices.append(slice(start, start := start + len(text) + 1))
    output = lm(ids, at=at if logits else torch.zeros_like(at))
    allowed = torch.from_numpy(vocabulary.transcript_ids()).to(device)
    logp = output.logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    tokens = np.array([token for text in texts for token in (*text, EOS)], np.int32)
    return output.keys[at].float(), tokens, slices, logp


def _placed(neighbours: Neighbours, rows: Sequence[int], found: Neighbours) -> Neighbours:
    """`neighbours` with what was `found` for some of its rows."""
    for name in ("distances", "tokens", "entries", "documents"):
        column = getattr(found, name)
        getattr(neighbours, name)[rows, : column.shape[1]] = column
    return replace(neighbours, missing_shards=max(neighbours.missing_shards, found.missing_shards))


def _heard(found: Neighbours, largest: float | None) -> Neighbours:
    """`found`, with nothing in the rows whose gate is shut."""
    near = gate(torch.from_numpy(found.distances), largest).numpy()[:, None]
    return replace(
        found,
        distances=np.where(near, found.distances, np.float32(np.inf)),
        entries=np.where(near, found.entries, NO_ENTRY),
    )


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), PAD)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)
