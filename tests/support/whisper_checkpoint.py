"""A Whisper of random weights, as small as one can be."""

from collections.abc import Iterable
from pathlib import Path

from mmrag.config import WhisperShape
from mmrag.model.whisper_training import create


def shape(**changes) -> WhisperShape:
    small = {
        **{"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feed_forward": 16},
        **{"mel_bands": 20, "window_seconds": 6, "tokens": 128, "pieces": 270, "dropout": 0.0},
    }
    return WhisperShape(**small | changes)


def random_whisper(
    directory: Path, texts: Iterable[str] = ("turn on the light",), **changes
) -> str:
    """Write one whose pieces are those of `texts`; its name."""
    create(directory, shape(**changes), texts, seed=0)
    return f"whisper:{directory}"
