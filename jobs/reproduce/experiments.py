"""The paper's experiments: each says which utterances to transcribe, and in which modes.

Every task works on voices and entities that training never met; whatever is chosen (weights,
temperatures, gates) is chosen on the dev split.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from random import Random

import numpy as np

from cluster import modes
from cluster.modes import DocumentKNN, NoRetrieval, SubsetKNN
from cluster.parts import parts, work_off
from cluster.stages import Embed
from jobs import stage
from jobs.reproduce import other_speech
from jobs.reproduce.lab import ASSISTANT, EVERYDAY, OWN, Lab, Point, choose_boost, knn_point, ways
from mmrag import artifact
from mmrag.artifact import Artifact
from mmrag.config import KNN, RetrievedAttention
from mmrag.corpora import manifest
from mmrag.records import Utterance
from mmrag.retrieval import phrases
from mmrag.speech.tokenized import Tokenized

LEAST_TOKENS = 12
"""Of an utterance, on average: what a large datastore reads follows from the entries asked for."""
PHRASES_K = 16
"""Neighbours asked for among an utterance's phrases while their weight is chosen."""

Task = Callable[[Lab], tuple[str, int, list[Point]]]
"""A lab -> the domain of the test split, how many of its utterances, and the points to measure."""


def everyday(lab: Lab) -> tuple[str, int, list[Point]]:
    """Sentences of common words: is the recogniser any good by itself?"""
    return EVERYDAY, lab.settings.utterances, [Point("none", NoRetrieval())]


def domain(lab: Lab) -> tuple[str, int, list[Point]]:
    """Requests about people, places and companies whose names training never met.

    The datastore has other sentences about them, in other voices: as text, with its recordings,
    or spoken from the text by synthetic voices.
    """
    points = [Point("none", NoRetrieval()), knn_point(lab.text, "text")]
    for name, store in {"multimodal": lab.multimodal, "spoken": lab.spoken_text}.items():
        points += ways(store, name)
    return ASSISTANT, lab.settings.utterances, points


def paired_share(lab: Lab) -> tuple[str, int, list[Point]]:
    """The same datastore where only some of its utterances have audio; the others are keyed over
    text alone."""
    points = []
    for share in lab.settings.shares:
        store = lab.multimodal if share == 1 else lab.paired(share)
        setting = f"{share:.0%} of the utterances with audio"
        points.append(knn_point(store, "multimodal", setting=setting))
    return ASSISTANT, lab.settings.sweep_utterances, points


