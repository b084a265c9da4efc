"""kNN-LM as a hook around a language model: what the engine's decoding with a datastore is measured
against.

A model of the design that the repository knn-transformers published (of RetoMaton, arXiv
2201.12431; kNN-LM is arXiv 1911.00172), written anew: one sequence is generated, greedily and with
a key-value cache; a forward hook keeps the state that goes into the last feed-forward layer; after
each step FAISS is asked for its neighbours, on the CPU, in one index of all keys; their tokens are
gathered from a memory-mapped array, and the softmax of their negative distances is mixed with the
model's log-probabilities.

It is not that repository's code, which hooks into Hugging Face's classes and would be no faster for
it; nor its evaluation of a text that is known, where all positions are looked up at once; nor
RetoMaton's automaton, which spares searches; nor FAISS on a GPU. It keeps to the vocabulary's
transcript ids as ours does, so that over an index that compares every key the two say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor, nn

from mmrag.config import KNN
from mmrag.model.lm import LM
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.datastore import Datastore

LISTS, PROBES = 4096, 32
"""Inverted lists of its IVFPQ, and how many of them a query visits."""
TRAINED = 39
"""Keys that FAISS wants to train a list on, at least."""
SAMPLED = 64
"""Keys that a list is trained on, if there are as many."""
CODE_BYTES = 64
"""Of a key, or the most below it that divide the keys' width."""
CHUNK = 250_000
"""Keys in memory at once beside an index."""


class HookedLM:
    """A language model whose steps ask an index, one sequence at a time."""

    def __init__(
        self, lm: LM, vocabulary: Vocabulary, index: faiss.Index, values: np.ndarray, knn: KNN
    ) -> None:
        """`values` (N,) are the tokens that follow the keys of `index` (N)."""
        self._lm = lm
        self._vocabulary = vocabulary
        self._allowed = torch.from_numpy(vocabulary.transcript_ids())
        self._index = index
        self._values = values
        self._knn = knn
        self._key = torch.empty(0)

    @torch.inference_mode()
    def generate(self, speech: Sequence[int], limit: int) -> list[int]:
        """The transcript of a clip's unit ids, its end token included: at most `limit` tokens."""
        hook = self._lm.blocks[-1].feed_forward_norm.register_forward_hook(self._keep)
        try:
            ids = torch.tensor([self._vocabulary.prompt(speech)])
            cache = self._lm.cache([speech], ids.shape[1] + limit)
            tokens: list[int] = []
            while len(tokens) < limit and tokens[-1:] != [self._vocabulary.eos]:
                last = torch.arange(ids.shape[1])[None] == ids.shape[1] - 1
                logits = self._lm(ids, cache, at=last).logits
                lm_logp = logits.masked_fill(~self._allowed, -torch.inf).log_softmax(-1)
                tokens.append(int(self.mixed(lm_logp[0], self._key.flatten(0, -2)[-1]).argmax()))
                ids = torch.tensor([tokens[-1:]])
        finally:
            hook.remove()
        return tokens

    def mixed(self, lm_logp: Tensor, key: Tensor) -> Tensor:
        """The next token's log-probabilities (V,), of the model's own (V,) and a key (D,)."""
        distances, entries = self._index.search(key[None].float().numpy(), self._knn.k)
        tokens = torch.from_numpy(self._values[entries[0]].astype(np.int64))
        found = torch.from_numpy(entries[0] >= 0) & lm_logp[tokens].isfinite()
        if not found.any():
            return lm_logp
        distances = torch.from_numpy(distances[0]).masked_fill(~found, torch.inf)
        weights = (-distances / self._knn.temperature).softmax(0)
        knn_logp = torch.zeros_like(lm_logp).scatter_add(0, tokens, weights).log()
        weight = self._knn.weight
        return torch.logaddexp(lm_logp + math.log1p(-weight), knn_logp + math.log(weight))

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._key = output


def values(store: Datastore, file: Path) -> np.ndarray:
    """The tokens of all entries (N,) int32, written to a file and mapped from there."""
    written = np.memmap(file, np.int32, "w+", shape=store.entries)
    for start, stop in _chunks(store):
        written[start:stop] = store.tokens[np.arange(start, stop)]
    written.flush()
    return np.memmap(file, np.int32, "r", shape=store.entries)


def flat(store: Datastore, tell: Callable[[str], None]) -> faiss.Index:
    """All keys in float32 and in memory, each compared with a query."""
    tell(f"hook: a flat index of {store.entries:,} keys")
    width = store.description.width
    index = faiss.IndexFlatL2(width)
    index.codes.resize(store.entries * width * 4)  # once: growing takes twice the memory
    index.ntotal = store.entries
    rows = faiss.rev_swig_ptr(index.get_xb(), store.entries * width).reshape(-1, width)
    for start, stop in _chunks(store):
        rows[start:stop] = store.keys(start, stop)
    return index


def ivfpq(store: Datastore, file: Path, tell: Callable[[str], None]) -> faiss.IndexIVFPQ:
    """All keys as FAISS's codes in its inverted lists, with the usual settings; kept in `file`, and
    read from there if it is there with as many."""
    width = store.description.width
    lists = max(1, min(LISTS, store.entries // TRAINED))
    code = max(size for size in range(1, CODE_BYTES + 1) if width % size == 0)
    if file.exists():
        index = faiss.read_index(str(file))
        if (index.ntotal, index.d, index.nlist) == (store.entries, width, lists):
            tell(f"{file} is there already")
            index.nprobe = PROBES
            return index
    tell(f"hook: an IVFPQ index of {lists:,} lists and {code} bytes a key")
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, lists, code, 8)
    wanted = min(store.entries, max(lists, 256) * SAMPLED)
    sample = np.linspace(0, store.entries - 1, wanted).astype(np.int64)
    index.train(store.keys_of(sample))
    for start, stop in _chunks(store):
        index.add(store.keys(start, stop))
    aside = file.with_name(f".{file.name}")
    faiss.write_index(index, str(aside))
    aside.replace(file)
    index.nprobe = PROBES
    return index


def _chunks(store: Datastore) -> list[tuple[int, int]]:
    starts = range(0, store.entries, CHUNK)
    return [(start, min(start + CHUNK, store.entries)) for start in starts]
