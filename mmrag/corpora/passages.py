"""Passages of Spoken-SQuAD for voices of ours to read: what is tested, and what can be looked up.

Of some topics a few sentences are said by voices that nobody trained on; all the others of the same
topics are what a datastore knows about them. Knows nothing about files' audio or processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

from mmrag.corpora import sentences, spoken_squad
from mmrag.corpora.splits import TEST, CorpusError
from mmrag.corpora.synthetic import Planned
from mmrag.corpora.voices import engines
from mmrag.records import Utterance
from mmrag.text import fold, spoken

DOMAIN = "passages"
LONGEST_ENTITY = 5
"""Words: a longer answer is a clause and no name."""


def plan(
    file: Path,
    topics: int,
    said: int,
    voices: Mapping[str, float],
    held_out_voices: Mapping[str, float],
    seed: int,
) -> dict[str, list[Planned]]:
    """`dev` and `test`: `said` sentences each, of `topics` topics each, by `held_out_voices`;
    `datastore`: the other sentences of both, by `voices`. No sentence stands in two of them.

    Entities are the answers that a sentence holds. What is no sentence to be said
    (`sentences.refusal`) is left out. Raises CorpusError for a file that is not Spoken-SQuAD's, or
    holds too little.
    """
    found: dict[str, list[Utterance]] = {}
    taken: set[str] = set()
    for row in spoken_squad.read(file).splits[TEST]:
        if isinstance(row, Utterance):
            text = fold(spoken(row.text))
            if text not in taken and sentences.refusal(text) is None:
                taken.add(text)
                found.setdefault(row.id.split("_")[0], []).append(row)
    if len(found) < 2 * topics:
        raise CorpusError(f"{file}: {len(found)} topics, fewer than the {2 * topics} asked for")
    drawn = Random(f"{seed} topics").sample(sorted(found), 2 * topics)
    planned: dict[str, list[Planned]] = {"dev": [], "test": [], "datastore": []}
    for split, names in (("dev", drawn[:topics]), ("test", drawn[topics:])):
        everything = [one for name in names for one in found[name]]
        draw = Random(f"{seed} passages {split}")
        draw.shuffle(everything)
        if len(everything) < 2 * said:
            raise CorpusError(
                f"{file}: {len(everything)} sentences of {split}'s topics are too few"
            )
        for into, some, shares in (
            (split, everything[:said], held_out_voices),
            ("datastore", everything[said:], voices),
        ):
            planned[into] += [_planned(one, into, shares, draw) for one in some]
    return planned


def _planned(one: Utterance, split: str, shares: Mapping[str, float], draw: Random) -> Planned:
    entities = dict.fromkeys(fold(spoken(entity)) for entity in one.entities)
    return Planned(
        id=one.id,
        text=fold(spoken(one.text)),
        domain=DOMAIN,
        entities=tuple(name for name in entities if 0 < len(name.split()) <= LONGEST_ENTITY),
        voice=engines.cast(shares, split, draw),
        document=one.id,
        seed=draw.getrandbits(32),
    )
