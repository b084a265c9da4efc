"""Experiments with a list of phrases for each utterance: said, not said, and by whom they are
spoken for their datastore.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TypeVar

from cluster.modes import Mode, NoRetrieval, PhraseBoosting, PhraseLists, PhrasePrompting
from jobs import stage
from jobs.reproduce.lab import ASSISTANT, OWN, Lab, Point, ways
from mmrag import artifact
from mmrag.artifact import Artifact
from mmrag.config import KNN, RetrievedAttention
from mmrag.corpora import manifest, synthetic
from mmrag.records import Utterance
from mmrag.retrieval import phrases
from mmrag.speech.tokenized import Tokenized

PHRASES_K = 16
"""Neighbours asked for among an utterance's phrases while their weight is chosen."""
MOST_SAID = 4
"""Entities of one utterance: so many names more than a list is long leave it full without them."""
PROMPTED = 100
"""Phrases that are still written before the speech: more make a prompt of minutes."""
UNSAID = "none of them said"
SPOKEN = ("knn", "cross_attention", "both")
"""Ways that ask for a datastore of the phrases."""
CASTS = {
    "espeak-ng": {"espeak": 1.0},
    "Kokoro": {"kokoro": 1.0},
    "both in turn": {"espeak": 1.0, "kokoro": 1.0},
}
"""Who speaks a datastore of text: title -> synthesizers and their shares."""

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Trusted:
    """How far the dev split says to trust a list; `both` is None where there is no adapter."""

    store: Artifact
    knn: KNN
    both: KNN | None
    boost: float

    def ways(self, lab: Lab, lists: PhraseLists) -> dict[str, Mode]:
        """Searching the phrases, reading them and both, by name."""
        how = {"knn": lab.phrases(self.store, self.knn, None, lists)}
        if lab.attention is not None:
            how["cross_attention"] = lab.phrases(self.store, None, lab.attention, lists)
            how["both"] = lab.phrases(self.store, self.both, lab.attention, lists)
        return how


def dynamic_context(lab: Lab) -> tuple[str, int, list[Point]]:
    """A list of phrases with each utterance, its entities among them.

    For retrieval the phrases are spoken by synthetic voices in a few carrier sentences and keyed
    by what the model hears; their own tokens alone are entries. kNN-LM searches among the list,
    cross-attention reads all of it. Boosting favours the phrases while decoding, all of them or
    (spotting) those that the encoder's CTC head hears; prompting writes them before the speech, to
    a model that was never trained with a list.
    """
    limit = lab.settings.utterances
    test = lab.spoken("test", ASSISTANT, limit)
    everyone = names(lab)
    points = [Point("none", NoRetrieval())]
    for count in lab.settings.phrases:
        own = lists(test, everyone, count, lab.experiment.seed)
        points += _listed(lab, own, count)
        if "prompt" in lab.settings.listed and lab.family == OWN and count <= PROMPTED:
            points.append(Point("prompt", PhrasePrompting(own), None, count, lists=own))
    return ASSISTANT, limit, points


def unsaid_phrases(lab: Lab) -> tuple[str, int, list[Point]]:
    """Lists none of whose phrases is said, trusted as much as those that hold what is said: what
    they cost is what the rows without a list do better."""
    limit = lab.settings.utterances
    test = lab.spoken("test", ASSISTANT, limit)
    everyone = names(lab)
    points = [Point("none", NoRetrieval())]
    for count in lab.settings.phrases:
        other = lists(test, everyone, count, lab.experiment.seed, own=False)
        points += _listed(lab, other, count, UNSAID)
    return ASSISTANT, limit, points


def _listed(lab: Lab, own: PhraseLists, count: int, setting: str | None = None) -> list[Point]:
    """Each utterance's list of `count` phrases, in every way that `reproduce.listed` names and the
    model has; how far it is trusted is looked for only where one of them asks for it."""
    wanted = lab.settings.listed
    about = {"phrases": count, "setting": setting, "lists": own}
    points = []
    if any(way in wanted for way in SPOKEN):
        spoken = trusted_lists(lab).ways(lab, own).items()
        points += [Point(way, how, "spoken", **about) for way, how in spoken if way in wanted]
    if "boost" in wanted:
        points.append(Point("boost", PhraseBoosting(trusted_lists(lab).boost, own), **about))
    if "spotting" in wanted:
        points += lab.spotting(own, count, setting)
    return points


def synthesizers(lab: Lab) -> tuple[str, int, list[Point]]:
    """Who speaks the text of a datastore, and the phrases of a list: espeak-ng, Kokoro in voices
    that training knows, or both in turn. A key is nearer where it was said as the asking voice says
    it. The lists hold the names that dev and test say, and as many as the shortest lists above."""
    limit, kokoro = lab.settings.sweep_utterances, lab.experiment.synthesize.kokoro
    if kokoro is None:
        stage.console.print("  synthesizers: left out, synthesize.kokoro names no neural voices")
        return ASSISTANT, 0, []
    test = lab.spoken("test", ASSISTANT, limit)
    said, count = names_in(lab, ("dev", "test")), min(lab.settings.phrases)
    own = lists(test, said, count, lab.experiment.seed)
    points = [Point("none", NoRetrieval())]
    for title, shares in CASTS.items():
        name = "-".join(shares)
        speaking = {"voices": shares, "kokoro": kokoro}
        store = lab.store(f"spoken-by-{name}", "spoken", **speaking)
        points += ways(store, "spoken", f"spoken by {title}")
        spoken = datastore(lab, said, f"phrases-by-{name}", **speaking)
        points += [
            Point(mode, how, "spoken", count, setting=f"phrases by {title}", lists=own)
            for mode, how in _trusted(lab, spoken, said, count).ways(lab, own).items()
        ]
    return ASSISTANT, limit, points


