"""The paper's experiments with one model: tables, plots and the same figures as JSON.

Every task works on voices and entities that training never met; whatever is chosen (weights,
temperatures, gates) is chosen on the dev split. A finished task is not done again.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from cluster import modes
from cluster.modes import Mode, Plain, RetrievingDocuments, RetrievingSome
from cluster.stages import (
    Embed,
    Heard,
    RenderSpeech,
    Rerecord,
    parts,
    transcribe_modes,
    work_off,
)
from cluster.tracking import Run
from jobs import build_datastore, report, stage, synthesize, tokenize, tune
from mmrag import artifact, audio, phrases
from mmrag.artifact import Artifact, Draft, write_json
from mmrag.config import KNN, ConfigError, Experiment, Read, as_dict
from mmrag.corpora import flite, manifest, spanish
from mmrag.corpora.augment import unspoken
from mmrag.reading import Reading
from mmrag.records import Utterance
from mmrag.score import align, entity_recall, word_error_rate
from mmrag.tokens import Tokenized
from mmrag.transcribe import Recogniser, loops, transcribe
from mmrag.tune import BOTH, chosen, chosen_read, unit

ROWS, TRANSCRIPTS = "rows.json", "transcripts.jsonl"
EVERYDAY, ASSISTANT = "everyday", "assistant"
SPANISH = "spanish"
PART_UTTERANCES = 32
CLIPS = 100
"""Recordings in which nobody speaks."""
ROW = (
    *("task", "mode", "datastore", "phrases", "entries", "setting", "utterances", "wer"),
    *("wer_low", "wer_high", "entity_recall", "recall_at_k", "seconds_of_audio", "decode_seconds"),
    *("keys_mb", "empty", "inserted", "copied", "looped"),
)
"""Keys of a line of `results.json`."""
DECOY_UTTERANCES = 1600
LEAST_TOKENS = 12
"""Of an utterance, on average: what a large datastore reads follows from the entries asked for."""
PHRASES_K = 16
"""Neighbours asked for among an utterance's phrases while their weight is chosen."""


@dataclass(frozen=True)
class Point:
    """One row of the results, before it is measured: how to transcribe what."""

    mode: str
    how: Mode
    datastore: str | None = None
    phrases: int | None = None
    entries: int | None = None
    setting: str | None = None
    """What a sweep varies, in words."""
    tokens: str | None = None
    """The recordings, where they are not the test split's own."""

    @property
    def name(self) -> str:
        """Unique within a task."""
        told = (self.mode, self.datastore, self.phrases, self.entries, self.setting)
        return " ".join(str(each) for each in told if each is not None)


@dataclass(frozen=True)
class Store:
    """A datastore and how far the dev split says to trust it, by votes, by attention, and by votes
    beside attention; the latter two are None where there is nothing heard to attend to."""

    artifact: Artifact
    knn: KNN
    read: Read | None
    both: KNN | None
    unit: float
    """The distance of which gates and temperatures were tried in multiples."""


