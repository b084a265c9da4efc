"""The same models in one plain process, without a service: `python -m jobs.benchmark.plain`.

What an endpoint is measured against. Callers are threads; each takes the bytes of a recording
through `cutting.segments`, `mmrag.speech.vad`, HuBERT and `mmrag.decoding.engine`, and has its
transcript before it takes the next. An order comes in as a line of JSON, the answers go out as one.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from jobs.benchmark.load import Answer
from mmrag.config import Decode
from mmrag.decoding.beams import beams_for
from mmrag.decoding.decode import Clip
from mmrag.decoding.engine import Engine
from mmrag.model.prepared import prepare
from mmrag.recogniser import Recogniser
from mmrag.records import Units
from mmrag.speech import cutting, vad
from mmrag.speech.audio import SAMPLE_RATE

Listen = Callable[[Tensor], Units]
EACH, TOGETHER = "every caller listens", "one thread listens, what has come meanwhile at once"
"""Ways to turn sound into units; which is faster depends on the machine."""


@dataclass(frozen=True)
class BaselinePlan:
    """What to measure, with which models."""

    model: str
    """A directory with hubert/, codebook/ and lm/."""
    device: str
    """`auto` for a GPU where there is one."""
    decode: dict[str, Any]
    rows: int
    compute: str | None
    """What the language model computes in, as `prepare` takes it."""
    compiled: bool | None
    """Whether its steps are compiled, as `prepare` takes it."""
    decoder_threads: int
    encoder_threads: int
    batch_seconds: float
    """Audio listened to at once, seconds."""
    clips: tuple[str, ...]
    alone: int
    """Requests of a single caller."""
    callers: tuple[int, ...]
    """Numbers of callers to try, each for `seconds`."""
    seconds: float


class Baseline:
    """The models, and a decoder that has many callers."""

    def __init__(self, order: BaselinePlan) -> None:
        torch.set_num_threads(order.encoder_threads)
        self._order = order
        self._decode = Decode(**order.decode)
        device = order.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._recogniser = Recogniser.load(Path(order.model), device)
        prepare(self._recogniser.lm, order.compute, order.rows, order.compiled)
        self._clips = [Path(clip).read_bytes() for clip in order.clips]
        models = self._recogniser.lm, self._recogniser.vocabulary
        self._engine = Engine(*models, order.rows, order.decoder_threads)
        self._waves: SimpleQueue[tuple[Tensor, Future[Units]] | None] = SimpleQueue()
        self._listener = threading.Thread(target=self._listen_together, daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Stop the threads."""
        self._waves.put(None)
        self._listener.join()
        self._engine.close()

    def transcribe(self, data: bytes, listen: Listen) -> str:
        """A recording's transcript."""
        recogniser, texts = self._recogniser, []
        for segment in cutting.segments(data, self._decode.max_seconds):
            if not vad.spoken(segment.wave, self._decode.speech):
                continue
            units = listen(vad.trim(segment.wave)[0])
            speech = recogniser.vocabulary.speech_input(units)
            letters = recogniser.vocabulary.letters(speech)
            clip = Clip(
                speech=speech,
                limit=recogniser.longest(recogniser.seconds(units), self._decode),
                beams=beams_for(self._decode, letters, self._order.rows),
                length_penalty=self._decode.length_penalty,
                ctc_weight=self._decode.ctc_weight,
                ngram=recogniser.ngram,
                ngram_weight=self._decode.ngram_weight,
            )
            heard = self._engine.submit(clip, self._decode.agreement).future.result().hypothesis
            texts.append(recogniser.vocabulary.decode(heard.tokens))
        return " ".join(filter(None, texts))

    def listen_alone(self, wave: Tensor) -> Units:
        """EACH."""
        return self._recogniser.encode([wave])[0]

    def listen_together(self, wave: Tensor) -> Units:
        """TOGETHER."""
        future: Future[Units] = Future()
        self._waves.put((wave, future))
        return future.result()

    def measure(
        self, callers: int, seconds: float, listen: Listen, requests: int | None = None
    ) -> list[Answer]:
        """Callers that transcribe the clips in turn for so long, or so many requests."""
        numbers, answers = itertools.count(), []
        started = time.perf_counter()

        def call() -> None:
            torch.set_num_threads(self._order.encoder_threads)
            while (sent := time.perf_counter() - started) < seconds:
                number = next(numbers)
                if requests is not None and number >= requests:
                    return
                clip = number % len(self._clips)
                text = self.transcribe(self._clips[clip], listen)
                took = time.perf_counter() - started - sent
                answers.append(Answer(sent, took, "200", clip, text))

        threads = [threading.Thread(target=call) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def _listen_together(self) -> None:
        torch.set_num_threads(self._order.encoder_threads)
        most = self._order.batch_seconds * SAMPLE_RATE
        while (first := self._waves.get()) is not None:
            batch, samples = [first], len(first[0])
            while samples < most and not self._waves.empty():
                one = self._waves.get()
                if one is None:
                    self._waves.put(None)
                    break
                batch.append(one)
                samples += len(one[0])
            try:
                heard: Sequence[Units] = self._recogniser.encode([wave for wave, _ in batch])
            except Exception as error:  # the callers', not this thread's
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), units in zip(batch, heard, strict=True):
                future.set_result(units)


def carry_out(order: BaselinePlan) -> dict[str, Any]:
    """Everything an order asks for: `alone`, and `ways`: way to listen -> callers -> answers."""
    plain = Baseline(order)
    ways = {EACH: plain.listen_alone, TOGETHER: plain.listen_together}
    forever = float("inf")
    plain.measure(2, forever, plain.listen_alone, requests=4)  # the first ones are slow
    alone = plain.measure(1, forever, plain.listen_alone, order.alone)
    measured = {
        way: {callers: plain.measure(callers, order.seconds, listen) for callers in order.callers}
        for way, listen in ways.items()
    }
    plain.close()
    return {"alone": alone, "ways": measured}


def main() -> None:
    """Read an order, carry it out, write the answers."""
    measured = carry_out(BaselinePlan(**json.loads(sys.stdin.buffer.readline())))
    json.dump(measured, sys.stdout, default=asdict)


if __name__ == "__main__":
    main()
