"""How sure to be of transcripts: a model's probabilities, calibrated on clips with transcripts.

The manifests after --dev fit the calibration, which is saved beside the models; those after --test
only tell how well it holds. Each manifest weighs the same: give speech that the models know, and
speech that they do not. After an `@` stand the domains that are read of one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from jobs.stage import console, explained
from mmrag import artifact, shipped, terminal
from mmrag.config import Decode
from mmrag.corpora import manifest
from mmrag.decoding.confidence import (
    Calibration,
    Judged,
    expected_calibration_error,
    fit,
    marked,
    reliability,
)
from mmrag.folders import printable
from mmrag.recogniser import CALIBRATION, Recogniser
from mmrag.records import Rejection, Utterance, Word
from mmrag.score import align, word_error_rate
from mmrag.speech import audio, vad
from mmrag.speech.audio import AudioError
from mmrag.storage import Location, located
from mmrag.text import spoken
from mmrag.transcribe import recognise, words

DECODE = Decode(length_penalty=0.6, tokens_per_second=16, max_seconds=20)
BATCH = 16
CLIPS = 300


class Recordings(NamedTuple):
    """A manifest, or what is of some domains in it."""

    path: Location
    domains: frozenset[str] = frozenset()
    """Empty for all of them."""


def run(
    models: str, dev: Mapping[str, Recordings], test: Mapping[str, Recordings], clips: int = CLIPS
) -> Calibration:
    """Fit on the `dev` manifests, by name, save beside the models, and report on both.

    Of each manifest `clips` are read, spread over the whole of it. Clips that cannot be read, or
    are shorter than what the encoder sees in one frame, are named and passed over. ValueError if
    nothing is left of a manifest, or its words are all right and those of the others too.
    """
    directory = shipped.find(models)
    recogniser = Recogniser.load(directory, calibrated=False)
    inputs = {"lm": artifact.load(directory / "lm", "lm")}
    inputs |= {f"dev/{name}": artifact.outside(one.path) for name, one in dev.items()}
    domains = {name: sorted(one.domains) for name, one in dev.items() if one.domains}
    judged = {name: judge(recogniser, one, clips) for name, one in dev.items()}
    calibration = fit(judged)
    place = directory / CALIBRATION
    config = {"clips": clips, "domains": domains}
    with artifact.create(place, CALIBRATION, config, inputs, force=True) as draft:
        calibration.save(draft.path)
        draft.summary["unclear"] = round(calibration.unclear, 3)
    tested = {name: judge(recogniser, one, clips) for name, one in test.items()}
    console.print(_summary(calibration, {"dev": judged, "test": tested}))
    for split, sets in {"dev": judged, "test": tested}.items():
        if sets:
            console.print(_reliability(calibration, split, list(sets.values())))
    console.print(f"{directory / CALIBRATION}: unclear below {calibration.unclear:.2f}")
    return calibration


def judge(recogniser: Recogniser, recordings: Recordings, clips: int) -> list[Judged]:
    """The transcripts of clips of a manifest, made without retrieval, and which words are right."""
    judged: list[Judged] = []
    path, domains = recordings
    rows = [one for one in manifest.read(path) if _usable(one, domains)]
    least = recogniser.encoder.field / audio.SAMPLE_RATE
    chosen = [rows[n] for n in np.linspace(0, len(rows) - 1, min(clips, len(rows))).astype(int)]
    for start in range(0, len(chosen), BATCH):
        read: list[Utterance] = []
        waves = []
        for one in chosen[start : start + BATCH]:
            try:
                wave = audio.read(one.audio, audio.span_of(one), min_seconds=least)
                waves.append(vad.trim(wave)[0])
                read.append(one)
            except AudioError as error:
                console.print(f"  left out: {error}", markup=False)
        units = recogniser.encode(waves)
        for one, heard in zip(read, recognise(recogniser, units, DECODE), strict=True):
            found = words(heard, recogniser.vocabulary)
            text = " ".join(word.text for word in found)
            wrong = word_error_rate([one.text], [text], resamples=1).rate
            said = len(spoken(one.text).split())
            judged.append(Judged(found, right(one.text, found), wrong, said))
    if not judged:
        of = f" of {', '.join(sorted(domains))}" if domains else ""
        raise ValueError(f"{printable(path)}: no clip{of} with a transcript that could be read")
    return judged


def right(reference: str, found: Sequence[Word]) -> list[bool]:
    """Which words stand in the reference, all that each of them is spoken as ("25" is two)."""
    edits = align(reference, " ".join(word.text for word in found))
    parts = iter([edit.kind == "equal" for edit in edits for _ in edit.hypothesis_words])
    return [all(next(parts, False) for _ in spoken(word.text).split()) for word in found]


def _usable(one: Utterance | Rejection, domains: frozenset[str]) -> bool:
    if isinstance(one, Rejection):
        console.print(f"  left out: {one.source}: {one.reason}", markup=False)
        return False
    wanted = not domains or one.domain in domains
    return wanted and one.audio is not None and bool(spoken(one.text or ""))


def _summary(
    calibration: Calibration, splits: Mapping[str, Mapping[str, Sequence[Judged]]]
) -> Table:
    """A row a manifest: how wrong, how sure, and what is marked as unclear."""
    table = Table(title="Confidence", title_justify="left")
    for column in ("clips", "", "transcripts", "WER", "words right", "confidence", "ECE"):
        table.add_column(column, justify="left" if column in ("clips", "") else "right")
    table.add_column("bad ones unclear", justify="right")
    table.add_column("good ones unclear", justify="right")
    for split, sets in splits.items():
        for name, judged in sets.items():
            sure, right = _pooled(calibration, judged)
            bad, good = marked(calibration, judged)
            error = expected_calibration_error(sure, right)
            table.add_row(
                *(name, split, str(len(judged)), f"{_word_error_rate(judged):.1%}"),
                *(f"{right.mean():.1%}", f"{sure.mean():.1%}"),
                *(f"{error:.3f}", _share(bad), _share(good)),
            )
    return table


def _reliability(calibration: Calibration, split: str, sets: Sequence[Sequence[Judged]]) -> Table:
    """How often words of each confidence are right, all manifests of a split together."""
    table = Table(title=f"Words of {split}, by confidence", title_justify="left")
    for column in ("confidence", "words", "mean", "right"):
        table.add_column(column, justify="right")
    pooled = [_pooled(calibration, judged) for judged in sets]
    sure, right = (np.concatenate(each) for each in zip(*pooled, strict=True))
    rows = reliability(sure, right)
    for number, (count, mean, share) in enumerate(rows):
        low, high = number / len(rows), (number + 1) / len(rows)
        shown = (f"{mean:.2f}", f"{share:.2f}") if count else ("–", "–")
        table.add_row(f"{low:.1f}–{high:.1f}", str(count), *shown)
    table.caption = f"expected calibration error {expected_calibration_error(sure, right):.3f}"
    return table


def _pooled(calibration: Calibration, judged: Sequence[Judged]) -> tuple[np.ndarray, np.ndarray]:
    """Confidence (W,) and correctness (W,) of all words."""
    sure = [calibration.words(one.words) for one in judged]
    return np.concatenate(sure), np.concatenate([np.array(one.correct, float) for one in judged])


def _word_error_rate(judged: Sequence[Judged]) -> float:
    errors = sum(one.error_rate * one.reference_words for one in judged)
    return errors / sum(one.reference_words for one in judged)


def _share(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.1%}"


def _named(text: str) -> tuple[str, Recordings]:
    name, equals, rest = text.partition("=")
    path, at, domains = rest.partition("@")
    if not (name and equals and path) or (at and not domains):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MANIFEST[@DOMAIN,…]")
    return name, Recordings(located(path), frozenset(filter(None, domains.split(","))))


def main() -> None:
    """Calibrate from the command line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.calibrate", description=__doc__)
    parser.add_argument("--models", default=shipped.DEFAULT, help="default: %(default)s")
    named = {"nargs": "+", "type": _named, "metavar": "NAME=MANIFEST[@DOMAIN,…]", "default": []}
    parser.add_argument("--dev", required=True, help="what to fit on", **named)
    parser.add_argument("--test", help="what to report on besides", **named)
    parser.add_argument("--clips", type=int, default=CLIPS, help="of each (default: %(default)s)")
    with terminal.command("error"):
        options = parser.parse_args()
        for split in ("dev", "test"):
            counts = Counter(name for name, _ in getattr(options, split))
            if twice := [name for name, count in counts.items() if count > 1]:
                parser.error(f"--{split}: {twice[0]!r} stands for two manifests")
        given = dict(options.dev), dict(options.test), options.clips
        explained(lambda: run(options.models, *given))


if __name__ == "__main__":
    main()