class Lab:
    """One model, its corpus, and the datastores that tasks share."""

    def __init__(self, experiment: Experiment, force: bool) -> None:
        if experiment.reproduce is None:
            raise ConfigError("the experiment has no section `reproduce`")
        self.experiment = experiment
        self.settings = experiment.reproduce
        self.force = force
        self.corpus = synthesize.run(experiment, force)
        self.tokens = tokenize.run(experiment, force)
        self.lm = stage.load(experiment, "lm", "lm", "train")
        self.adapter = stage.load(experiment, "adapter", "adapter", "train")
        self.adapter.require("lm", self.lm)
        about = {"splits": ("lm",), "domain": EVERYDAY, "utterances": DECOY_UTTERANCES}
        name = experiment.tune.decoy or "wrong"
        self.decoy = self.datastore(name, "paired", **about)
        """Everyday sentences, which say nothing about anybody's name; tuning opens them too."""

    def spoken(self, split: str, domain: str, limit: int, made: Artifact | None = None) -> list:
        """The first utterances of a split's domain."""
        return tune.select(made or self.tokens, split, domain)[:limit]

    def datastore(self, name: str, audio: str, **changes: Any) -> Artifact:
        """A datastore of the workspace, built if need be."""
        return build_datastore.run(self.about(name, audio, **changes), self.force)

    def store(self, name: str, audio: str, **changes: Any) -> Store:
        """A datastore and its settings, chosen on the dev split."""
        about = self.about(name, audio, **changes)
        made = build_datastore.run(about, self.force)
        return _store(made, tune.run(about, self.force).path)

    def transcribe(self, how: Mapping[str, Mode], spoken: Sequence[Tokenized]) -> dict:
        """Every utterance in every mode."""
        experiment = self.experiment
        workers = experiment.evaluate.workers
        return transcribe_modes(experiment.workspace, experiment.decode, how, spoken, workers)

    def error_rate(self, heard: Sequence[Heard]) -> float:
        """WER alone, to choose by."""
        references, texts = [one.reference for one in heard], [one.text for one in heard]
        return word_error_rate(references, texts, resamples=1).rate

    @cached_property
    def multimodal(self) -> Store:
        return self.store("multimodal", "paired")

    @cached_property
    def text(self) -> Store:
        return self.store("text", "none")

    @cached_property
    def spoken_text(self) -> Store:
        return self.store("spoken", "spoken")

    def paired(self, share: float) -> Store:
        """The multi-modal datastore with the audio of some of its utterances alone."""
        return self.store(f"paired-{round(100 * share)}", "paired", paired_share=share)

    def about(self, name: str, audio: str, **changes: Any) -> Experiment:
        """The experiment of one datastore."""
        changes = {"name": name, "audio": audio, **changes}
        datastore = self.experiment.datastore.model_copy(update=changes)
        return self.experiment.model_copy(update={"datastore": datastore})


Task = Callable[[Lab], tuple[str, int, list[Point]]]
"""A lab -> the domain of the test split, how many of its utterances, and the points to measure."""


def everyday(lab: Lab) -> tuple[str, int, list[Point]]:
    """Sentences of common words: is the recogniser any good by itself?"""
    return EVERYDAY, lab.settings.utterances, [Point("none", Plain())]


def domain(lab: Lab) -> tuple[str, int, list[Point]]:
    """Requests about people, places and companies whose names training never met.

    The datastore has other sentences about them, in other voices: as text, with its recordings,
    or spoken from the text by synthetic voices.
    """
    points = [Point("none", Plain()), _knn(lab.text, "text")]
    for name, store in {"multimodal": lab.multimodal, "spoken": lab.spoken_text}.items():
        points += _ways(store, name)
    return ASSISTANT, lab.settings.utterances, points


def paired_share(lab: Lab) -> tuple[str, int, list[Point]]:
    """The same datastore where only some of its utterances have audio; the others are keyed over
    text alone."""
    points = []
    for share in lab.settings.shares:
        store = lab.multimodal if share == 1 else lab.paired(share)
        setting = f"{share:.0%} of the utterances with audio"
        points.append(_knn(store, "multimodal", setting=setting))
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
    both = _choose_knn(lab, store, dev, lists, lab.experiment.read)
    weight = _choose_boost(lab, dev, lists)
    points = [Point("none", Plain())]
    for count in lab.settings.phrases:
        lists = _lists(test, everyone, count, lab.experiment.seed)
        read = _reading(lab, store, lists)
        together = modes.Together((RetrievingDocuments(store.path, both, lists), read))
        points += [
            Point("knn", RetrievingDocuments(store.path, knn, lists), "spoken", count),
            Point("cross_attention", read, "spoken", count),
            Point("both", together, "spoken", count),
            Point("boost", modes.BoostingPhrases(weight, lists), None, count),
            Point("prompt", modes.PromptingPhrases(lists), None, count),
        ]
    return ASSISTANT, limit, points


