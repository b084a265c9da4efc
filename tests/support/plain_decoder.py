"""Decoding as it reads: one clip, one hypothesis, one token at a time, without a cache or an array.

What the batch of `mmrag.decoding` is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import plain_ctc
import torch
from plain_retrieval import retrieve
from torch import Tensor

from mmrag.decoding.decode import Choice, Clip, Hypothesis
from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval.knn import best_neighbour


@dataclass
class Node:
    """A prefix of some phrases, `depth` pieces long; `ends` where it is one of them.

    `whole` is the length of the longest phrase that it starts with if a new word follows (0 for
    none), `inner` that of the longest one if its last word goes on.
    """

    depth: int = 0
    ends: bool = False
    whole: int = 0
    inner: int = 0
    children: dict[int, Node] = field(default_factory=dict)


class PhraseTree:
    """Phrases to favour. A phrase is met only from a word's start to a word's end."""

    def __init__(
        self, phrases: Iterable[Sequence[int]], weight: float, word_starts: Tensor
    ) -> None:
        """`phrases` as ids; `word_starts` (V,) bool, the ids that end the word before them."""
        self.root = Node()
        self.weight = weight
        self.word_starts = word_starts
        for phrase in phrases:
            self._add(phrase)
        self._settle(self.root, 0)

    def _add(self, phrase: Sequence[int]) -> None:
        node = self.root
        for piece in phrase:
            node = node.children.setdefault(piece, Node(node.depth + 1))
        node.ends = True

    def _settle(self, node: Node, inner: int) -> None:
        node.inner = inner
        node.whole = node.depth if node.ends else inner
        for piece, child in node.children.items():
            self._settle(child, node.whole if self.word_starts[piece] else node.inner)

    def follow(self, tokens: Sequence[int]) -> Node:
        """The phrase prefix that a hypothesis ends with; the root for none."""
        node = self.root
        for place, token in enumerate(tokens):
            opens = place == 0 or bool(self.word_starts[token])
            going_on = None if node is self.root else node.children.get(token)
            opening = self.root.children.get(token) if opens else None
            node = going_on or opening or self.root
        return node

    def bonus(self, tokens: Sequence[int]) -> Tensor:
        """What each next token (V,) float32 would earn after `tokens`, in nats."""
        node = self.follow(tokens)
        kept = torch.where(self.word_starts, float(node.whole), float(node.inner)) - node.depth
        if self.root.children:
            opening = torch.tensor(list(self.root.children))
            kept[opening] += self.word_starts[opening].float() if tokens else 1.0
        if node.depth and node.children:
            kept[torch.tensor(list(node.children))] = 1.0
        return self.weight * kept


def decode_plainly(lm, vocabulary, clip: Clip, phrases=None) -> list[Hypothesis]:
    """The hypotheses of a clip whose beam search is over; `phrases` in the place of its boost."""
    live, finished = [_begun(lm, vocabulary, clip, phrases)], []
    while live:
        candidates = [
            (one, choice) for one in live for choice in _next(lm, vocabulary, clip, phrases, one)
        ]
        ranked = sorted(candidates, key=lambda c: c[0].logp + c[1].logp, reverse=True)
        live = []
        for rank, (one, choice) in enumerate(ranked):
            if choice.token == vocabulary.eos:
                if rank < clip.beams:
                    finished.append(_then(one, choice, stopped=True))
            elif len(live) < clip.beams:
                live.append(_then(one, choice))
        if len(finished) >= clip.beams or any(len(one.choices) >= clip.longest for one in live):
            finished = finished or live
            live = []
    return sorted(finished, key=lambda one: one.score(clip.length_penalty), reverse=True)


def _then(one: Hypothesis, choice: Choice, stopped: bool = False) -> Hypothesis:
    """A hypothesis, one token on, that was chosen by a score of `choice.logp`: with what phrases
    earned it, it may be more than a log-probability."""
    told = replace(choice, logp=min(choice.logp, 0.0))
    return Hypothesis((*one.choices, told), one.logp + choice.logp, stopped)


def _begun(lm, vocabulary, clip, phrases) -> Hypothesis:
    """The beginning of a clip, each token as it might have been chosen."""
    begun = Hypothesis()
    for token in clip.beginning:
        found = _next(lm, vocabulary, clip, phrases, begun, candidates=vocabulary.size)
        [choice] = [choice for choice in found if choice.token == token]
        begun = _then(begun, choice)
    return begun


def _next(lm, vocabulary, clip, phrases, hypothesis, candidates=None) -> list[Choice]:
    """What may follow a hypothesis, read from its start."""
    tokens = hypothesis.tokens
    prompt = vocabulary.prompt(clip.speech, clip.context)
    allowed = vocabulary.transcript_ids() if tokens else vocabulary.first_ids()
    output = lm(torch.tensor([[*prompt, *tokens]]))
    lm_logp = output.logits[-1:].masked_fill(~torch.from_numpy(allowed), -torch.inf)
    logp = lm_logp = lm_logp.log_softmax(-1)
    found = Neighbours.none(1, 1)
    if clip.retrieval is not None:
        keys = output.keys[:, -1]
        if clip.queries_with_text:
            keys = lm(torch.tensor([[*vocabulary.prompt(None), *tokens]])).keys[:, -1]
        excluded = [clip.exclude_document] if clip.exclude_document >= 0 else None
        logp, found = retrieve(lm_logp, keys, clip.retrieval, excluded)
    if phrases is not None:
        logp = logp + phrases.bonus(tokens).to(logp)
    if tokens and len(tokens) == len(clip.beginning):
        logp = logp.masked_fill(~torch.from_numpy(vocabulary.word_starts()), -torch.inf)
    heard = vocabulary.letters(clip.speech) if clip.ctc_weight else None
    if heard is not None:
        said = torch.from_numpy(
            plain_ctc.next_logp(heard, vocabulary.written, tokens, vocabulary.eos)
        )
        said = said if phrases is None else said + phrases.bonus(tokens)
        joint = (1 - clip.ctc_weight) * logp + clip.ctc_weight * said
        logp = joint.to(logp).masked_fill(logp == -torch.inf, -torch.inf)
    return choose(logp, lm_logp, found, candidates or 2 * clip.beams)[0]


def choose(
    logp: Tensor,
    lm_logp: Tensor,
    neighbours: Neighbours,
    candidates: int,
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
            )
            choices.append(choice)
        rows.append(choices)
    return rows
