"""A line of `results.json`: what was measured of one way to transcribe, from its transcripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cluster.stages import TranscribedUtterance
from jobs.reproduce.lab import Lab, Point
from mmrag.decoding.guard import loops
from mmrag.score import align, score_entities, word_error_rate

Row = Mapping[str, Any]
Transcripts = Mapping[tuple[str, str, str], tuple[str, str]]
"""(task, point, utterance) -> (reference, transcript)."""

ROWS, TRANSCRIPTS = "rows.json", "transcripts.jsonl"
"""Files of a task's artifact."""
DETECTED = "speech detector on"
"""The setting of clips in which nobody speaks as they are really heard."""
TOLD = ("inserted", "copied", "looped")
"""Keys that follow from the transcripts a task keeps."""
CONFIDENCE = ("bad", "bad_unclear", "good", "good_unclear", "calibration_error")
"""Keys of what is known of the models' confidence: how many transcripts are more than half wrong,
and at most a tenth, and the shares of them that are marked as unclear."""
ROW = (
    *("task", "model", "mode", "datastore", "phrases", "entries", "setting", "utterances", "wer"),
    *("wer_low", "wer_high", "entities", "entity_recall", "entity_precision", "entity_f1"),
    *("entity_false_alarms", "entity_wer", "entity_wer_low", "entity_wer_high"),
    *("entity_substitutions", "entity_deletions", "entity_insertions", "entity_words"),
    *("other_wer", "other_wer_low", "other_wer_high"),
    *("other_substitutions", "other_deletions", "other_insertions", "other_words"),
    *("recall_at_k", "seconds_of_audio", "decode_seconds"),
    *("keys_mb", "empty", *CONFIDENCE, *TOLD),
)
"""Keys of a line of `results.json`."""


def row(
    lab: Lab,
    task: str,
    point: Point,
    heard: Sequence[TranscribedUtterance],
    known: Collection[str],
) -> dict[str, Any]:
    """A line of `results.json` without what is TOLD; what does not apply is None.

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
        **dict.fromkeys(CONFIDENCE),
    }


def told(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
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