def wrong_datastore(lab: Lab) -> tuple[str, int, list[Point]]:
    """Another domain's datastore, trusted as much as the right one; and a list of phrases none of
    which is said.

    The settings are those tuned for the right datastore on the dev split, where this one was the
    decoy that they had to leave alone.
    """
    limit, right = lab.settings.utterances, lab.multimodal
    points = [Point("none", Plain()), *_ways(replace(right, artifact=lab.decoy), "wrong")]
    test, everyone = lab.spoken("test", ASSISTANT, limit), _entities(lab)
    middle = sorted(lab.settings.phrases)[len(lab.settings.phrases) // 2]
    lists = _lists(test, everyone, middle, lab.experiment.seed, own=False)
    read = _reading(lab, _phrase_datastore(lab, everyone), lists)
    points.append(Point("cross_attention", read, "spoken", middle, setting="none of them said"))
    return ASSISTANT, limit, points


def size(lab: Lab) -> tuple[str, int, list[Point]]:
    """More and more entries: first the domain's own, then distractors."""
    knn = lab.multimodal.knn
    enough = max(lab.settings.sizes) // LEAST_TOKENS + 1
    store = lab.datastore("large", "paired", splits=("datastore", "lm"), utterances=enough)
    points = []
    for entries in lab.settings.sizes:
        if entries <= store.summary["entries"]:
            some = RetrievingSome(store.path, knn, entries)
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
        some = RetrievingSome(store.path, knn, total, stride)
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
    points = [_knn(lab.multimodal, "multimodal", setting="entries alone")]
    for encoder, title in (("lm", "the language model's states"), ("hubert", "HuBERT features")):
        ranked = _ranked_documents(lab, test, encoder)
        for count in lab.settings.documents:
            named = {utterance: names[:count] for utterance, names in ranked.items()}
            setting = f"{count} documents by {title}"
            how = RetrievingDocuments(store.path, knn, named)
            points.append(Point("knn", how, "multimodal", setting=setting))
    return ASSISTANT, limit, points


def robustness(lab: Lab) -> tuple[str, int, list[Point]]:
    """Noise, a telephone, another synthesizer, and Spanish with a datastore in Spanish.

    The guard of `decode.agreement` throws away what retrieval brings about in Spanish: to a model
    that has heard English alone it is absurd. Where a datastore speaks another language than the
    model, the guard has to be off.
    """
    points = []
    for condition in lab.settings.conditions:
        if condition.startswith("flite") and not flite.installed():
            stage.console.print(f"  {condition}: left out, flite is not installed")
            continue
        if condition == SPANISH:
            made, store = _spanish(lab)
        else:
            made, store = _rerecorded(lab, condition), lab.multimodal
        at = {"setting": condition, "tokens": made.path.name}
        ways = [Point("none", Plain()), *_ways(store, "multimodal")[:2]]
        points += [replace(point, **at) for point in ways]
    return ASSISTANT, lab.settings.sweep_utterances, points


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
        robustness,
    )
}


def run(experiment: Experiment, force: bool = False) -> None:
    """Do every task, then write `results.md`, `results.json` and the plots."""
    lab = Lab(experiment, force)
    done = []
    for number, (name, task) in enumerate(TASKS.items(), start=1):
        stage.console.print(f"\n[bold]{number}/{len(TASKS)}  {name}[/bold]: {_title(task)}")
        done.append(_measure(lab, name, task))
    rows: list[dict[str, Any]] = []
    heard = {}
    for made in done:
        lines = [json.loads(line) for line in (made.path / TRANSCRIPTS).open()]
        points = dict.fromkeys(line["point"] for line in lines)
        for row, point in zip(json.loads((made.path / ROWS).read_text()), points, strict=True):
            rows.append(row | _told([line for line in lines if line["point"] == point]))
        heard |= {
            (line["task"], line["point"], line["utterance"]): (line["reference"], line["text"])
            for line in lines
        }
    stage.console.print(f"\n[bold]{len(TASKS) + 1}[/bold]  no_speech: {_title(no_speech)}")
    rows += json.loads((no_speech(lab).path / ROWS).read_text())
    about = {**TASKS, "no_speech": no_speech}
    notes = {name: " ".join(task.__doc__.split()) for name, task in about.items()}
    report.write(experiment, rows, heard, notes)
    report.show(rows)
    stage.console.print(
        f"\nwritten to {experiment.reproduce.docs}: results.md, results.json, plots"
    )


