"""Silero's voice activity network, a frame at a time, with the state of a stream outside of it.

The published module keeps the state of one stream inside, behind a lock if several share it. Here
the weights are read once and everybody shares them; a stream is its state, 1.3 KB.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FRAME = 512
"""Samples that the network looks at a time, at 16 kHz: 32 ms."""
CONTEXT = 64
"""Samples of the frame before that it looks at, too."""
WINDOW, STRIDE = 256, 128
"""Samples of a spectrum, and from one to the next."""
WIDTH = 128
"""Of the state."""
PUBLISHED = "silero_vad.jit"
"""The one file of the package with the weights that its detector uses."""


class State(NamedTuple):
    """What a stream leaves behind: the end of its last frame (CONTEXT,), and the network's hidden
    and cell state (1, WIDTH)."""

    context: Tensor
    hidden: Tensor
    cell: Tensor


class Network:
    """The weights. Calls from several threads do not disturb each other."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._spectrum = weights["stft.forward_basis_buffer"].squeeze(1).T.contiguous()
        self._layers = []
        for number, stride in enumerate((1, 2, 2, 1)):
            name = f"encoder.{number}.reparam_conv"
            weight = weights[f"{name}.weight"].flatten(1).T.contiguous()
            self._layers.append((weight, weights[f"{name}.bias"], stride))
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self._cell = [weights[f"decoder.rnn.{name}"] for name in names]
        self._out = weights["decoder.decoder.2.weight"].flatten()
        self._bias = weights["decoder.decoder.2.bias"]

    def start(self) -> State:
        """The state of a stream before its first sample."""
        return State(torch.zeros(CONTEXT), torch.zeros(1, WIDTH), torch.zeros(1, WIDTH))

    @torch.inference_mode()
    def __call__(self, frame: Tensor, state: State) -> tuple[float, State]:
        """How likely somebody speaks in a frame (FRAME,) at 16 kHz, and the state after it."""
        x = torch.cat((state.context, frame, frame[-CONTEXT - 1 : -1].flip(0)))
        real, imaginary = (x.unfold(0, WINDOW, STRIDE) @ self._spectrum).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()  # (frames, bands)
        for weight, bias, stride in self._layers:
            around = functional.pad(x, (0, 0, 1, 1)).unfold(0, 3, stride).flatten(1)
            x = torch.addmm(bias, around, weight).relu()
        hidden, cell = torch.lstm_cell(x, (state.hidden, state.cell), *self._cell)
        speaks = (hidden[0].relu() @ self._out + self._bias).sigmoid()
        return float(speaks), State(frame[-CONTEXT:], hidden, cell)


@cache
def network() -> Network:
    """The one that all streams of this process share."""
    # Importing the package would set the threads of the whole process.
    package = Path(find_spec("silero_vad").origin).parent
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # of the file's format
            warnings.simplefilter("ignore", kind)
        published = torch.jit.load(package / "data" / PUBLISHED, map_location="cpu")
    weights = published._model.state_dict()
    return Network({name: weight.detach().clone() for name, weight in weights.items()})
