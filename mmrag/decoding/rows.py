"""The rows of a batch: what each has read, reads next, and looks things up with.

A row is a hypothesis of a clip. Its parts, the model's cache foremost, follow it when hypotheses
are chosen, dropped or joined. Knows ids and states; not how they are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmrag.decoding.beams import Beams, Clip
from mmrag.decoding.beginnings import Beginnings
from mmrag.decoding.boost import BoostedRows
from mmrag.decoding.fusion import FusedRows
from mmrag.decoding.joint import LetterRows
from mmrag.model.contract import SpeechDecoder, TextVocabulary
from mmrag.model.lm import LMOutput
from mmrag.model.pages import PagePool
from mmrag.model.states import pad_ids
from mmrag.records import Neighbours
from mmrag.retrieval.memory import AttendedWindow, RetrievedMemory
from mmrag.retrieval.searching import Pending, RowSearches, Searches


class Rows:
    """The rows of a batch; of `first` those whose first token has not been chosen."""

    def __init__(
        self,
        lm: SpeechDecoder,
        vocabulary: TextVocabulary,
        clips: Sequence[Clip],
        beams: Beams,
        pool: PagePool,
        reading_pool: PagePool,
    ) -> None:
        """A row a clip, with its prompt to read; what it attends to is read in `reading_pool`."""
        self._lm = lm
        self.beams = beams
        self.first = True
        prompts = [vocabulary.prompt(clip.speech, clip.context) for clip in clips]
        begun = [list(clip.beginning) for clip in clips]
        self.beginnings = Beginnings.of(begun) if any(begun) else None
        """What is read with the prompts, where any begins with something; None behind that."""
        texts = [[*one, *text] for one, text in zip(prompts, begun, strict=True)]
        self.ids, self.lengths = pad_ids(texts, lm.device)
        """The tokens to read next (B, T) and how many of them there are (B,)."""
        self.shortest = min(map(len, prompts))
        """The least of them, without a beginning."""
        longest = max(clip.longest for clip in clips)
        capacity = self.ids.shape[1] + longest
        self._cache = lm.cache([clip.speech for clip in clips], capacity, pool)
        self.memory: RetrievedMemory | None = None
        self._text_states: _TextOnlyStates | None = None
        sources = [clip.attention for clip in clips if clip.attention is not None]
        if sources:
            self.memory = RetrievedMemory(lm, sources, capacity, reading_pool)
        asking = [clip.beginning for clip in clips if clip.queries_with_text]
        if asking:
            self._text_states = _TextOnlyStates(lm, vocabulary, asking, longest, pool)
        heard = [vocabulary.letters(clip.speech) if clip.ctc_weight else None for clip in clips]
        self.letters = LetterRows(heard, [c.ctc_weight for c in clips], vocabulary, lm.device)
        self.fused = FusedRows([c.ngram for c in clips], [c.ngram_weight for c in clips])
        greedy = [
            clip.beams == 1 and not clip.temperature and clip.boost is None and not (spelt or fused)
            for clip, spelt, fused in zip(
                clips, self.letters.of_rows, self.fused.weight, strict=True
            )
        ]
        self._searches = RowSearches([clip.retrieval for clip in clips], greedy)
        self._searching = np.array([clip.retrieval is not None for clip in clips])
        self._excluded = np.array([clip.exclude_document for clip in clips])
        self.boosted = BoostedRows([clip.boost for clip in clips])
        self._reads = np.array([clip.attention is not None for clip in clips])
        self._asks_with_text = np.array([clip.queries_with_text for clip in clips])
        positions = torch.arange(self.ids.shape[1], device=lm.device)
        given = torch.tensor([len(text) for text in begun], device=lm.device)
        self._at = positions >= (self.lengths - 1 - given)[:, None]
        self._at &= positions < self.lengths[:, None]
        self._place()

    def read(self) -> LMOutput:
        """What the model makes of the next tokens, at every place of the beginnings."""
        if self.ids.shape[1] == 1:
            return self._lm(self.ids, self._cache)
        return self._lm(self.ids, self._cache, self.lengths, self._at)

    def read_part(self, tokens: int) -> None:
        """Read so many tokens of every row, and fewer than any has to read."""
        part, self.ids = self.ids[:, :tokens], self.ids[:, tokens:]
        self.lengths, self.shortest = self.lengths - tokens, self.shortest - tokens
        self._at = self._at[:, tokens:]
        self._lm(part, self._cache, at=torch.zeros_like(part, dtype=torch.bool))
        if self.memory:
            self.memory.read_prompt(part)

    def attend(
        self, output: LMOutput, lm_logp: Tensor
    ) -> tuple[Tensor, Tensor, list[Sequence[AttendedWindow]]]:
        """The rows that read (B',) and their logits (B', V) with what they read; what every row
        attended to. With beginnings, each of these, and `lm_logp`, has a row for every place."""
        rows, places = self._attending, self._reads.nonzero()[0].tolist()
        excluded, read = self._excluding(places), (self.ids, self.lengths, self._at)
        begun, found, counts = self.beginnings, rows, None
        if begun is not None:
            lm_logp, counts = lm_logp[self._on_device(begun.last)], begun.counts[places]
            found = self._on_device(begun.of_rows(self._reads))
        if len(places) < len(self.beams):
            output = replace(output, keys=output.keys[rows], states=output.states[rows])
            read, lm_logp = tuple(one[rows] for one in read), lm_logp[rows]
        logits, own = self.memory.read(*read, output, lm_logp, excluded, counts)
        self._note_missing(places, self.memory.missing_shards)
        all_ = len(self.beams) if begun is None else len(begun.rows)
        attended: list[Sequence[AttendedWindow]] = [()] * all_
        for place, windows in zip(found.tolist(), own.rows(), strict=True):
            attended[place] = windows
        return found, logits, attended

    def queries(self, output: LMOutput) -> Tensor | None:
        """What is looked up with, of every row (B, D); with beginnings, of every place (N, D). None
        if no row searches."""
        if not self._searching.any():
            return None
        if self.ids.shape[1] == 1:
            queries = output.keys[:, 0]
        elif self.beginnings is None:
            rows = torch.arange(len(self.ids), device=self.ids.device)
            queries = output.keys[rows, self.lengths - 1]
        else:
            queries = output.keys[self.beginnings.positions(self.lengths)]
        if self._text_states:
            asking = self._asking_with_text
            found = self._text_states.read(self.ids[asking, -1:])
            if self.beginnings is not None:
                asking = self._on_device(self.beginnings.of_rows(self._asks_with_text))
            queries = queries.index_copy(0, asking, found)
        return queries

    def ask(self, logp: Tensor, queries: Tensor | None) -> Pending | None:
        """Look things up with `queries` (B, D) for the rows that search, whose model says `logp`
        (B, V): in another thread where that takes long. None if no row searches."""
        if queries is None:
            return None
        tokens, places = self.beams.tokens.tolist(), range(len(self.beams))
        return self._searches.begin(logp, queries, tokens, self._excluding(places))

    def heard_of_given(self, logp: Tensor, queries: Tensor) -> tuple[Tensor, Neighbours]:
        """`logp` (G, V) at the places whose next token is given, mixed with what is found there
        with `queries` (G, D), and the neighbours."""
        rows = self.beginnings.rows[self.beginnings.given].tolist()
        owners = [self.beams.searches[self.beams.owner[row]].clip for row in rows]
        searches = RowSearches([clip.retrieval for clip in owners])
        nothing = [-1] * len(rows)
        mixed, found, missing = searches.retrieve(logp, queries, nothing, self._excluding(rows))
        self._note_missing(rows, missing)
        self._searches.searches += searches.searches
        return mixed, found

    def heard(self, pending: Pending | None) -> tuple[Tensor | None, Neighbours | None]:
        """What was asked mixed with what the neighbours say (B, V), and these; None and None where
        nothing was asked."""
        if pending is None:
            return None, None
        logp, neighbours, missing = self._searches.finish(pending)
        self._note_missing(range(len(self.beams)), missing)
        return logp, neighbours

    @property
    def searches(self) -> Searches:
        """What became of the rows' questions."""
        return self._searches.searches

    def go_on(self, rows: np.ndarray, first: Tensor) -> None:
        """Keep these rows (R,), which may repeat, and read what their beams chose last.

        `first` (B,) is the likeliest token of each row until now, on the device.
        """
        unchanged = self.keep(rows)
        self.boosted.advance(self.beams.tokens)
        self.fused.advance(self.beams.tokens)
        self.letters.advance(self.beams.tokens)
        if unchanged and self.beams.likeliest:
            self.ids = first[:, None]
        else:
            self.ids = torch.from_numpy(self.beams.tokens).to(self._lm.device)[:, None]
        self.lengths, self.first, self.shortest = torch.ones_like(self.ids[:, 0]), False, 1
        self._at, self.beginnings = torch.ones_like(self.ids, dtype=torch.bool), None

    def keep(self, rows: np.ndarray) -> bool:
        """Keep these rows (R,), which may repeat; whether they are all, as they were."""
        if np.array_equal(rows, np.arange(len(self._reads))):
            return True
        if not len(rows):
            self.release()
            self.memory = self._text_states = None
        for name, places in (("memory", self._reads), ("_text_states", self._asks_with_text)):
            part, kept = getattr(self, name), rows[places[rows]]
            if part is not None and len(kept):
                part.select((np.cumsum(places) - 1)[kept].tolist())
            elif part is not None:
                part.release()
                setattr(self, name, None)
        if len(rows):
            self._cache = self._cache.select(rows.tolist())
            index = torch.from_numpy(rows).to(self._lm.device)
            self.ids, self.lengths, self._at = (
                one[index] for one in (self.ids, self.lengths, self._at)
            )
        self._searches.select(rows.tolist())
        self.boosted.select(rows)
        self.fused.select(rows)
        self.letters.select(rows)
        for name in _OF_ROWS:
            setattr(self, name, getattr(self, name)[rows])
        self._place()
        return False

    def join(self, other: Rows) -> None:
        """Go on with the rows of `other`, too; every row has one token to read."""
        self.letters.require(other.letters)
        self.fused.require(other.fused)
        for name in ("memory", "_text_states"):  # first: a memory may refuse the other
            mine, new = getattr(self, name), getattr(other, name)
            if mine and new:
                mine.join(new)
            else:
                setattr(self, name, mine or new)
        self.letters.join(other.letters)
        self.beams.join(other.beams)
        self._cache = self._cache.join(other._cache)
        self._searches.join(other._searches)
        self.boosted.join(other.boosted)
        self.fused.join(other.fused)
        for name in ("ids", "lengths", "_at"):
            setattr(self, name, torch.cat((getattr(self, name), getattr(other, name))))
        for name in _OF_ROWS:
            setattr(self, name, np.concatenate((getattr(self, name), getattr(other, name))))
        self._place()

    def release(self) -> None:
        """Give the memory of all rows back; nothing can be read after that."""
        for part in (self._cache, self._text_states, self.memory):
            if part is not None:
                part.release()

    def _excluding(self, places: Sequence[int]) -> list[int] | None:
        """The documents that these rows exclude; None if no row excludes any."""
        return self._excluded[places].tolist() if (self._excluded >= 0).any() else None

    def _note_missing(self, places: Sequence[int], missing: Sequence[int]) -> None:
        """Tell the searches of these rows how many shards did not answer."""
        if any(missing):
            for place, shards in zip(places, missing, strict=True):
                search = self.beams.searches[self.beams.owner[place]]
                search.missing_shards = max(search.missing_shards, shards)

    def _place(self) -> None:
        """Number the rows that read, and those that ask with text, on the device."""
        self._attending, self._asking_with_text = (
            self._on_device(places.nonzero()[0]) for places in (self._reads, self._asks_with_text)
        )

    def _on_device(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self._lm.device)