def no_speech(lab: Lab) -> Artifact:
    """Silence, white noise and tones: there is nothing to transcribe.

    From end to end, as `mmrag transcribe` does it, with the detector that keeps such audio from the
    model and without.
    """
    store, settings = lab.multimodal, lab.experiment.decode
    config = {"clips": CLIPS, "decode": as_dict(settings), "read": as_dict(store.read)}

    def work(draft: Draft, tracked: Run) -> None:
        recogniser = Recogniser.load(lab.experiment.workspace)
        retriever = modes.open_locally(store.artifact.path)
        reading = Reading(recogniser.bank(retriever), store.read, retriever)
        clips = list(unspoken(CLIPS, lab.experiment.seed))
        rows = []
        for setting, threshold in ((report.DETECTED, settings.speech), ("speech detector off", 0)):
            heard_as = settings.model_copy(update={"speech": threshold})
            for mode, how in (("none", None), ("cross_attention", reading)):
                started = time.perf_counter()
                texts = [
                    " ".join(said.text for said in transcribe(c, recogniser, heard_as, reading=how))
                    for c in clips
                ]
                blank = dict.fromkeys(ROW)
                rows.append(
                    blank
                    | {
                        "task": "no_speech",
                        "mode": mode,
                        "datastore": how and "multimodal",
                        "setting": setting,
                        "utterances": len(clips),
                        "seconds_of_audio": sum(map(audio.duration, clips)),
                        "decode_seconds": time.perf_counter() - started,
                        "empty": sum(not text for text in texts) / len(clips),
                    }
                )
        write_json(draft.path / ROWS, rows)
        tracked.file(draft.path / ROWS)
        draft.summary["clips"] = len(clips)

    inputs = {"lm": lab.lm, "adapter": lab.adapter, "datastore": store.artifact}
    return stage.make(
        lab.experiment, "results/no_speech", "results", config, inputs, work, force=lab.force
    )


