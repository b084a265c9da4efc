"""Experiments from the file to the words, as `mmrag transcribe` does it: what a person will meet.

They need no cluster: this process hears one clip after the other, on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import modes
from cluster.tracking import Run
from jobs import stage
from jobs.calibrate import right
from jobs.reproduce.lab import ASSISTANT, EVERYDAY, Lab
from jobs.reproduce.other_speech import age_group, recorded, spread
from jobs.reproduce.rows import DETECTED, ROW, ROWS
from mmrag import artifact, shipped
from mmrag.artifact import Artifact, ArtifactError, Draft, write_json
from mmrag.config import BatchDecode, recipe
from mmrag.corpora import manifest
from mmrag.corpora.augment import unspoken
from mmrag.decoding.confidence import (
    BAD,
    GOOD,
    Calibration,
    Judged,
    expected_calibration_error,
    marked,
)
from mmrag.recogniser import CALIBRATION, AnyRecogniser, load
from mmrag.records import Utterance, Word
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.score import word_error_rate
from mmrag.speech import audio
from mmrag.speech.audio import AudioError
from mmrag.text import spoken
from mmrag.transcribe import transcribe

CLIPS = 100
"""Recordings in which nobody speaks."""


def no_speech(lab: Lab) -> Artifact:
    """Silence, white noise and tones: there is nothing to transcribe.

    From end to end, as `mmrag transcribe` does it, with the detector that keeps such audio from the
    model and without.
    """
    store, settings = lab.multimodal, lab.experiment.decode
    config = {"clips": CLIPS, "decode": settings, "attention": store.attention}

    def rows() -> Iterator[dict[str, Any]]:
        recogniser = load(lab.heard_by.name, language=lab.heard_by.language)
        retriever = modes.open_locally(store.artifact.path)
        ways: dict[str, dict[str, Any]] = {"none": {}}
        if lab.attention is None:
            ways["knn"] = {"retrieval": Retrieval(retriever, store.knn)}
        else:
            cache = recogniser.window_cache(retriever)
            reading = AttentionSource(cache, store.attention, retriever)
            ways["cross_attention"] = {"attention": reading}
        clips = list(unspoken(CLIPS, lab.experiment.seed))
        for setting, threshold in ((DETECTED, settings.speech), ("speech detector off", 0)):
            heard_as = settings.model_copy(update={"speech": threshold})
            for mode, how in ways.items():
                started = time.perf_counter()
                texts = [
                    " ".join(said.text for said in transcribe(c, recogniser, heard_as, **how))
                    for c in clips
                ]
                yield {
                    "mode": mode,
                    "datastore": "multimodal" if how else None,
                    "setting": setting,
                    "utterances": len(clips),
                    "seconds_of_audio": sum(map(audio.duration, clips)),
                    "decode_seconds": time.perf_counter() - started,
                    "empty": sum(not text for text in texts) / len(clips),
                }

    return _made(lab, "no_speech", config, {"datastore": store.artifact}, rows)


def end_to_end(lab: Lab) -> Artifact:
    """From the file to the words, as `mmrag transcribe` does it without retrieval: how right, how
    sure and how quick.

    No voice, person or sentence of them is in any training data. Unclear are the transcripts whose
    confidence, calibrated on dev, is below the threshold that was chosen there; bad ones have more
    than half of their words wrong, good ones at most a tenth. Time is that of the processor, of one
    core, for all of it: reading, detecting speech, encoding, decoding.
    """
    made, settings = calibration_of(lab), lab.experiment.decode
    config = {"clips": lab.settings.utterances, "decode": settings}
    inputs = {} if made is None else {CALIBRATION: made}

    def rows() -> Iterator[dict[str, Any]]:
        recogniser = load(lab.heard_by.name, language=lab.heard_by.language)
        calibration = None if made is None else Calibration.read(made.path)
        for setting, clips in _groups(lab).items():
            heard = list(_heard(recogniser, clips, settings))
            if heard:
                yield {"mode": "none", "setting": setting, **_judged(lab, heard, calibration)}

    return _made(lab, "end_to_end", config, inputs, rows)


ALONE: dict[str, Callable[[Lab], Artifact]] = {"end_to_end": end_to_end, "no_speech": no_speech}
"""Tasks that make their rows by themselves, one clip after the other."""


def calibration_of(lab: Lab) -> Artifact | None:
    """What was calibrated for the language model that is measured: in the workspace, or with the
    model of the package that it is; None, and said so, where nobody did."""
    base, place = lab.experiment.train.base, lab.experiment.workspace / CALIBRATION
    if not place.exists() and base is not None and base.startswith(shipped.PREFIX):
        place = shipped.find(base) / CALIBRATION
    try:
        made = artifact.load(place, CALIBRATION)
        made.require("lm", lab.heard_by.made)
    except ArtifactError as error:
        stage.console.print(f"  no confidence: {error} (jobs.calibrate makes it)", markup=False)
        return None
    return made


@dataclass(frozen=True)
class _HeardClip:
    """A clip's transcript."""

    said: Utterance
    text: str
    words: list[Word]
    correct: list[bool]
    """Of each word."""
    seconds: float
    """Of the processor."""