_OF_ROWS = ("_searching", "_excluded", "_reads", "_asks_with_text")


class Prompt:
    """The prompts of clips, which may be read a part at a time before the clips join a batch."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @property
    def left(self) -> int:
        """Tokens of the shortest that are not read."""
        return self.rows.shortest

    @torch.inference_mode()
    def read(self, tokens: int) -> None:
        """Read so many tokens, fewer than are left, of each."""
        if not 0 < tokens < self.left:
            raise ValueError(f"a part of {tokens} tokens where {self.left} are left")
        self.rows.read_part(tokens)

    def release(self) -> None:
        """Give the clips up, and their memory back."""
        self.rows.release()


class _TextOnlyStates:
    """Reads the transcripts so far as if nobody had spoken: queries for keys of text alone."""

    def __init__(
        self,
        lm: SpeechDecoder,
        vocabulary: TextVocabulary,
        beginnings: Sequence[Sequence[int]],
        limit: int,
        pool: PagePool,
    ) -> None:
        """A row for each of `beginnings`, most of which are empty."""
        self._lm = lm
        self._prompt = vocabulary.prompt(None)
        self._cache = lm.cache([None] * len(beginnings), len(self._prompt) + limit, pool)
        self._beginnings: Sequence[Sequence[int]] | None = beginnings

    def read(self, ids: Tensor) -> Tensor:
        """The state (B, D) after the newest tokens `ids` (B, 1); first of all, after the prompt and
        each token of the beginnings, at every place of these (N, D)."""
        if self._beginnings is None:
            return self._lm(ids, self._cache).keys[:, -1]
        texts, self._beginnings = self._beginnings, None
        ids, lengths = pad_ids([[*self._prompt, *text] for text in texts], ids.device)
        at = torch.zeros_like(ids, dtype=torch.bool)
        keys = self._lm(ids, self._cache, lengths, at).keys
        return keys[Beginnings.of(texts).positions(lengths)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, which may repeat."""
        self._cache = self._cache.select(rows)

    def join(self, other: _TextOnlyStates) -> None:
        """Go on with the rows of `other`, too."""
        self._cache = self._cache.join(other._cache)

    def release(self) -> None:
        """Give up the rows, and their memory."""
        self._cache.release()
