"""The decoder: units to text with what is retrieved, several callers' clips in one batch.

The language model runs in the engine's own thread and never on the replica's event loop. It asks
index shards and not the retriever, so that no token pays for a hop through Serve.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from ray.serve import metrics

from mmrag.align import align
from mmrag.config import Retrieves
from mmrag.datastore import Datastore, Description, Segment
from mmrag.decode import Clip, Hypothesis, Retrieval
from mmrag.engine import Decoded, Engine, Statistics
from mmrag.entries import read_entries
from mmrag.index import SECOND, JoinedRetriever, SubsetRetriever
from mmrag.phrases import WINDOW, Phrases
from mmrag.reading import Bank, Reading
from mmrag.records import Retriever, Word
from mmrag.tokens import Tokenized
from mmrag.transcribe import Listener, Writer, longest, words
from mmrag.units import Codebook
from serve import probe
from serve.messages import Found, Listed, Order, Refused, Reply
from serve.model import device, locate
from serve.settings import Settings, Trust

KEPT = 32
"""Datastores and lists whose encoded windows a replica keeps."""


@dataclass(frozen=True)
class Consulted:
    """What one datastore or list offers a clip."""

    source: Retriever
    votes: dict[Retrieves, Retrieval]
    """How neighbours vote, by mode."""
    reading: Reading | None


class Decoder:
    """Holds the language model and the adapter."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.decoder.threads)
        directory = locate(settings)
        self._settings = settings
        self._writer = Writer.load(directory, device(settings))
        self._codebook = Codebook.load(directory / "codebook")
        self._probe = Listener.load(directory, device(settings)).listen(
            [torch.from_numpy(probe.wave())]
        )[0]
        self._engine = Engine(
            self._writer.lm,
            self._writer.vocabulary,
            settings.decoder.rows,
            settings.decoder.threads,
        )
        self._consulted: OrderedDict[tuple[str, str], Consulted] = OrderedDict()
        self._banks: OrderedDict[str, Bank] = OrderedDict()
        self._meters = _Meters()
        clip = self._clip(Order(self._probe), None)
        self._expected = self._engine.submit(clip).future.result().hypothesis.tokens

    async def transcribe(self, order: Order) -> Reply:
        """The transcript of a stretch. Given up when the caller is."""
        consulted = self._consult(order)
        job = self._engine.submit(self._clip(order, consulted), self._settings.decode.agreement)
        try:
            decoded = await asyncio.shield(asyncio.wrap_future(job.future))
        finally:
            job.cancel()
            self._meters.record(self._engine.statistics)
        return await self._reply(order, consulted, decoded)

    async def stream(self, order: Order) -> AsyncIterator[str | Reply]:
        """The transcript piece by piece as it is made, then the whole of it."""
        consulted = self._consult(order)
        loop, news = asyncio.get_running_loop(), asyncio.Queue()

        def hear(tokens: list[int] | None) -> None:
            loop.call_soon_threadsafe(news.put_nowait, tokens)

        clip = self._clip(order, consulted)
        job = self._engine.submit(clip, self._settings.decode.agreement, hear)
        job.future.add_done_callback(lambda _: hear(None))
        told = ""
        try:
            while (tokens := await news.get()) is not None:
                text = self._writer.vocabulary.decode(tokens)
                if text.startswith(told) and text != told:
                    yield text[len(told) :]
                    told = text
            reply = await self._reply(order, consulted, job.future.result())
        finally:
            job.cancel()
            self._meters.record(self._engine.statistics)
        if reply.text.startswith(told) and reply.text != told:
            yield reply.text[len(told) :]
        yield reply

    async def entries(self, spoken: list[Tokenized], kind: str) -> Segment:
        """What utterances become in a datastore, as `read_entries` says."""
        writer = self._writer
        return await asyncio.wrap_future(
            self._engine.call(
                lambda: read_entries(writer.lm, writer.vocabulary, spoken, WINDOW, kind)
            )
        )

    async def describe(self) -> tuple[Description, bool]:
        """What datastores of this model are, and whether it can read them (an adapter)."""
        return self._described(), self._writer.adapter is not None

    async def check_health(self) -> None:
        """Transcribe the probe; RuntimeError if it does not read as it did at the start."""
        job = self._engine.submit(self._clip(Order(self._probe), None))
        try:
            decoded = await asyncio.shield(asyncio.wrap_future(job.future))
        finally:
            job.cancel()
        if decoded.hypothesis.tokens != self._expected:
            raise RuntimeError("the decoder no longer transcribes the probe as it did")

    def _clip(self, order: Order, consulted: Consulted | None) -> Clip:
        decode = self._settings.decode
        reads = consulted is not None and order.mode in ("cross_attention", "both")
        return Clip(
            speech=self._writer.vocabulary.encode_units(order.units),
            limit=longest(order.units, self._codebook.frame_seconds, decode),
            beams=1 if order.temperature > 0 else decode.beams,
            length_penalty=decode.length_penalty,
            temperature=order.temperature,
            retrieval=consulted.votes.get(order.mode) if consulted else None,
            reading=consulted.reading if reads else None,
        )

    def _consult(self, order: Order) -> Consulted | None:
        """What the order's datastore and phrases offer; the same object for the same ones, so that
        clips share searches and encoded windows."""
        if order.mode == "none" or not (order.datastore or order.phrases):
            return None
        if order.mode in ("cross_attention", "both") and self._writer.adapter is None:
            raise Refused(f"retrieval {order.mode} needs an adapter, which this model has not")
        found, listed = order.datastore, order.phrases
        key = (found.key if found else "", listed.key if listed else "")
        if key not in self._consulted:
            self._consulted[key] = self._made(found, listed)
        return _freshen(self._consulted, key)

    def _made(self, found: Found | None, listed: Listed | None) -> Consulted:
        """What a datastore, a request's phrases, or both together offer."""
        if listed is None:
            bank = self._writer.adapter and self._bank(found)
            return _offer(found.retriever, found, bank, found.whole)
        made = self._described()
        phrases = Datastore.of(made, [listed.segment])
        source: Retriever = SubsetRetriever(phrases, np.arange(phrases.entries))
        whole = Phrases(phrases).first_mentions()
        if found is not None:
            source = JoinedRetriever(found.retriever, source)
            small = found.whole is not None
            whole = np.concatenate((found.whole, whole + SECOND)) if small else None
        bank = self._writer.adapter and self._writer.bank(source)
        return _offer(source, found or self._settings.trust, bank, whole)

    def _bank(self, found: Found) -> Bank:
        """The encoded windows of a datastore; entries never change, so they stay when it grows."""
        bank = self._banks.setdefault(found.uid, self._writer.bank(found.retriever))
        bank.source = found.retriever
        return _freshen(self._banks, found.uid)

    def _described(self) -> Description:
        writer = self._writer
        width = writer.lm.config.width
        return Description(width, WINDOW, "l2", "spoken", dict(writer.identity))

    async def _reply(self, order: Order, consulted: Consulted | None, decoded: Decoded) -> Reply:
        heard, vocabulary = decoded.hypothesis, self._writer.vocabulary
        found: tuple[Word, ...] = ()
        if order.evidence or order.timed:
            source = consulted.source if consulted and order.evidence else None
            found = await asyncio.to_thread(words, heard, vocabulary, source)
        if order.timed and found:
            found = await self._timed(order, heard, found)
        return Reply(
            text=vocabulary.decode(heard.tokens),
            words=found,
            tokens=tuple(heard.tokens),
            ends=tuple(end for _, end in vocabulary.word_ends(heard.tokens)) if found else (),
            mean_logp=heard.logp / max(1, len(heard.choices)),
            stopped=heard.stopped,
            missing_shards=decoded.missing_shards,
        )

    async def _timed(
        self, order: Order, heard: Hypothesis, found: tuple[Word, ...]
    ) -> tuple[Word, ...]:
        """Words with their start and end, seconds from the stretch's start."""
        writer, times = self._writer, self._codebook.seconds(order.units)
        speech = writer.vocabulary.encode_units(order.units)
        spans = await asyncio.wrap_future(
            self._engine.call(
                lambda: align(
                    writer.lm, writer.vocabulary, speech, times, heard.tokens, order.audible
                )
            )
        )
        return tuple(
            replace(word, start=float(start), end=float(end))
            for word, (start, end) in zip(found, spans, strict=True)
        )


