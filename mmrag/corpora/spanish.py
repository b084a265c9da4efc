"""Requests in Spanish about people and places, for a recogniser that has heard English alone.

What retrieval can do where the models know neither the language's sounds nor its words. Names are
those of `synthetic`; the words are spelt without accents, in letters that an English model can
write. Knows nothing about files or processes.
"""

from __future__ import annotations

from random import Random

from mmrag.corpora.grammar import expand, rules
from mmrag.corpora.synthetic import Names, Planned, make_names, new
from mmrag.corpora.voices.espeak import Voice, varied

VOICES = {
    "datastore": (
        Voice("es-train-1", "es", pitch=50, rate=165),
        Voice("es-train-2", "es+m1", pitch=45, rate=170),
        Voice("es-train-3", "es+f1", pitch=50, rate=160),
        Voice("es-train-4", "es+m7", pitch=55, rate=165),
        Voice("es-train-5", "es-419+f3", pitch=45, rate=165),
        Voice("es-train-6", "es-419+m5", pitch=60, rate=170),
    ),
    "dev": (Voice("es-dev", "es+m6", pitch=55, rate=168),),
    "test": (
        Voice("es-test-male", "es+m3", pitch=42, rate=165),
        Voice("es-test-female", "es-419+f4", pitch=50, rate=168),
    ),
}
"""Who speaks which split; no variant (the part after the plus) is in two of them."""

DOMAIN = "assistant"
SENTENCES_PER_NAME = 2
GRAMMAR = rules(
    request="""
    {please} llama a {person} {when} | manda un mensaje a {person} sobre {topic} | dile a {person}
    que {news} | {please} lee el mensaje de {person} | invita a {person} a {topic} {when} |
    {please} pregunta a {person} por {topic} | abre la agenda de {person} {when} | {please} manda
    {topic} a {person} | reserva una mesa con {person} para {when} | busca un hotel en {place} para
    {when} | compra {number} billetes a {place} para {when} | {please} pon la radio de {place} |
    muestra fotos de {place} | {please} busca el tiempo en {place} {when} | reserva un coche en
    {place} para {when} | busca un buen restaurante en {place}
    """,
    please="| por favor | oye | ahora",
    when="""
    esta tarde | esta noche | el lunes | el martes | el jueves | el viernes | el domingo | ahora
    mismo | la semana que viene | el mes que viene | antes de las cinco | a las siete
    """,
    topic="""
    el contrato | la fiesta | el informe | la boda | la factura | el concierto | la cena | el viaje
    | las cuentas | el proyecto
    """,
    news="llego tarde | no puedo ir | estoy en casa | todo va bien | salgo ahora | ya he pagado",
    number="dos | tres | cuatro | cinco | siete | ocho | diez",
)


Slot = tuple[str, str]
"""A kind of name, `person` or `place`, and the name."""
Said = tuple[Slot, str]
"""A name and a sentence about it."""


def plan(dev: int, test: int, mentions: int, seed: int) -> dict[str, list[Planned]]:
    """`dev` and `test` sentences, and in `datastore` `mentions` others about each of their names.

    No sentence stands twice, and each split has voices of its own. Raises ImportError without the
    `speech` extra.
    """
    names = make_names(seed)
    taken: set[str] = set()
    made: dict[str, list[Said]] = {"datastore": [], "dev": [], "test": []}
    for split, size in (("dev", dev), ("test", test)):
        draw = Random(f"{seed} spanish {split}")
        known = [_name(split, names, draw) for _ in range(max(1, size // SENTENCES_PER_NAME))]
        made[split] = [_sentence(split, draw.choice(known), taken, draw) for _ in range(size)]
        mentioned = sorted({slot for slot, _ in made[split]})
        made["datastore"] += [
            _sentence("datastore", slot, taken, draw) for slot in mentioned for _ in range(mentions)
        ]
    return {split: _cast(split, sentences, seed) for split, sentences in made.items()}


def _name(split: str, names: Names, draw: Random) -> Slot:
    if draw.random() < 0.6:
        return "person", f"{draw.choice(names.first)} {draw.choice(names.family[split])}"
    return "place", draw.choice(names.towns[split])


def _sentence(split: str, slot: Slot, taken: set[str], draw: Random) -> Said:
    """A new sentence about a name."""
    kind, name = slot
    fitting = [request for request in GRAMMAR["request"] if f"{{{kind}}}" in request]

    def make() -> str:
        return expand(draw.choice(fitting), {**GRAMMAR, kind: (name,)}, draw)

    return slot, new(split, "sentences", taken, make, str)


def _cast(split: str, sentences: list[Said], seed: int) -> list[Planned]:
    draw = Random(f"{seed} spanish {split} voices")
    planned = []
    for number, ((_, name), text) in enumerate(sentences):
        id = f"spanish-{split}-{number:06d}"
        voice = draw.choice(VOICES[split])
        voice = varied(voice, draw) if split == "datastore" else voice
        planned.append(Planned(id, text, DOMAIN, (name,), voice, id, draw.getrandbits(32)))
    return planned
