"""A corpus made from nothing: sentences of two domains, the voices that say them, the splits.

`everyday` sentences come from a grammar over common words. `assistant` sentences are requests to a
voice assistant about people, places and companies, whose names nobody can know beforehand: names
come from Faker (extra `speech`) and are dealt out so that every name of the dev and test splits
holds a word that the language model's training text does not. The datastore split mentions those
names in other sentences and other voices.

Knows nothing about files or processes: `stream` says what every split holds, one utterance after
the other, `render` makes the sound of one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from mmrag.config import Sentences, Synthesize
from mmrag.corpora import augment
from mmrag.corpora import sentences as real
from mmrag.corpora.drawn import Drawn, Sentence
from mmrag.corpora.grammar import GRAMMAR, expand
from mmrag.corpora.voices import engines, espeak
from mmrag.corpora.voices.speech import Engine, Speech, Voice
from mmrag.records import Line

SPLITS = ("lm", "text", "adapter", "datastore", "dev", "test")
GROUPS = {"lm": 0.55, "adapter": 0.2, "dev": 0.1, "test": 0.15}
"""Share of all names that a group has; `text` draws from lm's, `datastore` from the others'."""
LOOKED_UP = ("adapter", "dev", "test")
"""Splits whose entities the datastore split mentions."""
KINDS = {"person": 0.5, "place": 0.25, "company": 0.25}
"""Kinds of entities and their shares."""
SENTENCES_PER_ENTITY = {"lm": 0.5, "text": 0.5, "adapter": 2, "dev": 2, "test": 2}
"""Assistant sentences of a split for each entity at its disposal."""
LOCALES = ("en_US", "en_GB", "en_IE", "en_NZ", "en_IN", "en_KE", "en_NG")
EVERYDAY_WORDS = range(4, 11)
_TEMPLATES = tuple(
    (template, tuple(slot for slot in re.findall(r"\{(\w+)\}", template) if slot in KINDS))
    for template in GRAMMAR["assistant"]
)
"""Assistant templates, each with the kinds of its entities."""
ATTEMPTS = 1000
"""Draws in a row that give nothing new before the grammar counts as exhausted."""
FRESH_DRAWS = 50
"""Draws in a row that give nobody new, after which somebody says a line once more."""

_UNSPOKEN = frozenset(("st", "mt", "dr", "mr", "mrs", "jr", "sr", "ft", "ltd", "inc", "etc"))
"""Abbreviations: what is spoken is not what is written."""


Made = TypeVar("Made")


@dataclass(frozen=True)
class Planned:
    """An utterance to be made. `voice` is None for text that nobody speaks."""

    id: str
    text: str
    domain: str
    entities: tuple[str, ...]
    voice: Voice | None
    document: str
    seed: int
    """Of its augmentation."""
    rough: bool = False
    """Whether it is recorded badly: what models are trained on, and never tested on."""
    phonetic: bool = False
    """As in `Line`."""


@dataclass(frozen=True)
class Names:
    """Words that entities are made of, sorted; each family name and town is in one group only."""

    first: tuple[str, ...]
    family: Mapping[str, tuple[str, ...]]
    towns: Mapping[str, tuple[str, ...]]


def plan(config: Synthesize, seed: int) -> dict[str, list[Planned]]:
    """Every split's utterances, as `stream` gives them, all at once."""
    return {split: list(planned) for split, planned in stream(config, seed).items()}


def stream(config: Synthesize, seed: int) -> dict[str, Iterator[Planned]]:
    """Every split's utterances; the same configuration and seed give the same plan.

    Each is made when it is asked for: who says it, how it is recorded. Its sentence is drawn
    beforehand, since no sentence may stand twice and each split is shuffled: what stays in memory
    for each utterance is its text, a tuple of its entities if it has any, and the 28 bytes of
    `Drawn`, until its split has been read; the set of texts that are taken only until all are
    drawn.

    No sentence stands twice anywhere. Entities of lm and text, of adapter, of dev and of test are
    four disjoint sets; datastore has `config.mentions` sentences about each entity of the latter
    three. Raises ValueError, naming the split, when there are too few sentences or entities, and
    ImportError without the `speech` extra.
    """
    sentences = _draw(config, seed)
    return {split: _cast(split, sentences[split], config, seed) for split in SPLITS}


