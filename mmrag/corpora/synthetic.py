"""A corpus made from nothing: sentences of two domains, the voices that say them, the splits.

`everyday` sentences come from a grammar over common words. `assistant` sentences are requests to a
voice assistant about people, places and companies, whose names nobody can know beforehand: names
come from Faker (extra `speech`) and are dealt out so that every name of the dev and test splits
holds a word that the language model's training text does not. The datastore split mentions those
names in other sentences and other voices.

Knows nothing about files or processes: `plan` says what every split holds, `render` makes the
sound of one utterance.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

import numpy as np

from mmrag.config import Synthesize
from mmrag.corpora import augment
from mmrag.corpora.espeak import Speech, Synthesizer, Voice

VOICES: dict[str, tuple[Voice, ...]] = {
    "train": (
        Voice("train-01", "en-us", pitch=50, rate=165),
        Voice("train-02", "en-us+m1", pitch=45, rate=175),
        Voice("train-03", "en-us+m7", pitch=55, rate=160),
        Voice("train-04", "en-us+f1", pitch=50, rate=170),
        Voice("train-05", "en-us+f3", pitch=45, rate=160),
        Voice("train-06", "en-us+steph", pitch=55, rate=180),
        Voice("train-07", "en-us+klatt6", pitch=60, rate=165),
        Voice("train-08", "en-us-nyc+robert", pitch=40, rate=170),
        Voice("train-09", "en-us-nyc+f5", pitch=40, rate=165),
        Voice("train-10", "en+m2", pitch=55, rate=170),
        Voice("train-11", "en+m5", pitch=65, rate=155),
        Voice("train-12", "en+Annie", pitch=40, rate=165),
        Voice("train-13", "en+linda", pitch=35, rate=160),
        Voice("train-14", "en-gb-x-rp", pitch=40, rate=175),
        Voice("train-15", "en-gb-x-rp+f1", pitch=65, rate=160),
        Voice("train-16", "en-gb-x-rp+Michael", pitch=50, rate=170),
        Voice("train-17", "en-gb-scotland+m4", pitch=60, rate=160),
        Voice("train-18", "en-gb-scotland+f3", pitch=60, rate=170),
        Voice("train-19", "en-gb-x-gbclan+rob", pitch=45, rate=180),
        Voice("train-20", "en-gb-x-gbclan+shelby", pitch=50, rate=165),
        Voice("train-21", "en-gb-x-gbcwmd+m8", pitch=60, rate=165),
        Voice("train-22", "en-gb-x-gbcwmd+f5", pitch=60, rate=175),
        Voice("train-23", "en-029+quincy", pitch=55, rate=170),
        Voice("train-24", "en-029+steph", pitch=40, rate=160),
    ),
    "dev": (
        Voice("dev-male", "en-us+m6", pitch=60, rate=172),
        Voice("dev-female", "en-gb-x-rp+f2", pitch=45, rate=168),
    ),
    "test": (
        Voice("test-male-1", "en-us+m3", pitch=42, rate=168),
        Voice("test-male-2", "en-gb-scotland+max", pitch=55, rate=172),
        Voice("test-female-1", "en+f4", pitch=50, rate=164),
        Voice("test-female-2", "en-us+aunty", pitch=58, rate=170),
    ),
}
"""Who speaks which splits. No voice, and no variant (the part after the plus), is in two rows."""

SPLITS = ("lm", "text", "adapter", "datastore", "dev", "test")
GROUPS = {"lm": 0.55, "adapter": 0.2, "dev": 0.1, "test": 0.15}
"""Share of all names that a group has; `text` draws from lm's, `datastore` from the others'."""
KINDS = {"person": 0.5, "place": 0.25, "company": 0.25}
"""Kinds of entities and their shares."""
SENTENCES_PER_ENTITY = {"lm": 0.5, "text": 0.5, "adapter": 2, "dev": 2, "test": 2}
"""Assistant sentences of a split for each entity at its disposal."""
LOCALES = ("en_US", "en_GB", "en_IE", "en_NZ", "en_IN", "en_KE", "en_NG")
EVERYDAY_WORDS = range(4, 11)
SPEEDS = (0.9, 0.95, 1.0, 1.05, 1.1)
ATTEMPTS = 1000
"""Draws in a row that give nothing new before the grammar counts as exhausted."""

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


@dataclass(frozen=True)
class Sentence:
    """What is said, before it is known by whom. `kinds` has a kind for each entity."""

    text: str
    domain: str
    entities: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """Words that entities are made of, sorted; each family name and town is in one group only."""

    first: tuple[str, ...]
    family: Mapping[str, tuple[str, ...]]
    towns: Mapping[str, tuple[str, ...]]


def plan(config: Synthesize, seed: int) -> dict[str, list[Planned]]:
    """Every split's utterances; the same configuration and seed give the same plan.

    No sentence stands twice anywhere. Entities of lm and text, of adapter, of dev and of test are
    four disjoint sets; datastore has `config.mentions` sentences about each entity of the latter
    three. Raises ValueError, naming the split, when there are too few sentences or entities, and
    ImportError without the `speech` extra.
    """
    names = make_names(seed)
    taken: set[str] = set()
    sizes = {
        "dev": config.dev,
        "test": config.test,
        "adapter": config.adapter,
        "lm": config.lm,
        "text": config.text,
    }
    sentences: dict[str, list[Sentence]] = {}
    for split, size in sizes.items():
        draw = Random(f"{seed} {split}")
        everyday = 0 if split == "adapter" else round(size * config.everyday_share)
        roster = _roster(split, size - everyday, names, draw)
        sentences[split] = [
            *(_everyday(split, taken, draw) for _ in range(everyday)),
            *(_assistant(split, roster, taken, draw) for _ in range(size - everyday)),
        ]
        draw.shuffle(sentences[split])
    draw = Random(f"{seed} datastore")
    mentioned = sorted(
        {
            (entity, kind)
            for split in ("adapter", "dev", "test")
            for sentence in sentences[split]
            for entity, kind in zip(sentence.entities, sentence.kinds, strict=True)
        }
    )
    sentences["datastore"] = [
        _assistant("datastore", {kind: (entity,)}, taken, draw)
        for entity, kind in mentioned
        for _ in range(config.mentions)
    ]
    draw.shuffle(sentences["datastore"])
    return {split: _cast(split, sentences[split], seed) for split in SPLITS}


def assign_voices(texts: Iterable[str], seed: int) -> list[Planned]:
    """Lines of any text, each with a training voice that depends on `seed` and the line alone."""
    planned = []
    for number, text in enumerate(texts):
        draw = Random(f"{seed} spoken {text}")
        id = f"spoken-{number:06d}"
        voice = varied(draw.choice(VOICES["train"]), draw)
        planned.append(Planned(id, text, "", (), voice, id, draw.getrandbits(32)))
    return planned


def render(planned: Planned, synthesizer: Synthesizer) -> Speech:
    """Speak, and record it in a quiet room or in a rough place; identical every time.

    Raises ValueError where the utterance has no voice.
    """
    if planned.voice is None:
        raise ValueError(f"{planned.id} has no voice: it is text alone")
    speech = synthesizer.speak(planned.text, planned.voice)
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
) -> Sentence:
    """A new sentence with entities of the roster, from the templates that it can fill."""
    templates = [
        (template, kinds) for template, kinds in _TEMPLATES if all(kind in roster for kind in kinds)
    ]

    def make() -> Sentence:
        template, kinds = draw.choice(templates)
        entities = tuple(draw.choice(roster[kind]) for kind in kinds)
        slots = {kind: (entity,) for kind, entity in zip(kinds, entities, strict=True)}
        return Sentence(expand(template, {**GRAMMAR, **slots}, draw), "assistant", entities, kinds)

    return new(split, "assistant sentences", taken, make, lambda sentence: sentence.text)


def expand(template: str, grammar: Mapping[str, Sequence[str]], draw: Random) -> str:
    """Replace every {symbol} by one of its phrases until none is left."""
    while "{" in template:
        template = re.sub(r"\{(\w+)\}", lambda found: draw.choice(grammar[found[1]]), template)
    return " ".join(template.split())


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


def _cast(split: str, sentences: Sequence[Sentence], seed: int) -> list[Planned]:
    """Number a split's sentences and say who speaks them."""
    draw = Random(f"{seed} {split} voices")
    return [
        Planned(
            id=(id := f"{split}-{number:06d}"),
            text=sentence.text,
            domain=sentence.domain,
            entities=sentence.entities,
            voice=None if split == "text" else _cast_voice(split, draw),
            document=id,
            seed=draw.getrandbits(32),
            rough=split == "lm",
        )
        for number, sentence in enumerate(sentences)
    ]


