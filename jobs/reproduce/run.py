"""Every experiment measured: tables, plots and the same figures as JSON.

A finished task is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.modes import Mode
from cluster.tracking import Run
from jobs import stage, synthesize
from jobs.reproduce import report
from jobs.reproduce.end_to_end import ALONE
from jobs.reproduce.experiments import TASKS, Task
from jobs.reproduce.lab import OWN, Lab, Point
from jobs.reproduce.rows import ROWS, TRANSCRIPTS, row, told
from mmrag import artifact
from mmrag.artifact import Artifact, Draft, write_json
from mmrag.config import ConfigError, Experiment, recipe
from mmrag.model.whisper import PREFIX
from mmrag.speech.tokenized import Tokenized
from mmrag.storage import located

SPOTS = ("domain", "dynamic_context", "unsaid_phrases", "wrong_datastore", "spoken_squad")
"""Tasks in which phrases and terms are spotted."""
EVERY = 10**9
"""More utterances than a split has."""


def run(experiment: Experiment, force: bool = False) -> None:
    """Do every task, then write `results.md`, `results.json` and the plots."""
    tasks = _chosen(experiment)
    require_files(experiment, tasks)
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


def require_files(experiment: Experiment, tasks: Collection[str]) -> None:
    """Check that the texts, recordings and passages that `tasks` need are there: an hour later
    would be late. ConfigError names those that are not, and how to do without."""
    corpus, passages = experiment.synthesize, None
    if experiment.reproduce is not None and "spoken_squad" in tasks:
        passages = experiment.reproduce.passages
    named = {
        "synthesize.sentences": corpus.sentences.files if corpus.sentences else (),
        "synthesize.recordings": synthesize.manifests(corpus).values(),
        "reproduce.passages": () if passages is None else (passages,),
    }
    absent = {
        key: missing
        for key, paths in named.items()
        if (missing := [str(path) for path in paths if not located(path).is_file()])
    }
    if absent:
        listed = "; ".join(f"{key}: {', '.join(paths)}" for key, paths in absent.items())
        without = " ".join(f"{key}=null" for key in absent)
        raise ConfigError(
            f"no such files: {listed}. MMRAG_CORPUS names the directory that they lie in "
            f"(docs/models.md); or leave them out, and what is measured on them: {without}"
        )


def _chosen(experiment: Experiment) -> dict[str, Callable[..., Any]]:
    """The tasks that `reproduce.tasks` names, or all of them, in their own order."""
    everything = {**TASKS, **ALONE}
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
        done.append(task(lab) if name in ALONE else _measure(lab, name, task))
    rows: list[dict[str, Any]] = []
    heard = {}
    for made in done:
        if not (made.path / TRANSCRIPTS).exists():
            rows += json.loads((made.path / ROWS).read_text())
            continue
        lines = [json.loads(line) for line in (made.path / TRANSCRIPTS).open(encoding="utf-8")]
        points = dict.fromkeys(line["point"] for line in lines)
        for found, point in zip(json.loads((made.path / ROWS).read_text()), points, strict=True):
            rows.append(found | told([line for line in lines if line["point"] == point]))
        heard |= {
            (line["task"], line["point"], line["utterance"]): (line["reference"], line["text"])
            for line in lines
        }
    return rows, heard


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
            **({"spotting": experiment.spotting} if name in SPOTS else {}),
            **lab.heard_by.recipe,
        }
    )

    def work(draft: Draft, tracked: Run) -> None:
        domain, limit, points = task(lab)
        rows, lines = [], []
        for clips in dict.fromkeys(map(_clips, points)):
            tokens, of, split = clips
            made = lab.tokens if tokens is None else artifact.load(tokens, lab.tokens.kind)
            everyone = lab.spoken(split, of or domain, EVERY, made)
            known = {entity for one in everyone for entity in one.utterance.entities}
            chosen = {point.name: point for point in points if _clips(point) == clips}
            spoken = _wanted(everyone[:limit], chosen.values())
            first = {key: _first(point.how, chosen) for key, point in chosen.items()}
            distinct = {key: chosen[key].how for key in dict.fromkeys(first.values())}
            heard = lab.transcribe(distinct, spoken)
            for key, point in chosen.items():
                everybody = heard[first[key]]
                own = [o for o in everybody if point.only is None or o.utterance in point.only]
                if not own:
                    continue
                rows.append(row(lab, name, point, own, known))
                about = {"task": name, "point": key}
                lines += [json.dumps({**about, **asdict(one)}) + "\n" for one in own]
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


def _clips(point: Point) -> tuple[Path | None, str | None, str]:
    """What a point transcribes: where its tokens are, of which domain, of which split."""
    return point.tokens, point.domain, point.split


def _wanted(spoken: Sequence[Tokenized], points: Iterable[Point]) -> list[Tokenized]:
    """Those that any of the points tells of."""
    wanted = [point.only for point in points]
    if None in wanted:
        return list(spoken)
    named = frozenset().union(*wanted)
    return [one for one in spoken if one.utterance.id in named]


def _first(how: Mode, points: Mapping[str, Point]) -> str:
    """The first point that transcribes in just this way: it is done once."""
    return next(key for key, point in points.items() if point.how == how)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