def dynamic_context(lab: Lab) -> tuple[str, int, list[Point]]:
    """A list of phrases with each utterance, its entities among them.

    For retrieval the phrases are spoken by synthetic voices in a few carrier sentences and keyed
    by what the model hears; their own tokens alone are entries. kNN-LM searches among the list,
    cross-attention reads all of it. Boosting favours the phrases while decoding; prompting writes
    them before the speech, to a model that was never trained with a list.
    """
    limit = lab.settings.utterances
    test = lab.spoken("test", ASSISTANT, limit)
    dev = lab.spoken("dev", ASSISTANT, limit)[: lab.experiment.tune.utterances]
    everyone = _entities(lab)
    store = _phrase_datastore(lab, everyone)
    middle = sorted(lab.settings.phrases)[len(lab.settings.phrases) // 2]
    lists = _lists(dev, everyone, middle, lab.experiment.seed)
    knn = _choose_knn(lab, store, dev, lists, None)
    read = lab.attention
    both = None if read is None else _choose_knn(lab, store, dev, lists, read)
    weight = choose_boost(lab, dev, lists)
    points = [Point("none", NoRetrieval())]
    for count in lab.settings.phrases:
        lists = _lists(test, everyone, count, lab.experiment.seed)
        ways = {"knn": (knn, None)}
        if read is not None:
            ways |= {"cross_attention": (None, read), "both": (both, read)}
        points += [
            Point(name, lab.phrases(store, *how, lists), "spoken", count, lists=lists)
            for name, how in ways.items()
        ]
        boosted = modes.PhraseBoosting(weight, lists)
        points.append(Point("boost", boosted, None, count, lists=lists))
        if lab.family == OWN:
            prompted = modes.PhrasePrompting(lists)
            points.append(Point("prompt", prompted, None, count, lists=lists))
    return ASSISTANT, limit, points


def wrong_datastore(lab: Lab) -> tuple[str, int, list[Point]]:
    """Another domain's datastore, trusted as much as the right one; and a list of phrases none of
    which is said.

    The settings are those tuned for the right datastore on the dev split, where this one was the
    decoy that they had to leave alone.
    """
    limit, right = lab.settings.utterances, lab.multimodal
    points = [Point("none", NoRetrieval()), *ways(replace(right, artifact=lab.decoy), "wrong")]
    test, everyone = lab.spoken("test", ASSISTANT, limit), _entities(lab)
    middle = sorted(lab.settings.phrases)[len(lab.settings.phrases) // 2]
    lists = _lists(test, everyone, middle, lab.experiment.seed, own=False)
    if lab.attention is not None:
        read = lab.phrases(_phrase_datastore(lab, everyone), None, lab.attention, lists)
        about = {"setting": "none of them said", "lists": lists}
        points.append(Point("cross_attention", read, "spoken", middle, **about))
    return ASSISTANT, limit, points


def size(lab: Lab) -> tuple[str, int, list[Point]]:
    """More and more entries: first the domain's own, then distractors."""
    knn = lab.multimodal.knn
    enough = max(lab.settings.sizes) // LEAST_TOKENS + 1
    store = lab.datastore("large", "paired", splits=("datastore", "lm"), utterances=enough)
    points = []
    for entries in lab.settings.sizes:
        if entries <= store.summary["entries"]:
            some = SubsetKNN(store.path, knn, entries)
            points.append(Point("knn", some, "multimodal", entries=entries))
        else:
            stage.console.print(f"  size {entries}: the corpus has {store.summary['entries']}")
    return ASSISTANT, lab.settings.sweep_utterances, points


def window(lab: Lab) -> tuple[str, int, list[Point]]:
    """Of each utterance every n-th token as an entry: neighbouring windows overlap less."""
    store, knn = lab.multimodal.artifact, lab.multimodal.knn
    total = store.summary["entries"]
    width = lab.experiment.datastore.window
    points = []
    for stride in lab.settings.strides:
        some = SubsetKNN(store.path, knn, total, stride)
        setting = f"windows of {width} tokens, overlap {max(0, width - stride)}"
        points.append(Point("knn", some, "multimodal", entries=total // stride, setting=setting))
    return ASSISTANT, lab.settings.sweep_utterances, points


def key_encoder(lab: Lab) -> tuple[str, int, list[Point]]:
    """Two levels: documents by one vector each, then their entries by the model's own state.

    The first level's vectors are means over the clip, of the language model's states or of HuBERT
    features, which know no text.
    """
    store, knn = lab.multimodal.artifact, lab.multimodal.knn
    limit = lab.settings.sweep_utterances
    test = lab.spoken("test", ASSISTANT, limit)
    points = [knn_point(lab.multimodal, "multimodal", setting="entries alone")]
    if lab.family != OWN:
        return ASSISTANT, limit, points  # documents are found by our own models' vectors
    for encoder, title in (("lm", "the language model's states"), ("hubert", "HuBERT features")):
        ranked = _ranked_documents(lab, test, encoder)
        for count in lab.settings.documents:
            named = {utterance: names[:count] for utterance, names in ranked.items()}
            setting = f"{count} documents by {title}"
            how = DocumentKNN(store.path, knn, named)
            points.append(Point("knn", how, "multimodal", setting=setting))
    return ASSISTANT, limit, points


TASKS: dict[str, Task] = {
    each.__name__: each
    for each in (
        everyday,
        domain,
        paired_share,
        dynamic_context,
        wrong_datastore,
        size,
        window,
        key_encoder,
        *other_speech.TASKS,
    )
}


def _entities(lab: Lab) -> list[str]:
    """Every entity of the corpus that training did not know, sorted."""
    utterances = [
        one
        for split in ("dev", "test", "adapter")
        for one in manifest.read(lab.corpus.path / f"{split}.jsonl")
        if isinstance(one, Utterance)
    ]
    return sorted({entity for one in utterances for entity in one.entities})


def _phrase_datastore(lab: Lab, names: Sequence[str]) -> Artifact:
    """Phrases spoken in carrier sentences; each is a document of its own tokens."""
    source = artifact.made_at(lab.experiment.workspace / "phrases.jsonl")
    manifest.write(source, phrases.utterances(names, lab.settings.carriers))
    return lab.datastore("phrases", "spoken", source=str(source), entries="entities")


def _lists(
    spoken: Iterable[Tokenized],
    everyone: Sequence[str],
    count: int,
    seed: int,
    own: bool = True,
) -> dict[str, list[str]]:
    """For each utterance its entities (unless not `own`) and, up to `count`, other ones, in random
    order."""
    lists = {}
    for one in spoken:
        draw = Random(f"{seed} {one.utterance.id}")
        said = list(dict.fromkeys(one.utterance.entities))
        others = draw.sample(everyone, min(len(everyone), count + len(said)))
        others = [name for name in others if name not in said]
        listed = [*(said if own else ()), *others][:count]
        draw.shuffle(listed)
        lists[one.utterance.id] = listed
    return lists


def _choose_knn(
    lab: Lab,
    store: Artifact,
    dev: Sequence[Tokenized],
    lists: modes.PhraseLists,
    read: RetrievedAttention | None,
) -> KNN:
    """The grid's setting of least dev WER among the phrases; beside reading them, with `read`."""
    one, grid = lab.spoken_text.distance_scale, lab.experiment.tune
    weights = grid.weight if read is None else grid.both_weight or grid.weight
    settings = [
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
    how = {str(number): lab.phrases(store, knn, read, lists) for number, knn in enumerate(settings)}
    heard = lab.transcribe(how, dev)
    return settings[min(range(len(settings)), key=lambda n: lab.error_rate(heard[str(n)]))]


def _ranked_documents(lab: Lab, test: Sequence[Tokenized], encoder: str) -> dict[str, list[str]]:
    """For each test utterance the datastore split's documents, likest first."""
    stored = lab.spoken("datastore", ASSISTANT, 10**9)
    audio = {
        one.id: one
        for split in ("datastore", "test")
        for one in manifest.read(lab.corpus.path / f"{split}.jsonl")
        if isinstance(one, Utterance)
    }
    work = [(audio[one.utterance.id], one.units) for one in (*stored, *test)]
    shares = parts(work, lambda _: 1, 200)
    embed = (Embed, {"models": lab.experiment.workspace, "encoder": encoder})
    vectors: dict[str, np.ndarray] = {}
    workers, key = lab.experiment.evaluate.workers, "evaluate.workers"
    for answer in work_off([embed], shares, workers, "embedding", key):
        vectors |= answer

    def rows(spoken: Sequence[Tokenized]) -> np.ndarray:
        found = np.stack([vectors[one.utterance.id] for one in spoken])
        centred = found - np.mean([*vectors.values()], axis=0)
        return centred / np.linalg.norm(centred, axis=1, keepdims=True)

    names = [one.utterance.document for one in stored]
    likeness = rows(test) @ rows(stored).T
    nearest = np.argsort(-likeness, axis=1)[:, : max(lab.settings.documents)]
    return {
        one.utterance.id: [names[document] for document in row]
        for one, row in zip(test, nearest.tolist(), strict=True)
    }