class _Meters:
    """What the engine did, as Prometheus shows it."""

    def __init__(self) -> None:
        self._seen = Statistics()
        name = "mmrag_decoder_{}".format
        self._counters = {
            "steps": metrics.Counter(name("steps_total"), "Steps of the decoding loop."),
            "rows": metrics.Counter(
                name("rows_total"), "Hypotheses extended; over steps, the mean batch size."
            ),
            "tokens": metrics.Counter(name("tokens_total"), "Tokens of finished transcripts."),
            "clips": metrics.Counter(name("clips_total"), "Finished transcripts."),
            "retrieval_seconds": metrics.Counter(
                name("retrieval_seconds_total"), "Time spent looking things up, seconds."
            ),
        }
        self._gauges = {
            "waiting": metrics.Gauge(name("waiting"), "Clips that wait to join the batch."),
            "decoding": metrics.Gauge(name("decoding"), "Clips in the batch."),
        }

    def record(self, now: Statistics) -> None:
        """Count what happened since the last time."""
        for field, counter in self._counters.items():
            if (more := getattr(now, field) - getattr(self._seen, field)) > 0:
                counter.inc(more)
        for field, gauge in self._gauges.items():
            gauge.set(getattr(now, field))
        self._seen = now


def _offer(
    source: Retriever, trust: Found | Trust, bank: Bank | None, whole: np.ndarray | None
) -> Consulted:
    votes = {"knn": Retrieval(source, trust.knn), "both": Retrieval(source, trust.both)}
    return Consulted(source, votes, bank and Reading(bank, trust.read, source, whole))


def _freshen(kept: OrderedDict, key: object) -> object:
    """The value of `key`, now the last to be dropped."""
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[key]
