"""What an encoder in training gets wrong of clips that nothing is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torchaudio
from torch import Tensor

from mmrag.processes import Alone, Processes
from mmrag.speech.masked import MaskedPrediction
from mmrag.speech.targets import Phones


class HeldOut(NamedTuple):
    """Clips that nothing is trained on."""

    waves: Sequence[Tensor]
    """(T_i,) each, at 16 kHz."""
    phones: Sequence[Sequence[str]]
    """What is said in each."""
    texts: Sequence[str] = ()
    """The same, as it is written."""


def phone_error_rate(
    model: MaskedPrediction,
    clips: HeldOut,
    phones: Phones,
    processes: Processes | None = None,
) -> float:
    """Errors in the phones that the model reads off each frame, a phone that is said.

    Phones that training never met count as errors. Each of several processes reads some clips.
    """

    def read(wave: Tensor) -> list[str]:
        return [phones.names[number - 1] for number in model.read(wave)]

    return _error_rate(read, clips.waves, clips.phones, processes)


def letter_error_rate(
    model: MaskedPrediction, clips: HeldOut, processes: Processes | None = None
) -> float:
    """Errors in the letters that the CTC head spells, a letter that is written.

    Each of several processes reads some clips.
    """
    return _error_rate(model.spell, clips.waves, clips.texts, processes)


def _error_rate(
    read: Callable[[Tensor], Sequence[str]],
    waves: Sequence[Tensor],
    said: Sequence[Sequence[str]],
    processes: Processes | None,
) -> float:
    processes = processes or Alone()
    counts = torch.zeros(2)
    for clip in range(processes.rank, len(waves), processes.count):
        errors = torchaudio.functional.edit_distance(read(waves[clip]), said[clip])
        counts += torch.tensor([errors, len(said[clip])])
    processes.add([counts])
    errors, symbols = counts.tolist()
    return errors / max(1, symbols)
