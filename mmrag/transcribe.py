"""Audio to transcript, from end to end. Start reading here.

audio -> units -> ids -> decode (with retrieval) -> words with their evidence
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmrag import artifact, audio, pretrained
from mmrag.config import Decode
from mmrag.datastore import Datastore
from mmrag.decode import Choice, Hypothesis, Retrieval, decode
from mmrag.hubert import HubertEncoder
from mmrag.lm import LM
from mmrag.records import NO_ENTRY, Source, Transcript, Units, Word
from mmrag.units import Codebook
from mmrag.vocabulary import Vocabulary


@dataclass(frozen=True)
class Recogniser:
    """The three models that turn sound into text, and where they came from."""

    encoder: HubertEncoder
    codebook: Codebook
    lm: LM
    vocabulary: Vocabulary
    identity: dict[str, str]
    """Fingerprints of the hubert, codebook and lm artifacts."""

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Recogniser:
        """Read `hubert/`, `codebook/` and `lm/` below `directory`.

        Raises ArtifactError if one is missing or was not made from the other two.
        """
        made = {kind: artifact.load(directory / kind, kind) for kind in ("hubert", "codebook")}
        made["lm"] = artifact.load(directory / "lm", "lm")
        made["codebook"].require("hubert", made["hubert"])
        made["lm"].require("codebook", made["codebook"])
        lm, vocabulary = pretrained.load(made["lm"].path, device)
        return cls(
            encoder=HubertEncoder.load(made["hubert"].path).to(device).eval(),
            codebook=Codebook.load(made["codebook"].path),
            lm=lm,
            vocabulary=vocabulary,
            identity={role: one.fingerprint for role, one in made.items()},
        )

    def listen(self, waves: Sequence[Tensor]) -> list[Units]:
        """Waves (T,) at 16 kHz to units."""
        features = self.encoder.features(waves)
        return [self.codebook.encode(one.cpu().numpy()) for one in features]


def transcribe(
    path: Path | bytes,
    recogniser: Recogniser,
    settings: Decode,
    retrieval: Retrieval | None = None,
    datastore: Datastore | None = None,
) -> Iterator[Transcript]:
    """Transcribe a file of any length, one stretch of at most `settings.max_seconds` at a time.

    `datastore` names the sources of retrieved words; it is what `retrieval` searches.
    Raises AudioError if the file cannot be read or is too short to hold a word.
    """
    for segment in audio.segments(path, settings.max_seconds):
        units = recogniser.listen([segment.wave])
        [heard] = recognise(recogniser, units, settings, retrieval)
        text = recogniser.vocabulary.decode(heard.tokens)
        spoken = words(heard, recogniser.vocabulary, datastore)
        yield Transcript(text, spoken, segment.start, segment.end, heard.stopped)


def recognise(
    recogniser: Recogniser,
    units: Sequence[Units],
    settings: Decode,
    retrieval: Retrieval | Sequence[Retrieval | None] | None = None,
    **biasing: Any,
) -> list[Hypothesis]:
    """Units of several clips to hypotheses, decoded together; `biasing` is handed to `decode`."""
    vocabulary = recogniser.vocabulary
    frame = recogniser.codebook.frame_seconds
    seconds = [float(one.durations.sum()) * frame for one in units]
    return decode(
        recogniser.lm,
        vocabulary,
        [vocabulary.encode_units(one) for one in units],
        [max(16, round(s * settings.tokens_per_second)) for s in seconds],
        settings,
        retrieval,
        **biasing,
    )


def words(
    heard: Hypothesis, vocabulary: Vocabulary, datastore: Datastore | None = None
) -> tuple[Word, ...]:
    """The hypothesis's words with probabilities, and the entry that spoke for each."""
    found, start = [], 0
    for text, end in vocabulary.word_ends(heard.tokens):
        choices = heard.choices[start:end]
        found.append(
            Word(
                text=text,
                probability=_probability(choice.logp for choice in choices),
                lm_probability=_probability(choice.lm_logp for choice in choices),
                changed=any(choice.token != choice.lm_token for choice in choices),
                source=_source(choices, vocabulary, datastore),
            )
        )
        start = end
    return tuple(found)


def _probability(logps: Iterator[float]) -> float:
    return math.exp(sum(logps))


def _source(
    choices: Sequence[Choice], vocabulary: Vocabulary, datastore: Datastore | None
) -> Source | None:
    """The nearest entry among those of the tokens that retrieval changed, else of any token."""
    voted = [choice for choice in choices if choice.entry != NO_ENTRY]
    changed = [choice for choice in voted if choice.token != choice.lm_token]
    if datastore is None or not voted:
        return None
    best = min(changed or voted, key=lambda choice: choice.distance)
    window = datastore.windows(np.array([best.entry]))[0]
    return Source(
        entry=best.entry,
        distance=best.distance,
        document=datastore.document_name(datastore.documents[best.entry]),
        utterance=datastore.utterance_name(best.entry),
        text=vocabulary.decode(window.tolist()),
    )
