"""From speech ids to text ids: a step is forward, retrieve, transform, choose.

Clips are decoded together in a batch that any of them may join or leave between two steps. A step
works on all rows at once and waits for the device as often whatever their number: for what
retrieval asks with, and for what was chosen. Every chosen token carries its evidence: what the
language model alone thought, what it would have chosen, and which datastore entry spoke for it.
Nothing here knows words or audio.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmrag.config import Decode
from mmrag.decoding.beams import Beams, BeamSearch, Clip, beams_for
from mmrag.decoding.beginnings import evidence
from mmrag.decoding.boost import Boost
from mmrag.decoding.candidates import likeliest, voters
from mmrag.decoding.hypotheses import Choice, History, Hypothesis
from mmrag.decoding.rows import Prompt, Rows
from mmrag.model.contract import Speech, SpeechDecoder, TextVocabulary
from mmrag.model.ngram import NGram
from mmrag.model.pages import PagePool
from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttendedWindow, AttentionSource
from mmrag.retrieval.searching import Searches

__all__ = ["Batch", "BeamSearch", "Choice", "Clip", "Hypothesis", "Prompt", "decode"]


def decode(
    lm: SpeechDecoder,
    vocabulary: TextVocabulary,
    speech: Sequence[Speech],
    limits: Sequence[int],
    settings: Decode,
    retrieval: Retrieval | Sequence[Retrieval | None] | None = None,
    exclude_documents: Sequence[int] | None = None,
    boosts: Sequence[Boost | None] | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
    attention_sources: Sequence[AttentionSource | None] | None = None,
    beginnings: Sequence[Sequence[int]] | None = None,
    ngram: NGram | None = None,
) -> list[Hypothesis]:
    """Transcribe clips given as unit ids (vocabulary ids), at most `limits` tokens each.

    `retrieval` is one for all clips, or one a clip, as is everything after it; each as in `Clip`.
    The `ngram` model is that of all.
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
        "beginning": beginnings,
    }
    given = {name: values for name, values in one_each.items() if values is not None}
    for name, values in given.items():
        if len(values) != clips:
            raise ValueError(f"{name}: {len(values)} for {clips} clips")
    names = "length_penalty", "ctc_weight", "ngram_weight"
    shared = {name: getattr(settings, name) for name in names} | {"ngram": ngram}
    batch = Batch(lm, vocabulary)
    searches = batch.join(
        [
            Clip(
                one,
                beams=beams_for(settings, vocabulary.letters(one)),
                **shared,
                **{name: values[n] for name, values in given.items()},
            )
            for n, one in enumerate(speech)
        ]
    )
    while batch.searches:
        batch.step()
    return [search.best() for search in searches]


