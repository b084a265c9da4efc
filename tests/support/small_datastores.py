"""Datastores of a few entries whose tokens, keys and names say which they are."""

from pathlib import Path

import numpy as np

from mmrag.retrieval.datastore import publish, write_segment
from mmrag.retrieval.segment import Description, Segment, windows_of

DESCRIPTION = Description(width=4, window=5, metric="l2", audio="none", identity={"lm": "aaaa"})


def segment(number, utterances=2, length=3, documents=("shared", "own")) -> Segment:
    """Utterances of `length` entries; tokens, keys and names say which they are."""
    tokens = 1000 * (number + 1) + np.arange(utterances * length)
    each = np.split(tokens, utterances)
    names = [
        (f"utterance-{number}-{n}", documents[n % len(documents)].replace("own", f"own-{number}"))
        for n in range(utterances)
    ]
    return Segment(
        keys=np.random.default_rng(number).standard_normal((len(tokens), 4)),
        tokens=tokens,
        windows=np.concatenate([windows_of(one, 5) for one in each]),
        positions=np.tile(np.arange(length), utterances),
        utterances=np.repeat(np.arange(utterances), length),
        names=names,
    )


def fill(directory: Path, count: int, first: int = 0) -> None:
    """Publish so many segments, one by one, numbered from `first`."""
    for number in range(first, first + count):
        write_segment(directory, f"s-{number}", segment(number))
        publish(directory, [f"s-{number}"])
