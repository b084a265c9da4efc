"""The decoder: units to text with what is retrieved, several callers' clips in one batch.

The language model runs in the engine's own thread and never on the replica's event loop. It
searches the index shards itself, so that no token pays for a hop through Serve.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import torch
from ray.serve import metrics

from mmrag.artifact import ArtifactError
from mmrag.config import RetrievalMode
from mmrag.contents import Lookup, near
from mmrag.decoding.align import align
from mmrag.decoding.beams import beams_for
from mmrag.decoding.decode import Clip, Hypothesis
from mmrag.decoding.engine import Decoded, Engine, Job, Statistics
from mmrag.model.lm import LM
from mmrag.model.prepared import prepare
from mmrag.recogniser import load_decoder, load_encoder
from mmrag.records import Retriever, Transcript, Utterance, Word
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.display import Display
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.phrases import WINDOW, Phrases
from mmrag.retrieval.retrievers import SECOND, JoinedRetriever, SubsetRetriever
from mmrag.retrieval.segment import Description, Segment
from mmrag.retrieval.shortlist import SHORTLIST, Shortlist
from mmrag.retrieval.weights import Weights
from mmrag.retrieval.window_cache import WindowCache
from mmrag.speech.tokenized import Tokenized
from mmrag.transcribe import judged, letters, words
from serve import logs, probe, traces
from serve.gauges import Gauge
from serve.looked_up import RetrievalSources, favour, offer
from serve.messages import (
    DecodeRequest,
    DecodeResult,
    Encoded,
    InvalidRequest,
    ResolvedDatastore,
)
from serve.model import device, language, locate, retrieval_defaults, tuned_below
from serve.pronouncing import Pronouncing
from serve.settings import Settings

log = logging.getLogger("ray.serve")

KEPT = 32
"""Datastores and lists whose encoded windows a replica keeps."""


class Decoder:
    """Holds the language model and the adapter, or a Whisper."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.decoder.threads)
        logs.install(settings.logs)
        self._settings = settings
        loaded = locate(settings), device(settings), language(settings)
        self._models = load_decoder(*loaded, adapted=True)
        self._tuned = tuned_below(settings)
        self._probe = load_encoder(*loaded).encode([torch.from_numpy(probe.wave())])[0]
        chosen = settings.decoder
        if isinstance(self._models.lm, LM):
            made = prepare(self._models.lm, chosen.compute, chosen.rows, chosen.compiled)
            log.info("the language model computes in %s", made)
        self._engine = Engine(
            self._models.lm,
            self._models.vocabulary,
            chosen.rows,
            chosen.threads,
            chosen.cache_tokens,
        )
        self._sources: OrderedDict[tuple[str, str, bool], RetrievalSources] = OrderedDict()
        self._window_caches: OrderedDict[str, WindowCache] = OrderedDict()
        self._shortlists: OrderedDict[str, tuple[str, asyncio.Task[Shortlist]]] = OrderedDict()
        """The last of each datastore or list, and of which of its versions it is."""
        self._pronouncing = Pronouncing()
        self._metrics = _EngineMetrics()
        self._expected = self._transcribed(None)
        self._warm_up()

    def _warm_up(self) -> None:
        """Transcribe the probe in every way that callers' clips are: with others in the batch, with
        something to look up and read, and aligned. What a step does for the first time (memory,
        kernels, compiled shapes) takes long, and is done before anybody waits."""
        models, rows = self._models, self._settings.decoder.rows
        clips = [self._clip(DecodeRequest(self._probe), None) for _ in range(rows)]
        for job in [self._engine.submit(clip) for clip in clips]:
            job.future.result()
        heard = models.vocabulary.decode(self._expected)
        said = Tokenized(Utterance(id="probe", text=heard, document=heard), self._probe)
        lm, vocabulary = models.lm, models.vocabulary
        reading = self._engine.call(lambda: read_entries(lm, vocabulary, [said], WINDOW, "all"))
        try:
            sources = self._made(None, reading.result(), None)
        except ArtifactError as error:  # who looks something up is told
            log.warning("%s", error)
        else:
            self._transcribed(sources, "both" if models.adapter else "knn")
        speech, times = vocabulary.speech_input(self._probe), models.times(self._probe)
        tokens = self._expected
        self._engine.call(lambda: align(lm, vocabulary, speech, times, tokens, None)).result()

    def _transcribed(
        self, sources: RetrievalSources | None, mode: RetrievalMode = "none"
    ) -> list[int]:
        """The probe's tokens."""
        clip = self._clip(DecodeRequest(self._probe, mode=mode), sources)
        return self._engine.submit(clip).future.result().hypothesis.tokens

    async def transcribe(self, request: DecodeRequest) -> DecodeResult:
        """The transcript of a segment. Given up when the caller is."""
        sources = await self._chosen(request)
        handed_in = time.time_ns()
        job = self._engine.submit(self._clip(request, sources), self._settings.decode.agreement)
        try:
            decoded = await asyncio.shield(asyncio.wrap_future(job.future))
        finally:
            job.cancel()
            self._metrics.record(self._engine.statistics)
        _trace(job, handed_in)
        return await self._result(request, sources, decoded)

    async def stream(self, request: DecodeRequest) -> AsyncIterator[str | DecodeResult]:
        """The transcript piece by piece as it is made, then the whole of it."""
        sources = await self._chosen(request)
        loop, news = asyncio.get_running_loop(), asyncio.Queue()

        def report(tokens: list[int] | None) -> None:
            loop.call_soon_threadsafe(news.put_nowait, tokens)

        clip, handed_in = self._clip(request, sources), time.time_ns()
        job = self._engine.submit(clip, self._settings.decode.agreement, report)
        job.future.add_done_callback(lambda _: report(None))
        sent, display = "", sources.display if sources else Display()
        try:
            while (tokens := await news.get()) is not None:
                text = display.settled(self._models.vocabulary.decode(tokens))
                if text.startswith(sent) and text != sent:
                    yield text[len(sent) :]
                    sent = text
            _trace(job, handed_in)
            result = await self._result(request, sources, job.future.result())
        finally:
            job.cancel()
            self._metrics.record(self._engine.statistics)
        text = result.shown().text
        if text.startswith(sent) and text != sent:
            yield text[len(sent) :]
        yield result

    async def entries(self, spoken: list[Tokenized], kind: str) -> Segment:
        """What utterances become in a datastore, as `read_entries` says."""
        models = self._models
        return await asyncio.wrap_future(
            self._engine.call(
                lambda: read_entries(models.lm, models.vocabulary, spoken, WINDOW, kind)
            )
        )

    async def look_up(self, found: ResolvedDatastore, asked: str | Encoded, k: int) -> list[Lookup]:
        """What a datastore finds before each token of a text, or of what is said, as it is
        transcribed without it; InvalidRequest for a text that the model cannot listen for."""
        models, vocabulary = self._models, self._models.vocabulary
        query, speech = asked, None
        if not isinstance(asked, str):
            heard = (await self._alone(DecodeRequest(asked))).hypothesis
            query = [token for token in heard.tokens if token != vocabulary.eos]
            speech = vocabulary.speech_input(asked)
        try:
            return await asyncio.wrap_future(
                self._engine.call(lambda: near(found.retriever, models, query, k, speech))
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from None

    async def describe(self) -> tuple[Description, frozenset[RetrievalMode]]:
        """What datastores of this model are, and the ways in which it uses what it is given."""
        ways: set[RetrievalMode] = {"knn"}
        if self._models.adapter is not None:
            ways |= {"cross_attention", "both"}
        if letters(self._models.vocabulary, self._probe) is not None:
            ways.add("spotting")
        return self._described(), frozenset(ways)

    async def alive(self) -> None:
        """Returns: this replica takes calls."""

    async def check_health(self) -> None:
        """Transcribe the probe; RuntimeError if it does not read as it did at the start."""
        decoded = await self._alone(DecodeRequest(self._probe))
        if decoded.hypothesis.tokens != self._expected:
            raise RuntimeError("the decoder no longer transcribes the probe as it did")

    async def _alone(self, request: DecodeRequest) -> Decoded:
        """A clip transcribed without retrieval. Given up when the caller is."""
        job = self._engine.submit(self._clip(request, None))
        try:
            return await asyncio.shield(asyncio.wrap_future(job.future))
        finally:
            job.cancel()

    def _clip(self, request: DecodeRequest, sources: RetrievalSources | None) -> Clip:
        decode = self._settings.decode
        reads = sources is not None and request.mode in ("cross_attention", "both")
        try:
            beginning = self._models.vocabulary.encode(request.begins)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        speech = self._models.vocabulary.speech_input(request.units)
        heard = self._models.vocabulary.letters(speech)
        beams = beams_for(decode, heard, self._settings.decoder.rows)
        return Clip(
            speech=speech,
            limit=self._models.longest(self._models.seconds(request.units), decode),
            beams=1 if request.output.temperature > 0 else beams,
            length_penalty=decode.length_penalty,
            temperature=request.output.temperature,
            ctc_weight=decode.ctc_weight,
            ngram=self._models.ngram,
            ngram_weight=decode.ngram_weight,
            fallback=() if request.output.temperature > 0 else self._settings.decoder.fallback,
            retrieval=sources.votes.get(request.mode) if sources else None,
            attention=sources.attention if reads else None,
            boost=sources.boost if sources else None,
            beginning=beginning,
        )

    async def _chosen(self, request: DecodeRequest) -> RetrievalSources | None:
        """What the clip looks things up in: everything that its request offers, or a shortlist of
        it, for which it is transcribed without first."""
        sources = await self._sources_of(request)
        if sources is not None and sources.favoured is not None:
            heard = letters(self._models.vocabulary, request.units)
            boost = await asyncio.to_thread(sources.favoured.boost, heard)
            return replace(sources, boost=boost)
        most = request.shortlist
        if most is None:
            most = SHORTLIST if sources is not None and sources.many else 0
        if not most or sources is None:
            return sources
        if sources.phrases is None:
            raise InvalidRequest(
                "shortlist: it is made of a datastore whose documents are phrases, or of context"
            )
        shortlist = replace(await self._shortlist_of(request, sources.phrases), most=most)
        decoded = await self._alone(request)
        text = self._models.vocabulary.decode(decoded.hypothesis.tokens)
        return await asyncio.to_thread(sources.given, shortlist, text, request.mode)

    async def _shortlist_of(
        self, request: DecodeRequest, phrases: Callable[[], Phrases]
    ) -> Shortlist:
        """The sounds of a datastore's phrases, or of a list's; made once a version, in a thread,
        whoever waits for them."""
        found = request.datastore
        place, version = (found.uid, found.key) if found else (request.phrases.key, "")
        if self._shortlists.get(place, (None,))[0] != version:
            pronounce = self._pronouncing.of((found or request.phrases).tenant)
            making = asyncio.to_thread(lambda: Shortlist.of(phrases(), pronounce, SHORTLIST))
            self._shortlists[place] = version, asyncio.create_task(making)
        _, made = _freshen(self._shortlists, place)
        try:
            return await asyncio.shield(made)
        except Exception:
            if self._shortlists.get(place, (None, None))[1] is made:
                del self._shortlists[place]
            raise

    async def _sources_of(self, request: DecodeRequest) -> RetrievalSources | None:
        """What the request's datastore and phrases offer; the same object for the same ones, so
        that clips share searches and encoded windows."""
        if request.mode == "none" or not (request.datastore or request.phrases):
            return None
        found, phrases = request.datastore, request.phrases
        spots = request.mode == "spotting"
        key = (found.key if found else "", phrases.key if phrases else "", spots)
        if key not in self._sources:
            listed = await phrases.segment if phrases else None
            worded = (
                found and found.worded and await asyncio.to_thread(Datastore.open, found.worded)
            )
            display = await asyncio.to_thread(self._display, listed, worded or None)
            unspoken = listed if phrases and phrases.spotted else None
            made = RetrievalSources(None, {}, None)
            if not spots:
                made = self._made(found, None if unspoken else listed, worded or None)
            if spots or unspoken:
                among = found if spots else None, unspoken, self._models.vocabulary
                favoured = await asyncio.to_thread(favour, *among, self._settings.spotting)
                made = replace(made, favoured=favoured)
            made = replace(made, display=display)
            self._sources.setdefault(key, made)
        return _freshen(self._sources, key)

    def _display(self, listed: Segment | None, worded: Datastore | None) -> Display:
        """How the entries of a request and of a datastore are written; the request's first."""
        display, spoken = Display(), self._models.vocabulary.spoken
        for own in (listed and listed.wordings, worded and worded.wordings()):
            display |= Display.of((own or {}).values(), spoken)
        return display

    def _made(
        self, found: ResolvedDatastore | None, listed: Segment | None, worded: Datastore | None
    ) -> RetrievalSources:
        """What a datastore, a request's phrases, or both together offer; `worded` is the datastore
        where any of its documents weighs more or less than others."""
        if listed is not None and not len(listed.tokens):
            listed = None  # all of them weigh nothing
        if found is None and listed is None:
            return RetrievalSources(None, {}, None)
        if listed is None:
            cache = self._models.adapter and self._cache_of(found)
            weights = Weights.of(worded) if worded is not None else None
            offered = offer(found.retriever, found, cache, found.whole, weights)
            if found.phrases is None:
                return offered
            directory = found.phrases
            return replace(
                offered,
                phrases=lambda: Phrases(Datastore.open(directory)),
                many=found.whole is None,
            )
        phrases = Datastore.of(self._described(), [listed])
        source: Retriever = SubsetRetriever(phrases, np.arange(phrases.entries))
        named = Phrases(phrases)
        whole = named.first_mentions()
        weights = Weights.of(phrases) if found is None else Weights.of(worded, phrases)
        if found is not None:
            source = JoinedRetriever(found.retriever, source)
            small = found.whole is not None
            whole = np.concatenate((found.whole, whole + SECOND)) if small else None
        cache = self._models.adapter and self._models.window_cache(source)
        settings = found or retrieval_defaults(self._settings, self._tuned, phrases)
        offered = offer(source, settings, cache, whole, weights)
        if found is not None:
            return offered
        many = len(named.names) > settings.attention.whole
        return replace(offered, phrases=lambda: named, many=many)

    def _cache_of(self, found: ResolvedDatastore) -> WindowCache:
        """The encoded windows of a datastore; entries never change, so they stay when it grows."""
        cache = self._window_caches.setdefault(
            found.uid, self._models.window_cache(found.retriever)
        )
        cache.source = found.retriever
        return _freshen(self._window_caches, found.uid)

    def _described(self) -> Description:
        models = self._models
        return Description(models.lm.width, WINDOW, "l2", "spoken", dict(models.keyed_by))

    async def _result(
        self, request: DecodeRequest, sources: RetrievalSources | None, decoded: Decoded
    ) -> DecodeResult:
        hypothesis, vocabulary = decoded.hypothesis, self._models.vocabulary
        asked = request.output.evidence or request.output.timed
        source = sources.source if sources and request.output.evidence else None
        text = vocabulary.decode(hypothesis.tokens)
        found = await asyncio.to_thread(words, hypothesis, vocabulary, source)
        if sources and sources.boost is not None:
            spelled = letters(vocabulary, request.units)
            found = await asyncio.to_thread(sources.favoured.evidence, found, spelled)
            if not request.output.evidence:
                found = tuple(replace(word, source=None) for word in found)
        heard = Transcript(text, found)
        heard = judged(heard, self._models.calibration, self._settings.decode)
        found = heard.words if asked else ()
        if request.output.timed and found:
            found = await self._timed(request, hypothesis, found)
        return DecodeResult(
            text=heard.text,
            words=found,
            tokens=tuple(hypothesis.tokens),
            ends=tuple(end for _, end in vocabulary.word_ends(hypothesis.tokens)) if found else (),
            confidence=heard.confidence,
            unclear=heard.unclear,
            mean_logp=hypothesis.mean_logp,
            stopped=hypothesis.stopped,
            missing_shards=decoded.missing_shards,
            logps=tuple(choice.logp for choice in hypothesis.choices[: len(hypothesis.tokens)]),
            heard=len(request.units),
            language=getattr(request.units, "language", None),
            display=sources.display.among(heard.text.split()) if sources else Display(),
        )

    async def _timed(
        self, request: DecodeRequest, hypothesis: Hypothesis, found: tuple[Word, ...]
    ) -> tuple[Word, ...]:
        """Words with their start and end, seconds from the segment's start."""
        lm, vocabulary = self._models.lm, self._models.vocabulary
        times = self._models.times(request.units)
        speech = vocabulary.speech_input(request.units)
        tokens, audible = hypothesis.tokens, request.audible
        spans = await asyncio.wrap_future(
            self._engine.call(lambda: align(lm, vocabulary, speech, times, tokens, audible))
        )
        return tuple(
            replace(word, start=float(start), end=float(end))
            for word, (start, end) in zip(found, spans, strict=True)
        )


class _EngineMetrics:
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
            "waiting": Gauge(name("waiting"), "Clips that wait to join the batch."),
            "decoding": Gauge(name("decoding"), "Clips in the batch."),
        }

    def record(self, now: Statistics) -> None:
        """Count what happened since the last time."""
        for name, counter in self._counters.items():
            if (more := getattr(now, name) - getattr(self._seen, name)) > 0:
                counter.inc(more)
        for name, gauge in self._gauges.items():
            gauge.set(getattr(now, name))
        self._seen = now


def _trace(job: Job, handed_in: int) -> None:
    """What a clip's time went to, in a trace of its request."""
    tokens = len(job.future.result().hypothesis.tokens)
    traces.record("queue", handed_in, job.begun)
    traces.record("steps", job.begun, tokens=tokens)


def _freshen(kept: OrderedDict, key: object) -> object:
    """The value of `key`, now the last to be dropped."""
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[key]
