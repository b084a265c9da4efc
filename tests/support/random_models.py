"""Models with random weights, small enough for a test and large enough to tell each other apart."""

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from mmrag import artifact
from mmrag.config import Hubert, LanguageModel
from mmrag.decoding.confidence import Calibration
from mmrag.model import pretrained
from mmrag.model.lm import LM
from mmrag.model.vocabulary import EOS, Vocabulary
from mmrag.recogniser import CALIBRATION
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.units import Codebook

ENCODER = Hubert(
    conv_channels=8,
    norm="layer_norm",
    width=16,
    layers=1,
    heads=2,
    feed_forward=16,
    layer=1,
)
Model = TypeVar("Model", bound=nn.Module)


def perturb(model: Model, scale: float = 1 / 3) -> Model:
    """The model with every weight moved by about `scale`, so that each of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def write_models(
    directory: Path,
    shape: LanguageModel,
    vocabulary: Vocabulary,
    talkative: bool = False,
    alphabet: str | None = None,
) -> None:
    """hubert, codebook and lm artifacts, each made from the one before.

    A `talkative` language model does not say the end token at once; with an `alphabet` the encoder
    has a CTC head.
    """
    torch.manual_seed(0)
    with artifact.create(directory / "hubert", "hubert", {}, {}) as draft:
        HubertEncoder.create(ENCODER, seed=0, alphabet=alphabet).save(draft.path)
    hubert = artifact.load(directory / "hubert", "hubert")
    with artifact.create(directory / "codebook", "codebook", {}, {"hubert": hubert}) as draft:
        centroids = np.random.default_rng(0).standard_normal((vocabulary.units, ENCODER.width))
        Codebook(centroids, frame_seconds=0.02).save(draft.path)
    codebook = artifact.load(directory / "codebook", "codebook")
    with artifact.create(directory / "lm", "lm", {}, {"codebook": codebook}) as draft:
        lm = LM(shape, vocabulary.size)
        if talkative:
            with torch.no_grad():
                lm.head.weight[EOS] = -lm.head.weight.sum(0)
        perturb(lm)
        pretrained.save(draft.path, shape, vocabulary, list(lm.state_dict().items()))


def write_calibration(directory: Path, **changes: float) -> Calibration:
    """A confidence calibration of the models in a directory; it is sure of nothing."""
    made = Calibration(**{"bias": -9.0, "own": 1.0, "mean": 1.0, "unclear": 0.5} | changes)
    lm = {"lm": artifact.load(directory / "lm", "lm")}
    with artifact.create(directory / CALIBRATION, CALIBRATION, {}, lm, force=True) as draft:
        made.save(draft.path)
    return made
