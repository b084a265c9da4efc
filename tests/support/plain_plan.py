"""The plan of a corpus with an object for every sentence and utterance, all of them at once."""

from random import Random

from mmrag.config import Synthesize
from mmrag.corpora import sentences as real
from mmrag.corpora.drawn import Sentence
from mmrag.corpora.synthetic import (
    SPLITS,
    Planned,
    _assistant,
    _everyday,
    _roster,
    _shares,
    make_names,
)
from mmrag.corpora.voices import engines


def plain_plan(config: Synthesize, seed: int) -> dict[str, list[Planned]]:
    """What `synthetic.stream` gives, by lists that are shuffled themselves."""
    names, taken, mentioned = make_names(seed), set(), set()
    sentences: dict[str, list[Sentence]] = {}
    for split in ("dev", "test", "adapter", "lm", "text"):
        size, draw = getattr(config, split), Random(f"{seed} {split}")
        everyday = 0 if split == "adapter" else round(size * config.everyday_share)
        roster = _roster(split, size - everyday, names, draw)
        sentences[split] = [_everyday(split, taken, draw) for _ in range(everyday)]
        asked = [_assistant(split, roster, taken, draw) for _ in range(size - everyday)]
        sentences[split] += [sentence for sentence, _ in asked]
        draw.shuffle(sentences[split])
        if split in ("adapter", "dev", "test"):
            for sentence, kinds in asked:
                mentioned |= {*zip(sentence.entities, kinds, strict=True)}
    draw = Random(f"{seed} datastore")
    sentences["datastore"] = [
        _assistant("datastore", {kind: (entity,)}, taken, draw)[0]
        for entity, kind in sorted(mentioned)
        for _ in range(config.mentions)
    ]
    draw.shuffle(sentences["datastore"])
    more = _real(config, taken, seed) if config.sentences else {}
    for split, drawn in more.items():
        sentences[split] += drawn
        Random(f"{seed} {split} mixed").shuffle(sentences[split])
    return {split: _cast(split, sentences[split], config, seed) for split in SPLITS}


def _real(config: Synthesize, taken: set[str], seed: int) -> dict[str, list[Sentence]]:
    drawn: dict[str, list[Sentence]] = {}
    read = list(real.read(config.sentences.files, config.sentences.held_out, taken))
    for split in ("lm", "dev", "test"):
        fresh = [Sentence(text, domain) for its, text, domain in read if its == split]
        Random(f"{seed} {split} sentences").shuffle(fresh)
        size = getattr(config.sentences, split)
        drawn[split] = fresh[:size]
        if split == "lm":
            drawn["text"] = fresh[size:]
    return drawn


def _cast(split: str, sentences: list[Sentence], config: Synthesize, seed: int) -> list[Planned]:
    draw = Random(f"{seed} {split} voices")
    return [
        Planned(
            id=(id := f"{split}-{number:06d}"),
            text=sentence.text,
            domain=sentence.domain,
            entities=sentence.entities,
            voice=None if split == "text" else engines.cast(_shares(split, config), split, draw),
            document=id,
            seed=draw.getrandbits(32),
            rough=split == "lm",
        )
        for number, sentence in enumerate(sentences)
    ]