def _cast_voice(split: str, draw: Random) -> Voice:
    if split in VOICES:
        return draw.choice(VOICES[split])
    return varied(draw.choice(VOICES["train"]), draw)


def varied(voice: Voice, draw: Random) -> Voice:
    """A speaker like `voice`: another pitch, pace and size of throat."""
    return replace(
        voice,
        pitch=min(99, max(0, voice.pitch + draw.randint(-15, 15))),
        rate=round(voice.rate * draw.uniform(0.85, 1.2)),
        speed=draw.choice(SPEEDS),
    )


def rules(**symbols: str) -> dict[str, tuple[str, ...]]:
    """Each symbol's phrases, written `one | another`; a {symbol} inside stands for its phrases."""
    return {
        symbol: tuple(" ".join(phrase.split()) for phrase in choices.split("|"))
        for symbol, choices in symbols.items()
    }


# What follows an `a` starts with a consonant, and verbs agree with every subject of their slot.
GRAMMAR = rules(
    everyday="""
    {someone} {ate} {food} {past} | {someone} {moved} {thing} {where} | {someone} {went} {past}
    | {someone} {changed} {thing} {past} | {someone} {went} with {companion} | {someone} {felt}
    {feeling} {past} | {someone} {felt} {feeling} because {someone} {happened} | {past}
    {someone} {moved} {thing} {where} | {past} {someone} {went} | the {temper} {animal} {acted}
    {where} | there was a {temper} {animal} {where} | there was a {quality} {object} {where} |
    there were {many} {animals} {where} | {number} {quality} {objects} were {where} | {subject}
    {modal} {task} {future} | {future} {subject} {modal} {task} | {someone} {intended} {task} |
    do you want to {task} {future} | please do not forget to {task} | it was {weather} {past} |
    it will be {weather} {future} | why did {companion} {act} {past} | did {companion} {task}
    {past} | how can {companion} {task} | {someone} asked {companion} to {task} | {someone}
    told {companion} that {someone} {happened} | the {colour} {object} belongs to {companion} |
    how much does the {quality} {object} cost | my {relative} {likes} {activity} {often} |
    {someone} could not find {thing} {where} | {someone} {changed} {thing} and {went} | when
    {someone} {happened} {someone} {went} | i think that {companion} {happened} {past} | {food}
    {tasted} better with {food} | the {site} {nearby} was {full} {past} | let us {task}
    {future} | {activity} makes {companion} {feeling} | is {thing} still {where} | where did
    {companion} put {thing} {past} | {someone} bought a {quality} {object} for {companion} |
    the {quality} {object} was {colour} and {material} | {someone} {waited} for {companion}
    {where} | {someone} never {happened} | {number} of the {animals} {acted} {where} | who
    {changed} {thing} {past} | nobody {happened} {past}
    """,
    someone="i | we | they | he | she | you | {companion} | {companion} | {companion}",
    subject="i | we | they | he | she | you | {companion}",
    companion="""
    my {relative} | our {relative} | her {relative} | his {relative} | the {worker} | our
    {worker} | my {relative} and the {worker} | the {temper} {worker} | a {worker} | the
    {worker} next door
    """,
    relative="""
    mother | father | sister | brother | daughter | son | wife | husband | cousin | grandmother
    | grandfather | nephew | niece | friend | neighbour | uncle | aunt | family
    """,
    worker="""
    teacher | farmer | baker | doctor | nurse | driver | gardener | painter | singer | lawyer |
    carpenter | plumber | waiter | student | sailor | pilot | dentist | tailor | butcher |
    writer | cleaner | builder | soldier | musician | manager | librarian | fisherman |
    journalist | photographer | mechanic | secretary | scientist
    """,
    ate="""
    ate | cooked | ordered | bought | shared | tasted | enjoyed | prepared | wanted | served |
    finished | refused | tried | brought
    """,
    food="""
    fresh bread | hot soup | chicken and rice | apple cake | cold pizza | fried eggs | roast
    potatoes | green salad | chocolate ice cream | pasta with cheese | grilled fish |
    strawberry jam | pancakes with honey | mashed carrots | tomato sauce | a ham sandwich | a
    cup of coffee | black tea | lemon biscuits | a bowl of cereal | cherry pie | peanut butter
    | garlic mushrooms | beef stew | boiled beans | orange juice | vanilla yogurt | a slice of
    melon | spicy noodles | warm milk | onion rings | buttered toast | a plate of sausages |
    blueberry muffins | steamed vegetables
    """,
    tasted="went | tasted | looked | smelled",
    moved="""
    left | put | found | dropped | hid | saw | lost | kept | placed | noticed | forgot | threw
    | carried | discovered | pushed | stored
    """,
    changed="""
    cleaned | repaired | sold | broke | painted | washed | borrowed | opened | closed |
    measured | packed | replaced | returned | emptied | wrapped | polished | covered |
    photographed
    """,
    thing="""
    the {object} | the {object} | the {quality} {object} | the {colour} {object} | my {object}
    | her {object} | his {object} | our {object} | a {quality} {object} | the {material}
    {object} | {number} {objects} | the {objects}
    """,
    object="""
    book | table | lamp | bicycle | key | bottle | camera | mirror | box | coat | ladder |
    clock | window | letter | guitar | blanket | basket | hammer | ticket | painting | radio |
    pillow | candle | wallet | suitcase | bucket | carpet | kettle | drawer | curtain |
    newspaper | telephone | piano | helmet | shovel | tent | vase | jacket | necklace | map
    """,
    objects="""
    books | chairs | glasses | shoes | plates | boxes | keys | flowers | letters | bottles |
    tools | pictures | tickets | candles | boots | stamps | coins | bags | toys | cups |
    pencils | socks | gloves | blankets | magazines | buttons | forks | records
    """,
    material="""
    wooden | metal | plastic | leather | glass | paper | cotton | silver | golden | rubber
    """,
    quality="""
    big | small | heavy | dirty | broken | new | little | large | round | strange | beautiful |
    cheap | dusty | famous | lovely | modern | narrow | quiet | rusty | shiny | soft | tall |
    tiny | useful | wet | plain | pretty | short | long | smooth | special | simple | spare |
    thick | thin
    """,
    temper="""
    young | friendly | clever | lazy | hungry | nervous | gentle | brave | funny | lonely |
    quiet | tall | curious | patient | polite | shy | strong | slim | noisy | sleepy | gloomy |
    cheerful | famous
    """,
    colour="""
    red | blue | green | yellow | white | black | brown | grey | purple | pink | dark | bright
    """,
    number="""
    two | three | four | five | six | seven | eight | nine | ten | twelve | twenty | thirty
    """,
    many="{number} | many | several | some | no | hardly any",
    animal="""
    dog | cat | horse | rabbit | bird | mouse | sheep | goat | duck | fox | lion | tiger |
    monkey | turtle | squirrel | pony | kitten | donkey | wolf | bear | pigeon | frog |
    hedgehog | parrot | snake
    """,
    animals="""
    dogs | cats | horses | rabbits | birds | mice | goats | ducks | foxes | lions | tigers |
    monkeys | turtles | squirrels | ponies | kittens | donkeys | wolves | bears | pigeons |
    frogs | parrots | cows | bees | spiders
    """,
    acted="""
    slept | played | waited | jumped | ran | hid | rested | barked | sat quietly | looked for
    food | walked slowly | turned around | drank some water | rolled over | made a loud noise |
    stood still
    """,
    where="""
    in the garden | on the table | under the bed | behind the house | near the river | by the
    window | next to the door | in the kitchen | on the roof | at the station | in front of the
    school | between the trees | in the corner | beside the road | along the beach | inside the
    garage | on the top shelf | at the bottom of the stairs | outside the church | across the
    street | above the fireplace | in the park | at the office | below the bridge | on the old
    farm | in the attic | against the wall | near the fountain | in the back of the car | at
    the edge of the forest
    """,
    nearby="""
    near the river | by the station | next to the school | beside the road | across the street
    | at the edge of the forest | behind the church | below the bridge | in the old town | on
    the hill
    """,
    went="""
    went to the {site} | walked to the {site} | drove to the {site} | came back from the {site}
    | ran to the {site} | got lost near the {site} | took a bus to the {site} | cycled past the
    {site} | stopped at the {site} | hurried to the {site} | visited the {site} | left the
    {site}
    """,
    site="""
    market | museum | library | hospital | theatre | bakery | airport | beach | castle |
    harbour | swimming pool | post office | restaurant | cinema | zoo | football stadium |
    mountain | village | lake | supermarket | bookshop | hotel | playground | lighthouse |
    university | chemist | gallery | island | valley | factory
    """,
    full="full | empty | closed | crowded | silent | noisy | busy | dark | flooded | deserted",
    felt="felt | seemed | looked | became | never felt | still looked",
    feeling="""
    happy | sad | tired | angry | proud | bored | excited | worried | sleepy | calm | cheerful
    | sick | surprised | confused | comfortable | grateful | jealous | ashamed | thirsty |
    relaxed
    """,
    happened="""
    missed the train | won the game | lost the match | slept badly | heard a strange sound |
    passed the test | found a purse | broke a leg | caught a cold | told a joke | arrived too
    late | forgot the answer | saw a ghost | moved to another city | learned to swim | stayed
    at home | changed the plan | wrote a poem | spoke to the police | needed help | lived
    abroad | worked all night | sang a song | laughed out loud | fell down the stairs | read
    the whole story | cut the grass | knew the truth
    """,
    waited="waited | looked | searched | asked | made a cake | left a note | bought flowers",
    modal="will | could | should | must | might | would like to | can",
    intended="""
    wanted to | had to | used to | decided to | hoped to | forgot to | promised to | tried to
    """,
    act="""
    leave | laugh | cry | shout | come home | call the police | run away | fall asleep | stop
    talking | arrive so late | sell the house | quit the job | go back
    """,
    task="""
    clean the {object} | sell the {object} | fix the {object} | buy a {quality} {object} |
    paint the {colour} {object} | feed the {animals} | walk the dog | make {food} | cook {food}
    | visit the {site} | meet {companion} | talk to {companion} | write to {companion} | help
    {companion} | go to the {site} | wash the {objects} | bring the {objects} | water the
    plants | learn {skill} | play {game} | watch {show} | wait {where} | sit {where} | turn off
    the lights | lock the door | set the table | take a break | get some rest | read the
    {colour} book | carry the {objects} | look {where}
    """,
    skill="""
    french | german | spanish | to dance | to swim | to drive | to cook | mathematics | history
    | to ride a horse | to play the piano | chemistry | to sew
    """,
    game="""
    football | chess | tennis | cards | basketball | golf | hockey | cricket | volleyball |
    dominoes
    """,
    show="""
    television | the news | a film | the sunset | the parade | the stars | a comedy | the race
    | the concert | the fireworks
    """,
    activity="""
    reading | swimming | dancing | playing {game} | cooking {food} | learning {skill} |
    watching {show} | walking {where} | painting | fishing | singing | riding a bicycle |
    camping | gardening | running | skating | climbing | feeding the {animals} | collecting
    {objects}
    """,
    likes="likes | loves | enjoys | hates | avoids | prefers | misses | practises",
    often="""
    every day | every morning | on weekends | in the summer | after work | before breakfast |
    at night | once a week | in winter | most evenings | all year
    """,
    weather="""
    cold | warm | sunny | cloudy | windy | foggy | very hot | rainy | stormy | freezing | quite
    mild | dry and bright | rather grey | icy | snowy
    """,
    past="""
    yesterday | last night | this morning | last week | on monday | on tuesday | on wednesday |
    on thursday | on friday | on saturday | on sunday | after lunch | before dinner | a month
    ago | two days ago | in the evening | an hour ago | last year | in the afternoon | at
    midnight | at noon | again | for the first time | {often}
    """,
    future="""
    tomorrow | tonight | next week | soon | later | on monday | on tuesday | on wednesday | on
    thursday | on friday | on saturday | on sunday | after lunch | before dinner | next month |
    in the morning | in the afternoon | this evening | at noon | next year | in an hour |
    before sunrise | right now
    """,
    assistant="""
    {please} call {person} {future} | {please} remind me to email {person} {future} | {please}
    send a message to {person} about {topic} | what is the phone number of {person} | {please}
    add {person} to my {list} | {please} tell {person} that i am {busy} | {please} book a table
    with {person} for {hour} {future} | did {person} reply to my message about {topic} |
    {please} schedule {meeting} with {person} {future} | {please} ask {person} about {topic} |
    when is my next {appointment} with {person} | {please} forward {paper} to {person} |
    {please} invite {person} to {event} {future} | {please} read the last message from {person}
    | is {person} free {future} | when is the birthday of {person} | {please} start a video
    call with {person} {future} | how far is it to {place} {from_here} | what is the weather in
    {place} {future} | {please} navigate to {place} {avoiding} | {please} book a hotel in
    {place} for {number} nights | {please} find a {shop} in {place} | when does the {next}
    train to {place} leave {future} | how long is the drive to {place} {future} | {please} find
    flights to {place} {future} | is there much traffic on the way to {place} {future} |
    {please} play the local radio from {place} {future} | what time is it in {place}
    {from_here} | {please} show me pictures of {place} | {please} buy {number} tickets to
    {place} {future} | {please} pay the {next} invoice from {company} | when does {company}
    open {future} | {please} order more {supply} from {company} | {please} cancel my
    {appointment} at {company} {future} | what is the address of {company} | {please} find
    reviews of {company} | {please} send {paper} to {company} {future} | how do i get to
    {company} {from_here} | {please} call the {desk} of {company} {future} | how much did we
    spend on {supply} from {company} | {please} track my order of {supply} from {company} |
    {please} show me the opening hours of {company} {future} | {please} call {person} at
    {company} {future} | {please} remind me to email {person} about the trip to {place} |
    {please} book {meeting} with {person} at {company} {future} | {please} drive me to
    {company} in {place} | {please} send {paper} to {person} at {company} | is there a branch
    of {company} near {place} | {please} tell {person} that i am in {place} {future} | is
    {company} in {place} open {future} | {please} share my location in {place} with {person} |
    who is {person} from {company} | {please} order a taxi from {place} to {company} {future} |
    {please} meet {person} in {place} {future} | did {person} from {company} call about {topic}
    """,
    please="| | | please | can you | could you | could you please | hey | i want you to",
    topic="""
    the {topic_word} | the new {topic_word} | the {topic_word} {future} | the cost of the
    {topic_word}
    """,
    topic_word="""
    budget | contract | holiday | party | meeting | invoice | delivery | project | schedule |
    wedding | report | interview | repair | insurance | concert | homework
    """,
    list="contacts | favourites | guest list | team | calendar | family group",
    busy="""
    running late | on my way | stuck in traffic | still at work | in a meeting | feeling better
    | not coming | almost there | waiting outside
    """,
    hour="""
    one | two | three | four | five | six | seven | eight | nine | half past six | half past
    seven | quarter to eight | quarter past five
    """,
    meeting="""
    a meeting | a call | lunch | an interview | a short visit | a review | coffee | a lesson
    """,
    appointment="appointment | meeting | lesson | delivery | reservation | visit | check up",
    paper="""
    the {topic_word} document | the {topic_word} photos | the last email | the {topic_word}
    notes | the signed form | a copy of the {topic_word} | the {topic_word} plan
    """,
    event="""
    the party | the dinner | the concert | the {topic_word} meeting | the barbecue | the picnic
    | the wedding | the video call | the game
    """,
    from_here="""
    | from here | by car | by train | on foot | from my hotel | from the airport | right now
    """,
    avoiding="| without motorways | on the fastest road | and avoid the traffic | after {hour}",
    shop="""
    bakery | chemist | car park | good restaurant | petrol station | cheap hotel | supermarket
    | quiet cafe | bookshop | bank | dentist | post office
    """,
    next="| next | first | last",
    supply="""
    paper | printer ink | flour | screws | light bulbs | coffee beans | envelopes | batteries |
    tiles | firewood | cables | bandages | towels | paint | bricks | soap
    """,
    desk="office | front desk | sales team | manager | help desk | head office | night service",
    person_name="{first} {family}",
    place_name="{town} | {town} | {town} | {side} {town}",
    side="north | south | east | west | upper | lower | old | new | little | great | port | lake",
    company_name="""
    {family} and {partner} | {family} and sons | {family} brothers | {family} {trade} |
    {family} {trade} | {family} {trade} | {family} and {partner} {trade}
    """,
    trade="""
    logistics | motors | dental | bakery | plumbing | travel | insurance | electronics |
    furniture | consulting | systems | flowers | books | pharmacy | builders | tools | sports |
    solutions | foods | energy | holdings | interiors | roofing | security
    """,
    stem="""
    alder | ash | beck | black | brad | bram | bran | bray | brin | brock | bux | cald | carl |
    chad | cran | crow | dal | darn | ding | elm | fal | farn | fern | glen | gold | grim | hal
    | harl | hart | hasl | hawk | hex | kel | kirk | lang | lind | mal | marl | mel | mil | nor
    | oak | pem | pen | rad | rav | red | rock | rus | sel | shel | stan | stock | stroud | sud
    | swin | tam | thorn | tiver | tren | wake | wal | war | wel | wind | wood | york
    """,
    ending="""
    ford | ton | bury | ham | wick | mouth | field | dale | worth | combe | by | stead | leigh
    | bridge | well | minster | thorpe | stoke | more | gate | haven | burn | cote | market
    """,
)

_TEMPLATES = tuple(
    (template, tuple(slot for slot in re.findall(r"\{(\w+)\}", template) if slot in KINDS))
    for template in GRAMMAR["assistant"]
)