def _draw(config: Synthesize, seed: int) -> dict[str, Drawn]:
    """What is said in every split, in its order."""
    names = make_names(seed)
    taken: set[str] = set()
    mentioned: set[tuple[str, str]] = set()  # entities and their kinds
    sentences = {split: Drawn() for split in SPLITS}
    sizes = {
        "dev": config.dev,
        "test": config.test,
        "adapter": config.adapter,
        "lm": config.lm,
        "text": config.text,
    }
    for split, size in sizes.items():
        draw, drawn = Random(f"{seed} {split}"), sentences[split]
        everyday = 0 if split == "adapter" else round(size * config.everyday_share)
        roster = _roster(split, size - everyday, names, draw)
        drawn.extend(_everyday(split, taken, draw) for _ in range(everyday))
        for _ in range(size - everyday):
            sentence, kinds = _assistant(split, roster, taken, draw)
            drawn.append(sentence)
            if split in LOOKED_UP:
                mentioned.update(zip(sentence.entities, kinds, strict=True))
        drawn.shuffle(draw)
    draw, drawn = Random(f"{seed} datastore"), sentences["datastore"]
    for entity, kind in sorted(mentioned):
        for _ in range(config.mentions):
            drawn.append(_assistant("datastore", {kind: (entity,)}, taken, draw)[0])
    drawn.shuffle(draw)
    if config.sentences:
        _mix_real(config.sentences, sentences, taken, seed)
    return sentences


def _mix_real(config: Sentences, sentences: dict[str, Drawn], taken: set[str], seed: int) -> None:
    """Add sentences of text files: as many of each split as are to be said, and the rest as text.

    Raises ValueError, naming the split, when the files hold too few.
    """
    found = {split: Drawn() for split in ("lm", "dev", "test")}
    for split, text, domain in real.read(config.files, config.held_out, taken):
        found[split].append(Sentence(text, domain))
    for split, fresh in found.items():
        fresh.shuffle(Random(f"{seed} {split} sentences"))
        size = getattr(config, split)
        if len(fresh) < size:
            raise ValueError(
                f"split {split}: {len(fresh)} sentences in synthesize.sentences.files, fewer than "
                f"the {size} asked for"
            )
        rest = iter(fresh)
        sentences[split].extend(islice(rest, size))
        if split == "lm":
            sentences["text"].extend(rest)
    for split in (*found, "text"):
        sentences[split].shuffle(Random(f"{seed} {split} mixed"))


def assign_voices(
    texts: Iterable[str | Line],
    seed: int,
    shares: Mapping[str, float] = MappingProxyType({"espeak": 1.0}),
) -> list[Planned]:
    """Lines of any text, each with a training voice that depends on `seed` and the line alone, of
    synthesizers with these `shares`; one with IPA or in a language that is named has espeak-ng's.

    Takes of a line have voices of different names, as long as there are any.
    """
    planned = []
    for number, text in enumerate(texts):
        line = text if isinstance(text, Line) else Line(text)
        voice, draw = _spoken_by(line, seed, shares)
        id = f"spoken-{number:06d}"
        seeds = draw.getrandbits(32)
        planned.append(Planned(id, line.text, "", (), voice, id, seeds, phonetic=line.phonetic))
    return planned


def _spoken_by(line: Line, seed: int, shares: Mapping[str, float]) -> tuple[Voice, Random]:
    """Who says a take of a line, and the dice that it was drawn with."""
    heard: set[str] = set()
    for take in range(line.take + 1):
        draw = Random(f"{seed} spoken {line.text}" + (f" take {take}" if take else ""))
        for _ in range(FRESH_DRAWS):
            if line.phonetic or line.language:  # phonemes are those of an English voice
                language = None if line.phonetic else line.language
                voice = espeak.speaking(language, "spoken", draw)
            else:
                voice = engines.cast(shares, "spoken", draw)
            if voice.id not in heard:
                break
        heard.add(voice.id)
    return voice, draw


def render(planned: Planned, synthesizer: Engine) -> Speech:
    """Speak, and record it in a quiet room or in a rough place; identical every time.

    Raises ValueError where the utterance has no voice.
    """
    if planned.voice is None:
        raise ValueError(f"{planned.id} has no voice: it is text alone")
    how = {"phonetic": True} if planned.phonetic else {}
    speech = synthesizer.speak(planned.text, planned.voice, **how)
    draw = np.random.default_rng(planned.seed)
    record = augment.rough if planned.rough else augment.mild
    return replace(speech, wave=np.clip(record(speech.wave, draw), -1, 1))


def make_names(seed: int) -> Names:
    """Faker's names and towns (and composed ones), dealt out to GROUPS by word.

    No family name or town is also a first name or a word of the grammar, so one that is met in a
    group's sentences is met in no other group's.
    """
    try:
        from faker import Faker
    except ImportError:
        raise ImportError("names need Faker: pip install mmrag[speech]") from None
    first, family, towns = set(), set(), set()
    for locale in LOCALES:
        faker = Faker(locale, use_weighting=False)
        faker.seed_instance(seed)
        first |= {faker.first_name() for _ in range(2000)}
        family |= {faker.last_name() for _ in range(4000)}
        towns |= {faker.city() for _ in range(1000)}
    towns |= {stem + ending for stem in GRAMMAR["stem"] for ending in GRAMMAR["ending"]}
    common = {
        word
        for symbol, phrases in GRAMMAR.items()
        if symbol not in ("stem", "ending")
        for phrase in phrases
        for word in phrase.split()
    }
    first = _usable(first) - common
    return Names(
        first=tuple(sorted(first)),
        family=_deal(_usable(family) - common - first, seed),
        towns=_deal(_usable(towns) - common - first, seed),
    )


