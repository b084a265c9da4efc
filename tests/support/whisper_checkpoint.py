"""A Whisper of random weights, as small as one can be."""

from collections.abc import Iterable
from pathlib import Path

from mmrag.config import WhisperShape, WhisperTraining
from mmrag.model.whisper_training import create


def shape(**changes) -> WhisperShape:
    small = {
        **{"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feed_forward": 16},
        **{"mel_bands": 20, "window_seconds": 6, "tokens": 128, "pieces": 270, "dropout": 0.0},
    }
    return WhisperShape(**small | changes)


def training(**changes) -> WhisperTraining:
    """A few steps on a few clips."""
    short = {"batch": 4, "learning_rate": 0.01, "ctc_weight": 0.5, "checkpoint_steps": 2}
    return WhisperTraining(**{"shape": shape(), "num_cpus": 1, **short, **changes})


def random_whisper(
    directory: Path, texts: Iterable[str] = ("turn on the light",), **changes
) -> str:
    """Write one whose pieces are those of `texts`; its name."""
    create(directory, shape(**changes), texts, seed=0)
    return f"whisper:{directory}"
