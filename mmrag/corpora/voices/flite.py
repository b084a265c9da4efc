"""Text to speech with the `flite` program (Debian's package of that name), where it is installed.

Another synthesizer than the one that models of this package are trained on: a test of what they
make of a stranger. Its voices `slt` and `rms` are built from recordings of two people.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from mmrag.speech import audio

PROGRAM = "flite"


def installed() -> bool:
    """Whether the program is there."""
    return shutil.which(PROGRAM) is not None


@cache
def voices() -> tuple[str, ...]:
    """Names of its voices. OSError if the program is missing."""
    listed = subprocess.run([PROGRAM, "-lv"], capture_output=True, text=True, check=True)
    return tuple(listed.stdout.partition(":")[2].split())


def speak(text: str, voice: str) -> np.ndarray:
    """Say `text`: (T,) float32 in [-1, 1] at SAMPLE_RATE.

    Raises OSError if the program is missing, ValueError if it does not have the voice or cannot
    say that.
    """
    if voice not in voices():  # flite would silently take its default one
        raise ValueError(f"flite has no voice {voice!r}, only {', '.join(voices())}")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "speech.wav"
        command = [PROGRAM, "-voice", voice, "-t", text, "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise ValueError(f"flite cannot say {text!r}: {done.stderr.strip()}")
        return audio.read(path).numpy()