def _told(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a point's transcripts say that nobody said, for each word of the references."""
    words = inserted = copied = looped = 0
    for line in lines:
        edits = align(line["reference"], line["text"])
        words += sum(len(edit.reference_words) for edit in edits)
        inserted += sum(len(e.hypothesis_words) for e in edits if e.kind == "insert")
        wrong = Counter(w for e in edits if e.kind != "equal" for w in e.hypothesis_words)
        copied += sum((wrong & Counter(line["changed"])).values())
        looped += loops(line["text"].split())
    words = max(words, 1)
    return {"inserted": inserted / words, "copied": copied / words, "looped": looped / len(lines)}


def _title(task: Callable[..., Any]) -> str:
    return task.__doc__.partition("\n\n")[0]


def _measure(lab: Lab, name: str, task: Task) -> Artifact:
    """A task's rows and transcripts, as an artifact of its own."""
    experiment = lab.experiment
    config = {
        "task": name,
        "reproduce": {k: v for k, v in as_dict(lab.settings).items() if k != "docs"},
        "datastore": as_dict(experiment.datastore),
        "decode": as_dict(experiment.decode),
        "tune": as_dict(experiment.tune),
        "read": as_dict(experiment.read),
        "seed": experiment.seed,
    }

    def work(draft: Draft, tracked: Run) -> None:
        domain, limit, points = task(lab)
        rows, lines = [], []
        for tokens in dict.fromkeys(point.tokens for point in points):
            made = lab.tokens if tokens is None else _made(lab, tokens)
            spoken = lab.spoken("test", domain, limit, made)
            chosen = {point.name: point for point in points if point.tokens == tokens}
            heard = lab.transcribe({key: point.how for key, point in chosen.items()}, spoken)
            for key, point in chosen.items():
                rows.append(_row(lab, name, point, heard[key]))
                about = {"task": name, "point": key}
                lines += [json.dumps({**about, **asdict(one)}) + "\n" for one in heard[key]]
                tracked.log({f"wer.{_slug(key)}": rows[-1]["wer"]})
        write_json(draft.path / ROWS, rows)
        (draft.path / TRANSCRIPTS).write_text("".join(lines))
        tracked.file(draft.path / ROWS)
        draft.summary["rows"] = len(rows)

    inputs = {"lm": lab.lm, "adapter": lab.adapter, "tokens": lab.tokens}
    directory = f"results/{name}"
    return stage.make(experiment, directory, "results", config, inputs, work, force=lab.force)


def _row(lab: Lab, task: str, point: Point, heard: Sequence[Heard]) -> dict[str, Any]:
    """A line of `results.json`; what does not apply is None."""
    references, texts = [one.reference for one in heard], [one.text for one in heard]
    resamples = lab.experiment.evaluate.resamples
    words = word_error_rate(references, texts, resamples, lab.experiment.seed)
    queries = sum(one.queries for one in heard)
    return {
        "task": task,
        "mode": point.mode,
        "datastore": point.datastore,
        "phrases": point.phrases,
        "entries": point.entries,
        "setting": point.setting,
        "utterances": len(heard),
        "wer": words.rate,
        "wer_low": words.low,
        "wer_high": words.high,
        "entity_recall": entity_recall([one.entities for one in heard], texts).rate,
        "recall_at_k": sum(one.recalled for one in heard) / queries if queries else None,
        "seconds_of_audio": sum(one.seconds for one in heard),
        "decode_seconds": sum(one.decode_seconds for one in heard),
        "keys_mb": point.entries and point.entries * lab.experiment.lm.width * 4 / 1e6,
        "empty": None,
    }


def _store(made: Artifact, tuned: Path) -> Store:
    read = chosen_read(tuned)
    both = None if read is None else chosen(tuned, BOTH)
    return Store(made, chosen(tuned), read, both, unit(tuned))


def _knn(store: Store, name: str, setting: str | None = None) -> Point:
    return _ways(replace(store, read=None), name, setting)[0]


def _ways(store: Store, name: str, setting: str | None = None) -> list[Point]:
    """kNN-LM, and where there is something to attend to cross-attention and both."""
    path = store.artifact.path
    ways = {"knn": (store.knn, None)}
    if store.read is not None:
        ways |= {"cross_attention": (None, store.read), "both": (store.both, store.read)}
    entries = store.artifact.summary["entries"]
    return [
        Point(mode, modes.retrieving(path, *how), name, entries=entries, setting=setting)
        for mode, how in ways.items()
    ]


def _reading(lab: Lab, store: Artifact, lists: modes.Listed) -> Mode:
    """Each utterance's list read by the adapter, as the settings say."""
    return modes.AttendingPhrases(store.path, lab.experiment.read, lists, lab.settings.mentions)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


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
    source = lab.experiment.workspace / "phrases.jsonl"
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
    lab: Lab, store: Artifact, dev: Sequence[Tokenized], lists: modes.Listed, read: Read | None
) -> KNN:
    """The grid's setting of least dev WER among the phrases; beside reading them, with `read`."""
    one, grid = lab.spoken_text.unit, lab.experiment.tune
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
    how: dict[str, Mode] = {}
    for number, knn in enumerate(settings):
        how[str(number)] = RetrievingDocuments(store.path, knn, lists)
        if read is not None:
            ways = (how[str(number)], _reading(lab, store, lists))
            how[str(number)] = modes.Together(ways)
    heard = lab.transcribe(how, dev)
    return settings[min(range(len(settings)), key=lambda n: lab.error_rate(heard[str(n)]))]