def other_names(count: int, seed: int, taken: Iterable[str]) -> list[str]:
    """So many more entities, none of `taken`, each with a word that training text never shows: what
    else may stand in a list. Raises ValueError for too many, ImportError without the `speech`
    extra."""
    names, seen, draw = make_names(seed), set(taken), Random(f"{seed} other names")

    def make() -> str:
        [kind] = draw.choices(list(KINDS), list(KINDS.values()))
        return _entity(kind, draw.choice(("adapter", "dev", "test")), names, draw)

    return [new("other names", "entities", seen, make, str) for _ in range(count)]


def _usable(names: Iterable[str]) -> set[str]:
    """Lower-case ASCII single words that are spoken as they are written."""
    plain = {
        unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        for name in names
    }
    return {
        name
        for name in plain - _UNSPOKEN
        if re.fullmatch(r"[a-z]+('[a-z]+)?", name) and len(name) > 2 and re.search("[aeiouy]", name)
    }


def _deal(words: set[str], seed: int) -> dict[str, tuple[str, ...]]:
    """Each word to one group, by the word and the seed alone."""
    dealt: dict[str, list[str]] = {group: [] for group in GROUPS}
    for word in sorted(words):
        [group] = Random(f"{seed} {word}").choices(list(GROUPS), list(GROUPS.values()))
        dealt[group].append(word)
    return {group: tuple(words) for group, words in dealt.items()}


def _roster(split: str, sentences: int, names: Names, draw: Random) -> dict[str, tuple[str, ...]]:
    """Distinct entities of each kind for `sentences` assistant sentences of a split."""
    group = "lm" if split == "text" else split
    taken: set[str] = set()
    roster = {}
    for kind, share in KINDS.items():
        count = max(1, round(share * sentences / SENTENCES_PER_ENTITY[split]))
        roster[kind] = tuple(
            new(split, "entities", taken, lambda kind=kind: _entity(kind, group, names, draw), str)
            for _ in range(count)
        )
    return roster


def _entity(kind: str, group: str, names: Names, draw: Random) -> str:
    family, town = names.family[group], names.towns[group]
    words = {
        "first": (draw.choice(names.first),),
        "family": (draw.choice(family),),
        "partner": (draw.choice(family),),
        "town": (draw.choice(town),),
    }
    return expand(f"{{{kind}_name}}", {**GRAMMAR, **words}, draw)


def _everyday(split: str, taken: set[str], draw: Random) -> Sentence:
    def make() -> Sentence | None:
        text = expand("{everyday}", GRAMMAR, draw)
        return Sentence(text, "everyday") if len(text.split()) in EVERYDAY_WORDS else None

    return new(split, "everyday sentences", taken, make, lambda sentence: sentence.text)


def _assistant(
    split: str, roster: Mapping[str, Sequence[str]], taken: set[str], draw: Random
) -> tuple[Sentence, tuple[str, ...]]:
    """A new sentence with entities of the roster, from the templates that it can fill; and the
    kinds of its entities."""
    templates = [
        (template, kinds) for template, kinds in _TEMPLATES if all(kind in roster for kind in kinds)
    ]

    def make() -> tuple[Sentence, tuple[str, ...]]:
        template, kinds = draw.choice(templates)
        entities = tuple(draw.choice(roster[kind]) for kind in kinds)
        slots = {kind: (entity,) for kind, entity in zip(kinds, entities, strict=True)}
        text = expand(template, {**GRAMMAR, **slots}, draw)
        return Sentence(text, "assistant", entities), kinds

    return new(split, "assistant sentences", taken, make, lambda made: made[0].text)


def new(
    split: str,
    what: str,
    taken: set[str],
    make: Callable[[], Made | None],
    key: Callable[[Made], str],
) -> Made:
    """The first of ATTEMPTS draws whose key is not taken yet."""
    for _ in range(ATTEMPTS):
        made = make()
        if made is not None and key(made) not in taken:
            taken.add(key(made))
            return made
    raise ValueError(f"split {split}: there are too few distinct {what}, ask for less")


def _cast(
    split: str, sentences: Iterable[Sentence], config: Synthesize, seed: int
) -> Iterator[Planned]:
    """Number a split's sentences and say who speaks them."""
    draw = Random(f"{seed} {split} voices")
    for number, sentence in enumerate(sentences):
        id = f"{split}-{number:06d}"
        yield Planned(
            id=id,
            text=sentence.text,
            domain=sentence.domain,
            entities=sentence.entities,
            voice=None if split == "text" else engines.cast(_shares(split, config), split, draw),
            document=id,
            seed=draw.getrandbits(32),
            rough=split == "lm",
        )


def _shares(split: str, config: Synthesize) -> dict[str, float]:
    """The synthesizers that say a split, and how much of it."""
    held_out = split in ("dev", "test")
    return (config.held_out_voices if held_out else None) or config.voices
