"""The paper's experiments: each says which utterances to transcribe, and in which modes.

Every task works on voices and entities that training never met; whatever is chosen (weights,
temperatures, gates) is chosen on the dev split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cluster.modes import DocumentKNN, NoRetrieval, SubsetKNN
from cluster.parts import parts, work_off
from cluster.stages import Embed
from jobs import stage
from jobs.reproduce import listed, other_speech
from jobs.reproduce.lab import ASSISTANT, EVERYDAY, OWN, Lab, Point, knn_point, ways
from mmrag.corpora import manifest
from mmrag.records import Utterance
from mmrag.speech.tokenized import Tokenized

LEAST_TOKENS = 12
"""Of an utterance, on average: what a large datastore reads follows from the entries asked for."""

Task = Callable[[Lab], tuple[str, int, list[Point]]]
"""A lab -> the domain of the test split, how many of its utterances, and the points to measure."""


def everyday(lab: Lab) -> tuple[str, int, list[Point]]:
    """Sentences of common words: is the recogniser any good by itself?"""
    return EVERYDAY, lab.settings.utterances, [Point("none", NoRetrieval())]


def domain(lab: Lab) -> tuple[str, int, list[Point]]:
    """Requests about people, places and companies whose names training never met.

    The datastore has other sentences about them, in other voices: as text, with its recordings,
    or spoken from the text by synthetic voices. The encoder's CTC head spots what these sentences
    have of unusual words; or all that is given are the names, as one list for all utterances.
    """
    points = [Point("none", NoRetrieval()), knn_point(lab.text, "text")]
    for name, store in {"multimodal": lab.multimodal, "spoken": lab.spoken_text}.items():
        points += ways(store, name)
        points += lab.terms(store.artifact, name)
    limit, listed_names = lab.settings.utterances, listed.names_in(lab, ("datastore",))
    everyone = {one.utterance.id: listed_names for one in lab.spoken("test", ASSISTANT, limit)}
    points += lab.spotting(everyone, len(listed_names))
    return ASSISTANT, limit, points


def paired_share(lab: Lab) -> tuple[str, int, list[Point]]:
    """The same datastore where only some of its utterances have audio; the others are keyed over
    text alone."""
    points = []
    for share in lab.settings.shares:
        store = lab.multimodal if share == 1 else lab.paired(share)
        setting = f"{share:.0%} of the utterances with audio"
        points.append(knn_point(store, "multimodal", setting=setting))
    return ASSISTANT, lab.settings.sweep_utterances, points


def wrong_datastore(lab: Lab) -> tuple[str, int, list[Point]]:
    """Another domain's datastore, trusted as much as the right one; and a list of phrases none of
    which is said.

    The settings are those tuned for the right datastore on the dev split, where this one was the
    decoy that they had to leave alone.
    """
    limit, right = lab.settings.utterances, lab.multimodal
    points = [Point("none", NoRetrieval()), *ways(replace(right, artifact=lab.decoy), "wrong")]
    points += lab.terms(lab.decoy, "wrong")
    test, everyone = lab.spoken("test", ASSISTANT, limit), listed.names(lab)
    middle = sorted(lab.settings.phrases)[len(lab.settings.phrases) // 2]
    lists = listed.lists(test, everyone, middle, lab.experiment.seed, own=False)
    if lab.attention is not None:
        read = lab.phrases(listed.datastore(lab, everyone), None, lab.attention, lists)
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
        listed.dynamic_context,
        listed.unsaid_phrases,
        wrong_datastore,
        size,
        window,
        key_encoder,
        *other_speech.TASKS,
        listed.synthesizers,
    )
}


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
