"""Sound as browsers, phones and pipes leave it, made with FFmpeg's encoders."""

import io
import wave
from fractions import Fraction

import av
import numpy as np


class Pipe:
    """What a program writes into a pipe: it cannot go back to say how long it became."""

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes) -> int:
        self.written += data
        return len(data)


def coded(
    samples: np.ndarray,
    rate: int,
    format: str,
    codec: str,
    pipe: bool = False,
    picture: bool = False,
    bit_rate: int | None = None,
    **options: str,
) -> bytes:
    """Mono `samples` (T,) as FFmpeg writes them, into a pipe or with a film (`picture`).

    `options` are the muxer's.
    """
    target = Pipe() if pipe else io.BytesIO()
    with av.open(target, "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "mono"
        if bit_rate:
            stream.bit_rate = bit_rate
        if picture:
            film = container.add_stream("mpeg4", rate=10)
            film.width = film.height = 64
            for number in range(len(samples) * 10 // rate):
                grey = np.full((64, 64, 3), number % 255, np.uint8)
                container.mux(film.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            container.mux(film.encode(None))
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[None].astype(np.float32)), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(
            format=stream.format, layout="mono", rate=rate, frame_size=stream.frame_size or None
        )
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return bytes(target.written) if pipe else target.getvalue()


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    """Mono `samples` (T,) as 16-bit WAV."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return stream.getvalue()
