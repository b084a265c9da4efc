"""Turns of speech in a stream: when somebody begins to speak, and when they have finished.

What decides is Silero's network (`silero`), with the hysteresis of its VADIterator: speech begins
with frames of at least `threshold`, and is over after frames below it by HYSTERESIS, without one of
at least `threshold` among them, that last `silence_duration_ms`. Knows one stream; nothing of what
is said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.silero import FRAME, network
from mmrag.speech.vad import NOISE_LEVEL

HYSTERESIS = 0.15
"""So far below the threshold lies what nobody speaks in."""
SPOKEN_FRAMES = 3
"""Frames with speech that begin a turn: 96 ms. A click has one or two."""
HEARD_LEVEL = 10 ** (-35 / 20)
"""Root mean square to which the loud parts of a quieter stream are raised: the network is deaf
below some -50 dBFS."""
BLOCK = 128
"""Samples of which one loudness is measured: 8 ms."""
LOUD_BLOCKS = 6
"""The loud parts are as loud as the last of so many of the loudest blocks: 48 ms, longer than a
click."""
REMEMBERED = 5 * SAMPLE_RATE // BLOCK
"""Blocks among which the loud ones are looked for: 5 s. For so long a stream that was loud is not
raised, and who speaks more than 15 dB below what is heard at all is not heard."""


@dataclass(frozen=True)
class Started:
    """Somebody speaks: from `sample` on, which is earlier than the speech by the padding."""

    sample: int


@dataclass(frozen=True)
class Stopped:
    """Nobody speaks any more: `sample` ends the turn, silence included."""

    sample: int
    quiet: int
    """The sample at which the silence began."""


class TurnDetector:
    """One stream of speech at 16 kHz. Its state is some 5 KB, and no other stream touches it; not
    for several threads at once."""

    def __init__(
        self,
        threshold: float = 0.5,
        prefix_padding_ms: int = 300,
        silence_duration_ms: int = 500,
    ) -> None:
        """Raises ValueError for a threshold outside [0, 1] or a negative time.

        A turn ends with the first frame of 32 ms that makes its silence `silence_duration_ms`
        long.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold}: it is a probability, from 0 to 1")
        for name, value in (
            ("prefix_padding_ms", prefix_padding_ms),
            ("silence_duration_ms", silence_duration_ms),
        ):
            if value < 0:
                raise ValueError(f"{name} {value}: it must not be negative")
        self._network = network()
        self._state = self._network.start()
        self._threshold = threshold
        self._padding, self._silence = (
            round(ms * SAMPLE_RATE / 1000) for ms in (prefix_padding_ms, silence_duration_ms)
        )
        self._rest = np.zeros(0, np.float32)
        """What has come and is less than a frame."""
        self._loudness = np.zeros(REMEMBERED, np.float32)
        self._judged = 0
        """Samples of whole frames."""
        self._stopped = 0
        """Where the last turn ended."""
        self._first: int | None = None
        """Where the speech began of which there is not enough yet."""
        self._spoken = 0
        """Frames with speech since then."""
        self._speaking = False
        self._quiet: int | None = None

    @property
    def speaking(self) -> bool:
        """Whether a turn has started that has not stopped."""
        return self._speaking

    @property
    def quiet_since(self) -> int | None:
        """The sample since which nobody has spoken in a turn that has not stopped; None while
        somebody speaks, and between turns. If it goes on, the turn will have ended here."""
        return self._quiet

    def push(self, wave: Tensor | np.ndarray) -> list[Started | Stopped]:
        """The events that the next part (T,) of the stream, float32 at 16 kHz, brings about.

        Samples are counted from the stream's start. However the stream is cut into parts, the
        events are the same. A turn never starts before the last one stopped.
        """
        wave = np.concatenate((self._rest, np.asarray(wave, np.float32)))
        whole = len(wave) // FRAME * FRAME
        self._rest = wave[whole:].copy()
        found = [self._judge(frame) for frame in wave[:whole].reshape(-1, FRAME)]
        return [event for event in found if event is not None]

    def _judge(self, frame: np.ndarray) -> Started | Stopped | None:
        """What the next frame (FRAME,) brings about."""
        likely, self._state = self._network(self._raised(frame), self._state)
        start, self._judged = self._judged, self._judged + FRAME
        if likely >= self._threshold:
            self._quiet = None
            return None if self._speaking else self._speech(start)
        if likely >= max(self._threshold - HYSTERESIS, 0.01):
            return None
        self._first, self._spoken = None, 0
        return self._silent(start) if self._speaking else None

    def _speech(self, start: int) -> Started | None:
        """A frame from `start` on has speech, and no turn has started."""
        if self._first is None:
            self._first = start
        self._spoken += 1
        if self._spoken < SPOKEN_FRAMES:
            return None
        self._speaking = True
        return Started(max(self._stopped, self._first - self._padding))

    def _silent(self, start: int) -> Stopped | None:
        """In a frame from `start` on, in a turn, nobody speaks."""
        if self._quiet is None:
            self._quiet = start
        if self._judged - self._quiet < self._silence:
            return None
        quiet, self._quiet, self._speaking = self._quiet, None, False
        self._stopped = quiet + self._silence
        return Stopped(self._stopped, quiet)

    def _raised(self, frame: np.ndarray) -> np.ndarray:
        """A frame as loud as the network needs it, where the stream is very quiet."""
        place = self._judged // BLOCK % REMEMBERED
        levels = np.sqrt((frame.reshape(-1, BLOCK) ** 2).mean(1))
        self._loudness[(place + np.arange(len(levels))) % REMEMBERED] = levels
        loud = np.partition(self._loudness, -LOUD_BLOCKS)[-LOUD_BLOCKS]
        if NOISE_LEVEL < loud < HEARD_LEVEL:
            return frame * np.float32(HEARD_LEVEL / loud)
        return frame