def _groups(lab: Lab) -> dict[str, list[Utterance]]:
    """The test split's clips: planned sentences in held-out voices by what they are, recordings of
    people by domain and age; `reproduce.utterances` of each at most, spread over all of them."""
    texts = lab.experiment.synthesize.sentences
    real = {Path(file).stem for file in texts.files} if texts else set()
    groups: dict[str, list[Utterance]] = {}
    for one in manifest.read(lab.corpus.path / "test.jsonl"):
        if not isinstance(one, Utterance) or one.audio is None or not spoken(one.text or ""):
            continue
        if recorded(one, "test"):
            name = f"{one.domain}, {age_group(one.age)}"
        elif one.domain in real:
            name = "held-out voices, real sentences"
        elif one.domain in (EVERYDAY, ASSISTANT):
            name = "held-out voices, sentences of the grammar"
        else:
            continue
        groups.setdefault(name, []).append(one)
    most = lab.settings.utterances
    return {name: spread(clips, most) for name, clips in sorted(groups.items())}


def _heard(
    recogniser: AnyRecogniser, clips: Sequence[Utterance], settings: BatchDecode
) -> Iterator[_HeardClip]:
    """Each clip transcribed by itself, on one thread; those that cannot be read are named."""
    keeping = settings.model_copy(update={"unclear": "keep"})
    loaded = False
    with _one_thread():
        for one in clips:
            try:
                if not loaded:  # what is loaded at the first clip is loaded once
                    list(transcribe(one.audio, recogniser, keeping))
                    loaded = True
                started = time.process_time()
                said = list(transcribe(one.audio, recogniser, keeping))
            except AudioError as error:
                stage.console.print(f"  left out: {error}", markup=False)
                continue
            seconds = time.process_time() - started
            words = [word for part in said for word in part.words]
            yield _HeardClip(
                one,
                " ".join(part.text for part in said if part.text),
                words,
                right(one.text, words),
                seconds,
            )


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _judged(
    lab: Lab, heard: Sequence[_HeardClip], calibration: Calibration | None
) -> dict[str, Any]:
    """How right, how sure and how quick."""
    references, texts = [one.said.text for one in heard], [one.text for one in heard]
    sampling = {"resamples": lab.experiment.evaluate.resamples, "seed": lab.experiment.seed}
    words = word_error_rate(references, texts, **sampling)
    found = {
        "utterances": len(heard),
        "wer": words.rate,
        "wer_low": words.low,
        "wer_high": words.high,
        "seconds_of_audio": sum(one.said.duration for one in heard),
        "decode_seconds": sum(one.seconds for one in heard),
    }
    return found if calibration is None else found | confidence(calibration, heard)


def confidence(calibration: Calibration, heard: Sequence[_HeardClip]) -> dict[str, Any]:
    """The keys of `rows.CONFIDENCE`; a transcript without a word says nothing, and is neither bad
    nor good."""
    judged = [
        Judged(one.words, one.correct, word_error_rate([one.said.text], [one.text], 1).rate)
        for one in heard
        if one.correct
    ]
    bad, good = marked(calibration, judged)
    sure = [calibration.words(one.words) for one in judged]
    correct = [np.array(one.correct, float) for one in judged]
    error = None
    if judged:
        error = expected_calibration_error(np.concatenate(sure), np.concatenate(correct))
    return {
        "bad": sum(one.error_rate > BAD for one in judged),
        "bad_unclear": None if np.isnan(bad) else bad,
        "good": sum(one.error_rate <= GOOD for one in judged),
        "good_unclear": None if np.isnan(good) else good,
        "calibration_error": error,
    }


def _made(
    lab: Lab,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    rows: Callable[[], Iterator[dict[str, Any]]],
) -> Artifact:
    """A task's rows as an artifact of its own; what does not apply is None."""

    def work(draft: Draft, tracked: Run) -> None:
        about = {"task": name, "model": lab.family}
        made = [dict.fromkeys(ROW) | about | found for found in rows()]
        write_json(draft.path / ROWS, made)
        tracked.file(draft.path / ROWS)
        draft.summary["clips"] = sum(found["utterances"] for found in made)

    directory = f"results/{lab.prefix}{name}"
    return stage.make(
        lab.experiment,
        directory,
        "results",
        recipe(config),
        {**lab.inputs, **inputs},
        work,
        holds=artifact.nothing,
        force=lab.force,
    )
