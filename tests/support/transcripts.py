"""Transcripts made by hand, as a worker hands them back."""

from collections.abc import Sequence

from cluster.stages import TranscribedUtterance

REFERENCE = "call anna smith now"


def transcribed(
    number: int,
    text: str,
    reference: str = REFERENCE,
    entities: Sequence[str] = ("anna smith",),
) -> TranscribedUtterance:
    """What was heard of utterance `u<number>`, two seconds long."""
    return TranscribedUtterance(
        utterance=f"u{number}",
        speaker="voice",
        seconds=2.0,
        reference=reference,
        text=text,
        entities=list(entities),
        changed=[],
        decode_seconds=0.1,
        recalled=0,
        queries=0,
    )
