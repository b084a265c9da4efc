"""Entities in transcripts: how many are found, how many are made up, and what their words cost.

Knows texts alone. Everything is compared as they are `spoken`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mmrag.score.rates import Edit, ErrorRate, alignments, check_paired, partial_error_rate
from mmrag.score.recall import Recall
from mmrag.text import spoken

ENTITY, OTHER = 0, 1
"""Places of the two kinds of words in counts (N, 2, 4)."""


@dataclass(frozen=True)
class Detection:
    """Entities found and made up, as precision, recall and F1."""

    found: int
    total: int
    """Entities that were said."""
    false_alarms: int
    """Candidates in the hypotheses that nobody said there."""

    @property
    def recall(self) -> float | None:
        """Share of the entities that was found; None if there was nothing to find."""
        return Recall(self.found, self.total).rate

    @property
    def precision(self) -> float | None:
        """Share of the hypothesised entities that were said; None if none was hypothesised."""
        hypothesised = self.found + self.false_alarms
        return self.found / hypothesised if hypothesised else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of the two; None if nothing was said and nothing hypothesised."""
        both = self.total + self.found + self.false_alarms
        return 2 * self.found / both if both else None


@dataclass(frozen=True)
class EntityScore:
    """What a table says about entities, and WER of their words and of the others, in
    `word_error_rate`'s alignment.

    A reference word belongs to an entity where all the entity's words stand there one after the
    other; a substitution and a deletion belong to their reference word. An inserted word belongs to
    an entity if it is a word of one of the utterance's entities. So the counts of both add up to
    those of `word_error_rate`.
    """

    detection: Detection
    entity_words: ErrorRate
    other_words: ErrorRate

    @property
    def row(self) -> dict[str, Any]:
        """As the keys of a row of `results.json`; all None where no utterance has an entity."""
        detected = self.detection
        values = {
            "entities": detected.total,
            "entity_recall": detected.recall,
            "entity_precision": detected.precision,
            "entity_f1": detected.f1,
            "entity_false_alarms": detected.false_alarms,
        }
        for kind, rate in (("entity", self.entity_words), ("other", self.other_words)):
            values |= {
                f"{kind}_wer": rate.rate,
                f"{kind}_wer_low": rate.low,
                f"{kind}_wer_high": rate.high,
                f"{kind}_substitutions": rate.substitutions,
                f"{kind}_deletions": rate.deletions,
                f"{kind}_insertions": rate.insertions,
                f"{kind}_words": rate.reference,
            }
        return values if detected.total else dict.fromkeys(values)