class Batch:
    """Clips that are decoded together, a token a step."""

    def __init__(
        self, lm: SpeechDecoder, vocabulary: TextVocabulary, pool: PagePool | None = None
    ) -> None:
        """`pool` is what the model's caches take their pages from; None for one that grows."""
        self.retrieval_seconds = 0.0
        """Spent looking things up, so far; not what went on meanwhile."""
        self.questions_before = Searches()
        """What became of the questions of rows that have left."""
        self._lm = lm
        self._vocabulary = vocabulary
        self._pools = pool or lm.pool(0, growing=True), lm.pool(0, growing=True)
        """Of what the rows have read, and of the same as read with what they attend to."""
        self._history = History()
        self._allowed = torch.from_numpy(vocabulary.transcript_ids()).to(lm.device)
        self._allowed_first = torch.from_numpy(vocabulary.first_ids()).to(lm.device)
        self._rows: Rows | None = None

    @property
    def searches(self) -> list[BeamSearch]:
        """Those that go on."""
        return list(self._rows.beams.searches) if self._rows else []

    @property
    def rows(self) -> int:
        """Hypotheses that the next step extends."""
        return len(self._rows.beams) if self._rows else 0

    def join(self, clips: Sequence[Clip]) -> list[BeamSearch]:
        """Read the clips' prompts and choose their first tokens; one search a clip."""
        return self.admit(self.prompt(clips)) if clips else []

    @torch.inference_mode()
    def prompt(self, clips: Sequence[Clip]) -> Prompt:
        """The prompts of clips, to be read before they join together."""
        beams = Beams(clips, self._history)
        return Prompt(Rows(self._lm, self._vocabulary, clips, beams, *self._pools))

    @torch.inference_mode()
    def admit(self, prompt: Prompt) -> list[BeamSearch]:
        """Read what is left of the prompts and choose the first tokens; one search a clip.

        The batch is as it was where that fails.
        """
        fresh = prompt.rows
        searches = fresh.beams.searches
        try:
            self._step(fresh)
            if self._rows and len(fresh.beams):
                self._rows.join(fresh)
        except Exception:
            fresh.release()
            raise
        if not len(fresh.beams):
            self.questions_before += fresh.searches
        elif not self._rows:
            self._rows = fresh
        return searches

    @torch.inference_mode()
    def step(self) -> None:
        """Choose one more token for every hypothesis; searches that are over leave."""
        if self._rows:
            self._step(self._rows)
            self._rows.beams.tidy()
            self._empty()

    @torch.inference_mode()
    def leave(self, search: BeamSearch) -> None:
        """Give up a search; one that is not here is no error."""
        if self._rows and search in self._rows.beams.searches:
            self._rows.keep(self._rows.beams.leave(search))
            self._empty()

    def release(self) -> None:
        """Give up every search, and the memory of them all."""
        if self._rows:
            self.questions_before += self._rows.searches
            self._rows.release()
            self._rows = None

    @property
    def questions(self) -> Searches:
        """What became of all that was to be looked up, so far."""
        return self.questions_before + (self._rows.searches if self._rows else Searches())

    def _empty(self) -> None:
        if not len(self._rows.beams):
            self.questions_before += self._rows.searches
            self._rows = None

    def _step(self, batch: Rows) -> None:
        """Forward, retrieve, transform, choose."""
        beams, begun, allowed = batch.beams, batch.beginnings, self._allowed_next(batch)
        output = batch.read()
        lm_logp = _logp(output.logits, allowed)

        started = time.perf_counter()
        logp, attended = lm_logp, None
        if batch.memory:
            rows, logits, attended = batch.attend(output, lm_logp)
            own = allowed if allowed.ndim == 1 else allowed[rows]
            logp = logp.index_copy(0, rows, _logp(logits, own))
        queries = batch.queries(output)
        if begun is not None:
            lm_logp, logp, queries, attended = self._begin(batch, lm_logp, logp, queries, attended)
        pending = batch.ask(logp, queries)
        asked = time.perf_counter()
        fused = batch.fused.logp(logp)
        bonus = batch.boosted.bonus(_sum(logp, fused))
        waited = time.perf_counter()
        mixed, neighbours = batch.heard(pending)
        logp = logp if mixed is None else mixed
        self.retrieval_seconds += asked - started + time.perf_counter() - waited
        if fused is not None and logp is not lm_logp:
            fused = batch.fused.with_retrieved(fused, logp, lm_logp)
        bonus = _sum(fused, bonus)
        logp = _sum(logp, bonus)
        if begun is not None:
            logp = begun.without_a_word_gone_on_with(logp, self._word_starts, self._vocabulary.eos)
        count, totals = beams.candidates, beams.logp if beams.candidates > 1 else None
        logp = batch.letters.weigh(logp, bonus, count, beams.temperatures, totals)

        found = likeliest(logp, lm_logp, count, beams.temperatures)
        ranked = beams.rank(found.tokens, found.logp, self._vocabulary.eos)
        rows, columns = ranked.rows, ranked.columns
        tokens, score = found.tokens[rows, columns], found.logp[rows, columns]
        entries, distances = _voters(neighbours, rows, tokens)
        newest = self._history.append(
            beams.newest[rows],
            attended and [attended[row] for row in rows.tolist()],
            token=tokens,
            logp=np.minimum(score, 0) / batch.fused.share[rows],
            lm_logp=found.lm_logp[rows, columns],
            lm_token=found.lm_token[rows, columns],
            entry=entries,
            distance=distances,
        )
        batch.go_on(beams.advance(ranked, tokens, score, newest), found.first)

    def _begin(
        self,
        batch: Rows,
        lm_logp: Tensor,
        logp: Tensor,
        queries: Tensor | None,
        attended: list[Sequence[AttendedWindow]] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Sequence[AttendedWindow]] | None]:
        """Take the rows' beginnings in, with their evidence. What is given is of every place (N, V
        or D), what is returned of each row's last (B, V or D)."""
        begun = batch.beginnings
        given, last = (
            torch.from_numpy(places).to(logp.device) for places in (begun.given, begun.last)
        )
        chosen, found = logp[given], None
        if queries is not None:
            chosen, found = batch.heard_of_given(chosen, queries[given])
            queries = queries[last]
        tokens, rows = begun.tokens[begun.given], begun.rows[begun.given]
        offsets = begun.offsets[begun.given]
        chosen = batch.letters.begin(rows, offsets, tokens, chosen)
        score, alone, preferred = evidence(tokens, chosen, lm_logp[given])
        for row, count in enumerate(begun.counts - 1):
            if count:
                here = rows == row
                for part in (batch.boosted, batch.fused):
                    score[here] += part.begin(row, tokens[here])
        entries, distances = _voters(found, np.arange(len(tokens)), tokens)
        for offset in range(offsets.max() + 1):
            at = np.flatnonzero(offsets == offset)
            newest = self._history.append(
                batch.beams.newest[rows[at]],
                attended and [attended[place] for place in begun.given[at].tolist()],
                token=tokens[at],
                logp=np.minimum(score[at], 0) / batch.fused.share[rows[at]],
                lm_logp=alone[at],
                lm_token=preferred[at],
                entry=entries[at],
                distance=distances[at],
            )
            batch.beams.begin(rows[at], newest, score[at])
        attended = attended and [attended[place] for place in begun.last.tolist()]
        return lm_logp[last], logp[last], queries, attended

    def _allowed_next(self, batch: Rows) -> Tensor:
        """What may be the next token (V,) bool, or the first of all; with beginnings, at every
        place (N, V)."""
        if not batch.first:
            return self._allowed
        if batch.beginnings is None:
            return self._allowed_first
        later = torch.from_numpy(batch.beginnings.offsets > 0).to(self._lm.device)
        return torch.where(later[:, None], self._allowed, self._allowed_first)

    @cached_property
    def _word_starts(self) -> Tensor:
        """What may come next where the last word is over (V,) bool."""
        return torch.from_numpy(self._vocabulary.word_starts()).to(self._lm.device)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Of what there is; None if there is nothing."""
    return one if other is None else other if one is None else one + other


def _logp(logits: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities (B, V) over what is `allowed` (V,) or (B, V)."""
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def _voters(
    neighbours: Neighbours | None, rows: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`voters`, of which there are none without neighbours."""
    if neighbours is None:
        return np.full(len(rows), NO_ENTRY), np.full(len(rows), np.float32(np.inf))
    return voters(neighbours, rows, tokens)