def _choose_boost(lab: Lab, dev: Sequence[Tokenized], lists: Mapping[str, Sequence[str]]) -> float:
    how = {str(weight): modes.BoostingPhrases(weight, lists) for weight in lab.settings.boost}
    heard = lab.transcribe(how, dev)
    return min(lab.settings.boost, key=lambda weight: lab.error_rate(heard[str(weight)]))


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
    for answer in work_off([embed], shares, lab.experiment.evaluate.workers, "embedding"):
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


def _rerecorded(lab: Lab, condition: str) -> Artifact:
    """The test split under a condition, tokenized."""
    test = [
        one
        for one in manifest.read(lab.corpus.path / "test.jsonl")
        if isinstance(one, Utterance) and one.domain == ASSISTANT
    ][: lab.settings.sweep_utterances]
    seed = lab.experiment.seed
    recording = partial(Rerecord, condition=condition, seed=seed)
    config = {"condition": condition, "utterances": len(test), "seed": seed}
    return _tokenized(lab, condition, config, {"test": test}, recording)


def _spanish(lab: Lab) -> tuple[Artifact, Store]:
    """Spanish speech, tokenized; a datastore of it, and its settings."""
    size, mentions = lab.settings.sweep_utterances, lab.experiment.synthesize.mentions
    planned = spanish.plan(size, size, mentions, lab.experiment.seed)
    config = {"language": SPANISH, "utterances": size, "mentions": mentions}
    config["seed"] = lab.experiment.seed
    made = _tokenized(lab, SPANISH, config, planned, RenderSpeech)
    settings = lab.experiment.tokenize.model_copy(update={"name": made.path.name})
    about = lab.about(SPANISH, "paired").model_copy(update={"tokenize": settings})
    store = build_datastore.run(about, lab.force)
    return made, _store(store, tune.run(about, lab.force).path)


def _tokenized(
    lab: Lab,
    name: str,
    config: Mapping[str, Any],
    splits: Mapping[str, Sequence[Any]],
    recording: Callable[..., Any],
) -> Artifact:
    """Recordings of `splits` and their units; `recording`, given the `directory`, is the stage."""
    experiment = lab.experiment

    def work(draft: Draft, tracked: Run) -> None:
        record = (recording, {"directory": draft.path})
        for split, planned in splits.items():
            shares = parts(planned, lambda _: 1, PART_UTTERANCES, name=split)
            rows = [draft.path / f".{part.name}.jsonl" for part in shares]
            todo = [part for part, row in zip(shares, rows, strict=True) if not row.exists()]
            for _ in work_off([record], todo, experiment.synthesize.workers, f"{name} {split}"):
                pass
            (draft.path / f"{split}.jsonl").write_text("".join(row.read_text() for row in rows))
            draft.summary[f"{split}_utterances"] = len(planned)

    directory, inputs = f"conditions/{name}", {"corpus": lab.corpus}
    made = stage.make(
        experiment, directory, "corpus", config, inputs, work, bulk=("audio/",), force=lab.force
    )
    codebook = str(experiment.workspace / "codebook")
    changes = {"source": str(made.path), "name": f"tokens-{name}", "codebook": codebook}
    settings = experiment.tokenize.model_copy(update=changes)
    return tokenize.run(experiment.model_copy(update={"tokenize": settings}), lab.force)


def _made(lab: Lab, tokens: str) -> Artifact:
    return artifact.load(Path(lab.experiment.workspace) / tokens, "tokens")


if __name__ == "__main__":
    stage.main(run, __doc__, config="reproduce.yaml")