def names(lab: Lab) -> list[str]:
    """Every entity of the corpus that training did not know, and so many more that the longest list
    is full; sorted."""
    known = names_in(lab, ("dev", "test", "adapter"))
    more = max(lab.settings.phrases) + MOST_SAID - len(known)
    others = synthetic.other_names(more, lab.experiment.seed, known) if more > 0 else ()
    return sorted([*known, *others])


def names_in(lab: Lab, splits: Sequence[str]) -> list[str]:
    """The entities of splits of the corpus, sorted."""
    utterances = [
        one
        for split in splits
        for one in manifest.read(lab.corpus.path / f"{split}.jsonl")
        if isinstance(one, Utterance)
    ]
    return sorted({entity for one in utterances for entity in one.entities})


def datastore(
    lab: Lab, named: Sequence[str], name: str = "phrases", **speaking: object
) -> Artifact:
    """Phrases spoken in carrier sentences; each is a document of its own tokens. `speaking` says by
    whom, where it is not the experiment's own voices."""
    source = artifact.made_at(lab.experiment.workspace / f"{name}.jsonl")
    manifest.write(source, phrases.utterances(named, lab.settings.carriers))
    return lab.datastore(name, "spoken", source=str(source), entries="entities", **speaking)


def lists(
    spoken: Iterable[Tokenized],
    everyone: Sequence[str],
    count: int,
    seed: int,
    own: bool = True,
) -> dict[str, list[str]]:
    """For each utterance its entities (unless not `own`) and, up to `count`, other ones, in random
    order."""
    found = {}
    for one in spoken:
        draw = Random(f"{seed} {one.utterance.id}")
        said = list(dict.fromkeys(one.utterance.entities))
        others = draw.sample(everyone, min(len(everyone), count + len(said)))
        others = [name for name in others if name not in said]
        listed = [*(said if own else ()), *others][:count]
        draw.shuffle(listed)
        found[one.utterance.id] = listed
    return found


@cache
def trusted_lists(lab: Lab) -> Trusted:
    """How far to trust lists of all names, chosen once for the tasks that have such."""
    everyone = names(lab)
    middle = sorted(lab.settings.phrases)[len(lab.settings.phrases) // 2]
    return _trusted(lab, datastore(lab, everyone), everyone, middle)


def _trusted(lab: Lab, store: Artifact, named: Sequence[str], count: int) -> Trusted:
    """Chosen on dev, with lists of `count` phrases."""
    dev = lab.spoken("dev", ASSISTANT, lab.settings.utterances)
    dev = dev[: lab.experiment.tune.utterances]
    said, unsaid = (lists(dev, named, count, lab.experiment.seed, own) for own in (True, False))

    def best(settings: Sequence[Setting], mode: Callable[[Setting, PhraseLists], Mode]) -> Setting:
        return _least_wrong(lab, dev, settings, mode, said, unsaid)

    def searched(knn: KNN, own: PhraseLists) -> Mode:
        return lab.phrases(store, knn, None, own)

    def searched_and_read(knn: KNN, own: PhraseLists) -> Mode:
        return lab.phrases(store, knn, lab.attention, own)

    both = None
    if lab.attention is not None:
        both = best(_grid(lab, lab.attention), searched_and_read)
    knn = best(_grid(lab, None), searched)
    return Trusted(store, knn, both, best(lab.settings.boost, PhraseBoosting))


def _grid(lab: Lab, read: RetrievedAttention | None) -> list[KNN]:
    """The settings of kNN-LM that are tried among phrases; beside reading them, with `read`."""
    one, grid = lab.spoken_text.distance_scale, lab.experiment.tune
    weights = grid.weight if read is None else grid.both_weight or grid.weight
    return [
        KNN(
            k=PHRASES_K,
            weight=weight,
            temperature=one * temperature,
            gate=None if gate is None else one * gate,
            certain=certain,
        )
        for weight, temperature, gate, certain in itertools.product(
            weights, grid.temperature, grid.gate, grid.certain
        )
    ]


def _least_wrong(
    lab: Lab,
    dev: Sequence[Tokenized],
    settings: Sequence[Setting],
    mode: Callable[[Setting, PhraseLists], Mode],
    said: PhraseLists,
    unsaid: PhraseLists,
) -> Setting:
    """The setting of least dev WER with lists of what is said. With `reproduce.harm`, among those
    that lists without a word of it harm no more than that; or if all do, the least harmful."""
    how = {f"said {number}": mode(one, said) for number, one in enumerate(settings)}
    allowed = lab.settings.harm
    if allowed is not None:
        how |= {f"unsaid {number}": mode(one, unsaid) for number, one in enumerate(settings)}
        how["plain"] = NoRetrieval()
    rates = {name: lab.error_rate(heard) for name, heard in lab.transcribe(how, dev).items()}
    return settings[_choice(rates, len(settings), allowed)]


def _choice(rates: Mapping[str, float], count: int, allowed: float | None) -> int:
    """Which of `count` settings is chosen, by the rates `said N`, `unsaid N` and `plain`."""
    every = range(count)
    if allowed is None:
        return min(every, key=lambda number: rates[f"said {number}"])
    most = (1 + allowed) * rates["plain"]
    harmless = [number for number in every if rates[f"unsaid {number}"] <= most]
    if not harmless:
        return min(every, key=lambda number: rates[f"unsaid {number}"])
    return min(harmless, key=lambda number: rates[f"said {number}"])
