"""Every experiment measured: tables, plots and the same figures as JSON.

A finished task is not done again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cluster import modes
from cluster.modes import Mode
from cluster.stages import (
    TranscribedUtterance,
)
from cluster.tracking import Run
from jobs import stage
from jobs.reproduce import report
from jobs.reproduce.experiments import TASKS, Task
from jobs.reproduce.lab import OWN, Lab, Point
from mmrag import artifact
from mmrag.artifact import Artifact, Draft, write_json
from mmrag.config import ConfigError, Experiment, recipe
from mmrag.corpora.augment import unspoken
from mmrag.decoding.guard import loops
from mmrag.model.whisper import PREFIX
from mmrag.recogniser import load
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.score import align, score_entities, word_error_rate
from mmrag.speech import audio
from mmrag.transcribe import transcribe

ROWS, TRANSCRIPTS = "rows.json", "transcripts.jsonl"
EVERY = 10**9
"""More utterances than a split has."""
CLIPS = 100
"""Recordings in which nobody speaks."""
ROW = (
    *("task", "model", "mode", "datastore", "phrases", "entries", "setting", "utterances", "wer"),
    *("wer_low", "wer_high", "entities", "entity_recall", "entity_precision", "entity_f1"),
    *("entity_false_alarms", "entity_wer", "entity_wer_low", "entity_wer_high"),
    *("entity_substitutions", "entity_deletions", "entity_insertions", "entity_words"),
    *("other_wer", "other_wer_low", "other_wer_high"),
    *("other_substitutions", "other_deletions", "other_insertions", "other_words"),
    *("recall_at_k", "seconds_of_audio", "decode_seconds"),
    *("keys_mb", "empty", "inserted", "copied", "looped"),
)
"""Keys of a line of `results.json`."""


def run(experiment: Experiment, force: bool = False) -> None:
    """Do every task, then write `results.md`, `results.json` and the plots."""
    tasks = _chosen(experiment)
    rows: list[dict[str, Any]] = []
    heard: dict[tuple[str, str, str], tuple[str, str]] = {}
    for about in _compared(experiment):
        lab = Lab(about, force)
        measured, texts = _rows(lab, tasks)
        rows += measured
        if lab.family == OWN or not heard:
            heard = texts
    notes = {name: " ".join(task.__doc__.split()) for name, task in tasks.items()}
    report.write(experiment, rows, heard, notes)
    report.show(rows)
    stage.console.print(
        f"\nwritten to {experiment.reproduce.docs}: results.md, results.json, plots"
    )


def _chosen(experiment: Experiment) -> dict[str, Callable[..., Any]]:
    """The tasks that `reproduce.tasks` names, or all of them, in their own order."""
    everything = {**TASKS, "no_speech": no_speech}
    if experiment.reproduce is None or experiment.reproduce.tasks is None:
        return everything
    wanted = experiment.reproduce.tasks
    if unknown := [name for name in wanted if name not in everything]:
        raise ConfigError(
            f"reproduce.tasks: no task {', '.join(unknown)}; there are {', '.join(everything)}"
        )
    return {name: task for name, task in everything.items() if name in wanted}


def _compared(experiment: Experiment) -> Iterator[Experiment]:
    """The experiment, and once more for the Whisper that `reproduce.whisper` names."""
    yield experiment
    whisper = experiment.reproduce and experiment.reproduce.whisper
    if whisper and experiment.models is None:
        yield experiment.model_copy(update={"models": f"{PREFIX}{whisper.removeprefix(PREFIX)}"})


def _rows(
    lab: Lab, tasks: Mapping[str, Callable[..., Any]]
) -> tuple[list[dict[str, Any]], dict[tuple[str, str, str], tuple[str, str]]]:
    """One model's rows of every task, and what it heard: (task, point, utterance) -> (reference,
    transcript)."""
    done = []
    for number, (name, task) in enumerate(tasks.items(), start=1):
        stage.console.print(
            f"\n[bold]{number}/{len(tasks)}  {name}[/bold], {lab.family}: {_title(task)}"
        )
        done.append(no_speech(lab) if name == "no_speech" else _measure(lab, name, task))
    rows: list[dict[str, Any]] = []
    heard = {}
    for made in done:
        if not (made.path / TRANSCRIPTS).exists():
            rows += json.loads((made.path / ROWS).read_text())
            continue
        lines = [json.loads(line) for line in (made.path / TRANSCRIPTS).open(encoding="utf-8")]
        points = dict.fromkeys(line["point"] for line in lines)
        for row, point in zip(json.loads((made.path / ROWS).read_text()), points, strict=True):
            rows.append(row | _told([line for line in lines if line["point"] == point]))
        heard |= {
            (line["task"], line["point"], line["utterance"]): (line["reference"], line["text"])
            for line in lines
        }
    return rows, heard


def no_speech(lab: Lab) -> Artifact:
    """Silence, white noise and tones: there is nothing to transcribe.

    From end to end, as `mmrag transcribe` does it, with the detector that keeps such audio from the
    model and without.
    """
    store, settings = lab.multimodal, lab.experiment.decode
    config = recipe({"clips": CLIPS, "decode": settings, "attention": store.attention})

    def work(draft: Draft, tracked: Run) -> None:
        recogniser = load(lab.heard_by.name, language=lab.heard_by.language)
        retriever = modes.open_locally(store.artifact.path)
        ways: dict[str, dict[str, Any]] = {"none": {}}
        if lab.attention is None:
            ways["knn"] = {"retrieval": Retrieval(retriever, store.knn)}
        else:
            bank = recogniser.window_cache(retriever)
            reading = AttentionSource(bank, store.attention, retriever)
            ways["cross_attention"] = {"attention": reading}
        clips = list(unspoken(CLIPS, lab.experiment.seed))
        rows = []
        for setting, threshold in ((report.DETECTED, settings.speech), ("speech detector off", 0)):
            heard_as = settings.model_copy(update={"speech": threshold})
            for mode, how in ways.items():
                started = time.perf_counter()
                texts = [
                    " ".join(said.text for said in transcribe(c, recogniser, heard_as, **how))
                    for c in clips
                ]
                blank = dict.fromkeys(ROW)
                rows.append(
                    blank
                    | {
                        "task": "no_speech",
                        "model": lab.family,
                        "mode": mode,
                        "datastore": "multimodal" if how else None,
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

    inputs = {**lab.inputs, "datastore": store.artifact}
    return stage.make(
        lab.experiment,
        f"results/{lab.prefix}no_speech",
        "results",
        config,
        inputs,
        work,
        holds=artifact.nothing,
        force=lab.force,
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
    config = recipe(
        {
            "task": name,
            "reproduce": lab.settings,
            "datastore": experiment.datastore,
            "source": experiment.datastore.source,  # which is no input here
            "decode": experiment.decode,
            "tune": experiment.tune,
            "attention": experiment.attention,
            "seed": experiment.seed,
            **lab.heard_by.recipe,
        }
    )

    def work(draft: Draft, tracked: Run) -> None:
        domain, limit, points = task(lab)
        rows, lines = [], []
        for tokens, of in dict.fromkeys((point.tokens, point.domain) for point in points):
            made = lab.tokens if tokens is None else artifact.load(tokens, lab.tokens.kind)
            everyone = lab.spoken("test", of or domain, EVERY, made)
            spoken = everyone[:limit]
            known = {entity for one in everyone for entity in one.utterance.entities}
            chosen = {p.name: p for p in points if (p.tokens, p.domain) == (tokens, of)}
            first = {key: _first(point.how, chosen) for key, point in chosen.items()}
            distinct = {key: chosen[key].how for key in dict.fromkeys(first.values())}
            heard = lab.transcribe(distinct, spoken)
            for key, point in chosen.items():
                everybody = heard[first[key]]
                told = [o for o in everybody if point.only is None or o.utterance in point.only]
                if not told:
                    continue
                rows.append(_row(lab, name, point, told, known))
                about = {"task": name, "point": key}
                lines += [json.dumps({**about, **asdict(one)}) + "\n" for one in told]
                tracked.log({f"wer.{_slug(key)}": rows[-1]["wer"]})
        write_json(draft.path / ROWS, rows)
        (draft.path / TRANSCRIPTS).write_text("".join(lines), encoding="utf-8")
        tracked.file(draft.path / ROWS)
        draft.summary["rows"] = len(rows)

    directory = f"results/{lab.prefix}{name}"
    return stage.make(
        experiment,
        directory,
        "results",
        config,
        lab.inputs,
        work,
        holds=artifact.nothing,
        force=lab.force,
    )


def _first(how: Mode, points: Mapping[str, Point]) -> str:
    """The first point that transcribes in just this way: it is done once."""
    return next(key for key, point in points.items() if point.how == how)


def _row(
    lab: Lab,
    task: str,
    point: Point,
    heard: Sequence[TranscribedUtterance],
    known: Collection[str],
) -> dict[str, Any]:
    """A line of `results.json`; what does not apply is None.

    `known`, the entities of the split, may be heard in vain where no list of phrases was given.
    """
    references, texts = [one.reference for one in heard], [one.text for one in heard]
    sampling = {"resamples": lab.experiment.evaluate.resamples, "seed": lab.experiment.seed}
    words = word_error_rate(references, texts, **sampling)
    candidates = [known if point.lists is None else point.lists[one.utterance] for one in heard]
    own = [one.entities for one in heard]
    entities = score_entities(references, texts, own, candidates, **sampling)
    queries = sum(one.queries for one in heard)
    return {
        "task": task,
        "model": lab.family,
        "mode": point.mode,
        "datastore": point.datastore,
        "phrases": point.phrases,
        "entries": point.entries,
        "setting": point.setting,
        "utterances": len(heard),
        "wer": words.rate,
        "wer_low": words.low,
        "wer_high": words.high,
        **entities.row,
        "recall_at_k": sum(one.recalled for one in heard) / queries if queries else None,
        "seconds_of_audio": sum(one.seconds for one in heard),
        "decode_seconds": sum(one.decode_seconds for one in heard),
        "keys_mb": point.entries and point.entries * lab.heard_by.width * 4 / 1e6,
        "empty": None,
    }


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
