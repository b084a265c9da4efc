"""Silero's voice activity network, a frame at a time, with the state of a stream outside of it.

The published module keeps the state of one stream inside, behind a lock if several share it. Here
the weights are read once and everybody shares them; a stream is its state, 1.3 KB. It is written
in NumPy because a frame is so little to compute that most of the time goes into calling.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

FRAME = 512
"""Samples that the network looks at a time, at 16 kHz: 32 ms."""
CONTEXT = 64
"""Samples of the frame before that it looks at, too."""
WINDOW, STRIDE = 256, 128
"""Samples of a spectrum, and from one to the next."""
BANDS = WINDOW // 2 + 1
WIDTH = 128
"""Of the state."""
AROUND = 3
"""Places that a convolution looks at."""
PUBLISHED = "silero_vad.jit"
"""The one file of the package with the weights that its detector uses."""


class State(NamedTuple):
    """What a stream leaves behind: the end of its last frame (CONTEXT,), and the network's hidden
    and cell state (WIDTH,)."""

    context: np.ndarray
    hidden: np.ndarray
    cell: np.ndarray


class Network:
    """The weights. Calls from several threads do not disturb each other."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self._spectrum = np.ascontiguousarray(weights["stft.forward_basis_buffer"][:, 0].T)
        self._layers = []
        for number, stride in enumerate((1, 2, 2, 1)):
            name = f"encoder.{number}.reparam_conv"
            weight = weights[f"{name}.weight"].transpose(2, 1, 0)  # places, channels in, and out
            flat = np.ascontiguousarray(weight.reshape(-1, weight.shape[2]))
            self._layers.append((flat, weights[f"{name}.bias"], stride))
        both = np.concatenate([weights[f"decoder.rnn.weight_{kind}"] for kind in ("ih", "hh")], 1)
        self._cell = np.ascontiguousarray(both.T)
        self._cell_bias = weights["decoder.rnn.bias_ih"] + weights["decoder.rnn.bias_hh"]
        self._out = weights["decoder.decoder.2.weight"].ravel()
        self._bias = float(weights["decoder.decoder.2.bias"][0])

    def start(self) -> State:
        """The state of a stream before its first sample."""
        return State(*(np.zeros(size, np.float32) for size in (CONTEXT, WIDTH, WIDTH)))

    def __call__(self, frame: np.ndarray, state: State) -> tuple[float, State]:
        """How likely somebody speaks in a frame (FRAME,) float32 at 16 kHz, and the state after
        it."""
        x = np.concatenate((state.context, frame, frame[-CONTEXT - 1 : -1][::-1]))
        spectra = _windows(x, WINDOW, STRIDE) @ self._spectrum
        x = np.sqrt(spectra[:, :BANDS] ** 2 + spectra[:, BANDS:] ** 2)  # (places, channels)
        for weight, bias, stride in self._layers:
            padded = np.zeros((len(x) + 2, x.shape[1]), np.float32)
            padded[1:-1] = x
            x = _windows(padded.ravel(), AROUND * x.shape[1], stride * x.shape[1]) @ weight
            x = np.maximum(x + bias, 0)
        gates = np.concatenate((x[0], state.hidden)) @ self._cell + self._cell_bias
        takes, keeps, new, shows = gates.reshape(4, WIDTH)
        cell = _sigmoid(keeps) * state.cell + _sigmoid(takes) * np.tanh(new)
        hidden = _sigmoid(shows) * np.tanh(cell)
        speaks = _sigmoid(float(np.maximum(hidden, 0) @ self._out) + self._bias)
        return float(speaks), State(frame[-CONTEXT:].copy(), hidden, cell)


def _windows(x: np.ndarray, width: int, stride: int) -> np.ndarray:
    """The windows of a contiguous x (N,), a `stride` apart, without a copy: (windows, width)."""
    return as_strided(x, ((len(x) - width) // stride + 1, width), (stride * x.itemsize, x.itemsize))


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 0.5 * np.tanh(0.5 * x) + 0.5


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
    return Network({name: weight.detach().numpy().copy() for name, weight in weights.items()})
