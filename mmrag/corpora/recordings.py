"""Recordings as a part of a made corpus: as they are, and again under worse conditions.

What is rare (an hour of people, or of a synthesizer that is slow) is heard several times, each time
recorded elsewhere and at another speed, beside what is plentiful (days of quick synthetic speech).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mmrag.corpora import augment, manifest
from mmrag.corpora.voices.speech import SPEEDS, played
from mmrag.records import Rejection, Timed, Utterance
from mmrag.speech import audio
from mmrag.speech.targets import FIELD
from mmrag.storage import Location

LEAST_SECONDS = FIELD / audio.SAMPLE_RATE
"""Of a recording: what HuBERT sees in one frame."""
DOMAIN_LETTERS = 40
"""Of a domain in an id, which is part of a file's name."""


@dataclass(frozen=True)
class Rerecorded:
    """A recording that is to stand in the corpus as `said.id`."""

    said: Utterance
    seed: tuple[int, ...] | None
    """Of its augmentation; None for the recording as it is."""


def plan(
    manifests: Mapping[str, Location], copies: int, seed: int
) -> Iterator[tuple[str, Rerecorded | Rejection]]:
    """(split, recording) for each line of each split's manifest; lm's stand `copies` times.

    Lines that cannot be used, and those that have no audio, are rejections. OSError for a manifest
    that cannot be read.
    """
    for split, path in manifests.items():
        for number, one in enumerate(manifest.read(path)):
            if isinstance(one, Rejection):
                yield split, one
            elif one.audio is None:
                yield split, Rejection(one.id, "text without a recording")
            else:
                domain = one.domain or path.parent.name
                named = re.sub(r"[^\w-]", "_", domain)[:DOMAIN_LETTERS]
                for copy in range(copies if split == "lm" else 1):
                    id = f"{named}-{split}-{number:06d}-{copy}"
                    again = (seed, *split.encode(), number, copy) if copy else None
                    yield split, Rerecorded(replace(one, id=id, document=id, domain=domain), again)


def again(said: Iterable[tuple[Utterance, int]], seed: int) -> Iterator[Rerecorded]:
    """Further recordings of utterances of a corpus, each given with how often it is to stand."""
    for one, copies in said:
        for copy in range(1, copies):
            id = f"{one.id}-{copy}"
            yield Rerecorded(replace(one, id=id, document=id), (seed, *id.encode()))


def record(recorded: Rerecorded) -> tuple[Utterance, np.ndarray]:
    """The utterance, timed as it now sounds, and its sound (T,) float32 at SAMPLE_RATE.

    Raises AudioError for a recording that cannot be read, or is shorter than LEAST_SECONDS.
    """
    said, longer = recorded.said, 1.0
    wave = audio.read(said.audio, audio.span_of(said), min_seconds=LEAST_SECONDS).numpy()
    if recorded.seed is not None:
        draw = np.random.default_rng(recorded.seed)
        wave, longer = played(wave, audio.SAMPLE_RATE, float(draw.choice(SPEEDS)))
        wave = np.clip(augment.rough(wave, draw), -1, 1)

    def timed(what: tuple[Timed, ...]) -> tuple[Timed, ...]:
        return tuple(Timed(one.text, one.start * longer, one.end * longer) for one in what)

    return replace(said, offset=None, words=timed(said.words), phones=timed(said.phones)), wave