def score_entities(
    references: Sequence[str],
    hypotheses: Sequence[str],
    entities: Sequence[Sequence[str]],
    candidates: Sequence[Collection[str]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> EntityScore:
    """All of it; arguments as in `detect_entities` and `word_error_rate`."""
    known = entity_names(entities) if candidates is None else candidates
    counted = count_entities(references, hypotheses, entities, known)
    return entity_score([counted], resamples, seed)


@dataclass(frozen=True)
class EntityCounts:
    """What some of the utterances count for: scores are sums over all of them."""

    detection: Detection
    words: np.ndarray
    """(N, 2, 4) of N utterances' words, of entities and others: substitutions, deletions,
    insertions and reference words."""


def entity_names(entities: Iterable[Sequence[str]]) -> frozenset[str]:
    """The entities of all utterances, each once, as they are compared."""
    return frozenset(_spelt(name, names) for names in entities for name in names)


def count_entities(
    references: Sequence[str],
    hypotheses: Sequence[str],
    entities: Sequence[Sequence[str]],
    candidates: Sequence[Collection[str]] | frozenset[str],
) -> EntityCounts:
    """What `score_entities` sums, of some utterances; `candidates` are each one's, or for all of
    them alike `entity_names`."""
    if isinstance(candidates, frozenset):
        detection = _detect(references, hypotheses, entities, [candidates] * len(hypotheses))
    else:
        detection = detect_entities(references, hypotheses, entities, candidates)
    return EntityCounts(detection, _kinds(references, hypotheses, entities))


def entity_score(
    counted: Sequence[EntityCounts], resamples: int = 1000, seed: int = 0
) -> EntityScore:
    """The score of utterances that were counted in several lots."""
    found, total, alarms = (
        sum(getattr(one.detection, name) for one in counted)
        for name in ("found", "total", "false_alarms")
    )
    words = np.concatenate([one.words for one in counted])
    rates = [partial_error_rate(words[:, kind], resamples, seed) for kind in (ENTITY, OTHER)]
    return EntityScore(Detection(found, total, alarms), rates[ENTITY], rates[OTHER])


def entity_recall(entities: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Recall:
    """How many of each utterance's entities its hypothesis holds.

    An entity is found where its spoken words stand in the hypothesis one after the other;
    one that is listed twice has to be there twice. Raises ValueError if the lists differ in
    length or an entity has no letter or digit.
    """
    check_paired("lists of entities", entities, hypotheses)
    found = total = 0
    for names, hypothesis in zip(entities, hypotheses, strict=True):
        heard = _bounded(spoken(hypothesis))
        for words, times in Counter(_spelt(name, names) for name in names).items():
            total += times
            found += min(times, heard.count(_bounded(words)))
    return Recall(found, total)


def detect_entities(
    references: Sequence[str],
    hypotheses: Sequence[str],
    entities: Sequence[Sequence[str]],
    candidates: Sequence[Collection[str]] | None = None,
) -> Detection:
    """Each utterance's `entities` found, as `entity_recall` counts them, and false alarms.

    An entity is hypothesised where a candidate's words stand in the hypothesis one after the
    other. Candidates are the utterance's own entities and its element of `candidates`, the phrases
    that came with it; where that is None, the entities of all utterances. A hypothesised entity is
    a false alarm unless it is listed, or stands in the reference, as often. Raises ValueError as
    `entity_recall` does.
    """
    if candidates is None:
        known: Sequence[frozenset[str]] = [entity_names(entities)] * len(entities)
    else:
        check_paired("lists of candidates", candidates, hypotheses)
        known = [frozenset(_spelt(name, names) for name in names) for names in candidates]
    return _detect(references, hypotheses, entities, known)


def _detect(
    references: Sequence[str],
    hypotheses: Sequence[str],
    entities: Sequence[Sequence[str]],
    known: Sequence[frozenset[str]],
) -> Detection:
    recalled = entity_recall(entities, hypotheses)
    check_paired("references", references, hypotheses)
    false_alarms = 0
    for reference, hypothesis, names, others in zip(
        references, hypotheses, entities, known, strict=True
    ):
        listed = Counter(map(_normalise, names))
        said, heard = _bounded(spoken(reference)), spoken(hypothesis)
        spans = _spans(heard.split(), {len(one.split()) for one in (*listed, *others)})
        for words in spans & (others | listed.keys()):
            true = max(listed[words], said.count(_bounded(words)))
            false_alarms += max(0, _bounded(heard).count(_bounded(words)) - true)
    return Detection(recalled.found, recalled.total, false_alarms)


def _kinds(
    references: Sequence[str], hypotheses: Sequence[str], entities: Sequence[Sequence[str]]
) -> np.ndarray:
    """(N, 2, 4), as `EntityCounts.words`."""
    check_paired("lists of entities", entities, hypotheses)
    counts = np.zeros((len(hypotheses), 2, 4), np.int64)
    aligned = alignments(references, hypotheses)
    for row, names, edits in zip(counts, entities, aligned, strict=True):
        _count_by_kind(row, [_spelt(name, names).split() for name in names], edits)
    return counts


def _count_by_kind(row: np.ndarray, names: Sequence[list[str]], edits: Iterable[Edit]) -> None:
    """Add an utterance's edits to `row` (2, 4)."""
    said = [word for edit in edits for word in edit.reference_words]
    inside = _positions(said, names)
    own = {word for name in names for word in name}
    at = 0
    for edit in edits:
        for word in edit.hypothesis_words if edit.kind == "insert" else ():
            row[ENTITY if word in own else OTHER, 2] += 1
        for _ in edit.reference_words:
            kind = ENTITY if at in inside else OTHER
            row[kind, 3] += 1
            if edit.kind != "equal":
                row[kind, 0 if edit.kind == "substitute" else 1] += 1
            at += 1


def _positions(words: Sequence[str], names: Iterable[list[str]]) -> set[int]:
    """Where in `words` one of `names` stands, every word of it."""
    return {
        at
        for name in names
        for start in range(len(words) - len(name) + 1)
        if words[start : start + len(name)] == name
        for at in range(start, start + len(name))
    }


def _spans(words: Sequence[str], lengths: Collection[int]) -> set[str]:
    """Every run of `words` that is as long as one of `lengths`."""
    return {
        " ".join(words[start : start + length])
        for length in lengths
        for start in range(len(words) - length + 1)
    }


def _bounded(words: str) -> str:
    """Words with a space on both sides each, so that a substring is a sequence of whole words."""
    return "".join(f" {word} " for word in words.split())


@lru_cache(maxsize=100_000)  # the same phrases come with hundreds of utterances
def _normalise(name: str) -> str:
    return spoken(name)


def _spelt(name: str, among: Collection[str]) -> str:
    """An entity as it is compared; ValueError if nothing is left of it."""
    if words := _normalise(name):
        return words
    raise ValueError(f"an entity without a letter or digit among {list(among)}")
