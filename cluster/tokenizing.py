"""From audio to units over pools of workers: read and decode, encode in batches, assign, write.

What travels to the first of them are the names of recordings. Where an accelerator encodes these
are separate operators of a Ray Data pipeline: processes on the machines' cores decode, a part's
waves travel through the object store, whose bytes bound how far they are ahead, the accelerator's
process encodes and assigns, and others write. Where the same cores decode and encode, one process
does all of it: threads decode the recordings that come next while its encoder is at one batch, and
another thread finds the units of the batch before. Both make the same parts.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.clips import Clips, open_ahead
from cluster.parts import Operator, Part, Pool, parts
from cluster.rejections import write_rejections
from mmrag.config import Tokenize, Workers
from mmrag.model.precision import has_bf16
from mmrag.records import Rejection, Timed, Utterance
from mmrag.speech import audio, cutting
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.targets import Phones
from mmrag.speech.tokenized import Count, Tokenized, count_part, read_part, write_part
from mmrag.speech.units import Codebook, collapse, expand
from mmrag.storage import Location

GATHERED = 4
"""Batches' worth of clips that are sorted by length before they are encoded."""
DECODERS = 4
"""Processes that decode for each that encodes, where nothing is said of them."""
WRITING = Workers(count=1, num_cpus=0.1)
"""Who writes parts: a thousandth of the audio's bytes."""
COMPARED_SECONDS = 60.0
"""Audio that each worker encodes in float32 as well, to tell what bfloat16 changes."""
TRIES = 3
"""How often a batch is encoded to tell whether a compiled encoder is the faster one."""
AT_ONCE = 2
"""Parts in an encoder's process: one is unpacked, or packed, while another is encoded."""


def device() -> str:
    """Where this worker computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def separate(settings: Tokenize) -> bool:
    """Whether decoding, encoding and writing have processes of their own.

    By default where the encoder has an accelerator: cores that also encode gain nothing by it.
    """
    if settings.operators == "auto":
        return settings.workers.num_gpus > 0
    return settings.operators == "separate"


def operators(
    settings: Tokenize, hubert: Location, codebook: Location, directory: Path, frames: Frames
) -> list[Operator]:
    """What makes of utterances parts in `directory`, and answers with a `WrittenPart` of each."""
    load: dict[str, Any] = {"hubert": hubert, "codebook": codebook, "settings": settings}
    if not separate(settings):
        return [(EncodeUnits, {**load, "directory": directory})]
    count = DECODERS * settings.workers.count
    decoders = settings.decoders or Workers(count=count, num_cpus=1)
    key = "tokenize.decoders"
    return [
        (DecodeClips, {"settings": whole_frames(settings, frames)}, Pool(decoders, key)),
        (EncodeClips, load, Pool(settings.workers, "tokenize.workers", AT_ONCE)),
        (WriteUnits, {"directory": directory, "frames": frames}, Pool(WRITING, key)),
    ]


class EncodeFeatures:
    """Utterances -> HuBERT features (N, D) of all of them together, float16: to fit a codebook.

    Clips that cannot be read are passed over; long ones are heard as far as `max_seconds`.
    """

    def __init__(self, hubert: Location, settings: Tokenize) -> None:
        self._encoder = HubertEncoder.load(hubert).to(device()).eval()
        self._settings = whole_frames(settings, Frames(self._encoder.field, self._encoder.hop))

    def __call__(self, part: Part[Utterance]) -> np.ndarray:
        waves = []
        for one in part.work:
            with suppress(audio.AudioError):
                waves.append(self._open(one))
        if not waves:
            return np.empty((0, 0), np.float16)
        features = self._encoder.features(waves)
        return np.concatenate([one.cpu().numpy() for one in features]).astype(np.float16)

    def _open(self, one: Utterance) -> torch.Tensor:
        limits = self._settings
        wanted = audio.span_of(one)
        with closing(
            cutting.segments(one.audio, limits.max_seconds, limits.min_seconds, wanted)
        ) as segments:
            return next(segments).wave


@dataclass(frozen=True)
class Frames:
    """An encoder's frames: how many samples one sees, and from one to the next."""

    field: int
    hop: int


def whole_frames(settings: Tokenize, frames: Frames) -> Tokenize:
    """The settings, by which no clip is shorter than what the encoder sees in one frame."""
    least = max(settings.min_seconds, frames.field / audio.SAMPLE_RATE)
    return settings.model_copy(update={"min_seconds": least})


PhoneCounts = Counter[tuple[int, str]]
"""In how many frames a unit stands for a phone, "" where none is said."""


@dataclass(frozen=True)
class Agreement:
    """Frames that have the same unit in bfloat16 and in float32, of so many."""

    alike: int = 0
    frames: int = 0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.alike + other.alike, self.frames + other.frames)


NOT_COMPARED = Agreement()


@dataclass(frozen=True)
class WrittenPart:
    """What is known of a part that was written."""

    name: str
    count: Count
    phones: PhoneCounts = field(default_factory=Counter)
    agreement: Agreement = NOT_COMPARED

    @classmethod
    def of(
        cls,
        name: str,
        heard: Sequence[Tokenized],
        said: Sequence[Utterance],
        frames: Frames,
        agreement: Agreement = NOT_COMPARED,
    ) -> WrittenPart:
        """`heard` is what the part holds, `said` what it was made of."""
        spoken = [one for one in heard if one.units is not None]
        count = Count(
            utterances=len(heard),
            seconds=math.fsum(one.utterance.duration for one in spoken),
            units=sum(len(one.units) for one in spoken),
        )
        timed = {one.id: one.phones for one in said if one.phones}
        known = [(one, timed[one.utterance.id]) for one in spoken if one.utterance.id in timed]
        return cls(name, count, _phone_counts(known, frames), agreement)


def _phone_counts(
    known: Sequence[tuple[Tokenized, Sequence[Timed]]], frames: Frames
) -> PhoneCounts:
    if not known:
        return Counter()
    phones = Phones([timed for _, timed in known]).framed(frames.field, frames.hop)
    names = ["", *phones.names]
    counts: PhoneCounts = Counter()
    for number, (one, _) in enumerate(known):
        ids = expand(one.units)
        classes = phones[number].numpy()[: len(ids)]
        classes = np.pad(classes, (0, len(ids) - len(classes)))
        pairs = zip(ids.tolist(), classes.tolist(), strict=True)
        counts.update((unit, names[phone]) for unit, phone in pairs)
    return counts


@dataclass(frozen=True)
class FindWritten:
    """A part of utterances -> what is known of it if its file is there already, else None."""

    directory: Path
    frames: Frames

    def __call__(self, part: Part[Utterance]) -> WrittenPart | None:
        path = self.directory / f"{part.name}.parquet"
        if not path.exists():
            return None
        if not any(one.phones for one in part.work):
            return WrittenPart(part.name, count_part(path))
        return WrittenPart.of(part.name, list(read_part(path)), part.work, self.frames)


class UnitEncoder:
    """Waves to units: an encoder and its codebook, in the format that the settings name."""

    def __init__(self, hubert: Location, codebook: Location, settings: Tokenize) -> None:
        self._encoder = HubertEncoder.load(hubert).to(device()).eval()
        self._codebook = Codebook.load(codebook)
        fast = has_bf16(self._encoder.device) if settings.precision == "auto" else False
        self._bf16 = fast or settings.precision == "bf16"
        self._compared = 0.0
        self._try = settings.compile == "auto" and device() == "cuda"
        self._compiled = False
        self._eager: Callable[[], Any] = nullcontext
        """What to encode in where layers that are compiled run as they were."""
        self.frames = Frames(self._encoder.field, self._encoder.hop)

    def features(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """Of each wave (T_i,), (F_i, D), as one batch."""
        if self._try:
            self._compiled, self._try = self._compiled_wins(waves), False
        return self._encode(waves, self._compiled, self._bf16)

    def _encode(self, waves: Sequence[Tensor], compiled: bool, bf16: bool) -> list[Tensor]:
        stance = nullcontext() if compiled else self._eager()
        with stance, torch.autocast(self._encoder.device.type, torch.bfloat16, enabled=bf16):
            return self._encoder.features(waves)

    def _compiled_wins(self, waves: Sequence[Tensor]) -> bool:
        """Compile the encoder; whether it is the faster for it, of a few tries on a batch."""
        self._encoder.compile_layers()
        self._eager = partial(torch.compiler.set_stance, "force_eager")
        seconds = {}
        try:
            for compiled in (True, False):
                self._seconds(waves, compiled)
                seconds[compiled] = min(self._seconds(waves, compiled) for _ in range(TRIES))
        except RuntimeError:  # no compiler for this accelerator: eagerly it works
            return False
        return seconds[True] < seconds[False]

    def _seconds(self, waves: Sequence[Tensor], compiled: bool) -> float:
        started = time.perf_counter()
        features = self._encode(waves, compiled, self._bf16)
        torch.cat(features).sum().item()  # waits for the accelerator
        return time.perf_counter() - started

    def assign(self, clips: Clips, features: Sequence[Tensor]) -> list[Tokenized]:
        """All frames of a batch in one search, and with them what a CTC head hears."""
        ids = self._codebook.assign(torch.cat(list(features)).float())
        ends = np.cumsum([len(one) for one in features])[:-1]
        heard = zip(np.split(ids, ends), self._encoder.letters(features), strict=True)
        units = [replace(collapse(own), letters=letters) for own, letters in heard]
        return [
            Tokenized(replace(said, duration=len(wave) / audio.SAMPLE_RATE), own)
            for (said, wave), own in zip(clips, units, strict=True)
        ]

    def compare(self, clips: Clips, features: Sequence[Tensor]) -> Agreement:
        """What float32 says of the batch's first clip, as long as COMPARED_SECONDS have not been
        compared yet; nothing where float32 is what is encoded in."""
        if not self._bf16 or self._compared >= COMPARED_SECONDS:
            return NOT_COMPARED
        [(_, wave), *_] = clips
        self._compared += len(wave) / audio.SAMPLE_RATE
        exact = self._encode([wave], False, False)
        rough, true = (self._codebook.assign(one[0].float()) for one in (features, exact))
        return Agreement(int((rough == true).sum()), len(true))


class EncodeUnits:
    """Utterances with audio -> one Parquet part with their units, and what was rejected.

    The clips stand by length, those of one length in the order of the part.
    """

    def __init__(
        self, hubert: Location, codebook: Location, settings: Tokenize, directory: Path
    ) -> None:
        self._encode_with(UnitEncoder(hubert, codebook, settings), settings, directory)

    def _encode_with(self, encoder: UnitEncoder, settings: Tokenize, directory: Path) -> None:
        self._encoder = encoder
        self._settings = whole_frames(settings, encoder.frames)
        self._write = WriteUnits(directory, encoder.frames)

    def __call__(self, part: Part[Utterance]) -> WrittenPart:
        readers = torch.get_num_threads()
        rejected: list[Listed] = []
        behind: list[tuple[list[Place], Future[list[Tokenized]]]] = []
        agreement = NOT_COMPARED
        ready = batches(part.work, self._settings, readers, rejected)
        with ThreadPoolExecutor(1) as assigning, closing(ready):
            for batch in ready:
                places, clips = [place for place, _ in batch], [clip for _, clip in batch]
                features = self._encoder.features([wave for _, wave in clips])
                agreement += self._encoder.compare(clips, features)
                behind.append((places, assigning.submit(self._encoder.assign, clips, features)))
        found = [(places, units.result()) for places, units in behind]
        return self._write(EncodedPart.of(part, found, rejected, agreement))


class DecodeClips:
    """Utterances with audio -> their clips' waves, in the batches that they are encoded in."""

    def __init__(self, settings: Tokenize) -> None:
        self._settings = settings

    def __call__(self, part: Part[Utterance]) -> DecodedPart:
        rejected: list[Listed] = []
        ready = list(batches(part.work, self._settings, torch.get_num_threads(), rejected))
        placed = list(chain.from_iterable(ready))
        waves = [wave.numpy() for _, (_, wave) in placed]
        return DecodedPart(
            part,
            rejected,
            samples=np.concatenate(waves) if waves else np.empty(0, np.float32),
            clips=[(place, said, len(wave)) for place, (said, wave) in placed],
            batches=list(map(len, ready)),
        )


@dataclass(frozen=True)
class DecodedPart:
    """A part's clips: `samples` of all of them, one after the other, and what they are."""

    part: Part[Utterance]
    rejected: list[Listed]
    samples: np.ndarray
    clips: list[tuple[Place, Utterance, int]]
    """Where each comes in the part, what is said in it, its samples."""
    batches: list[int]
    """How many clips are encoded together."""

    def placed(self) -> Iterator[list[Placed]]:
        """The batches again."""
        ends = np.cumsum([0, *(samples for *_, samples in self.clips)]).tolist()
        waves = (torch.from_numpy(self.samples[start:end]) for start, end in pairwise(ends))
        clips = ((place, (said, next(waves))) for place, said, _ in self.clips)
        for count in self.batches:
            yield list(islice(clips, count))


class EncodeClips:
    """Decoded clips -> the same with their units."""

    def __init__(self, hubert: Location, codebook: Location, settings: Tokenize) -> None:
        self._encode_with(UnitEncoder(hubert, codebook, settings))

    def _encode_with(self, encoder: UnitEncoder) -> None:
        self._encoder = encoder
        self._encoding = threading.Lock()

    def __call__(self, decoded: DecodedPart) -> EncodedPart:
        with self._encoding:
            found, agreement = [], NOT_COMPARED
            for batch in decoded.placed():
                places, clips = [place for place, _ in batch], [clip for _, clip in batch]
                features = self._encoder.features([wave for _, wave in clips])
                agreement += self._encoder.compare(clips, features)
                found.append((places, self._encoder.assign(clips, features)))
        return EncodedPart.of(decoded.part, found, decoded.rejected, agreement)


@dataclass(frozen=True)
class EncodedPart:
    """A part as it is to be written."""

    name: str
    said: list[Utterance]
    heard: list[Tokenized]
    rejected: list[Rejection]
    agreement: Agreement

    @classmethod
    def of(
        cls,
        part: Part[Utterance],
        found: Sequence[tuple[list[Place], list[Tokenized]]],
        rejected: Sequence[Listed],
        agreement: Agreement,
    ) -> EncodedPart:
        """Of batches in whatever order: what nobody spoke first, then clips by their places."""
        placed = [pair for places, own in found for pair in zip(places, own, strict=True)]
        placed.sort(key=itemgetter(0))
        silent = [Tokenized(one, None) for one in part.work if one.audio is None]
        unheard = [one for _, some in sorted(rejected, key=itemgetter(0)) for one in some]
        heard = [*silent, *(one for _, one in placed)]
        return cls(part.name, part.work, heard, unheard, agreement)


class WriteUnits:
    """Encoded clips -> one Parquet part, and beside it the list of what was rejected."""

    def __init__(self, directory: Path, frames: Frames) -> None:
        self._directory = directory
        self._frames = frames

    def __call__(self, encoded: EncodedPart) -> WrittenPart:
        path = self._directory / f"{encoded.name}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_rejections(path.with_name(f".{path.stem}.rejected.jsonl"), encoded.rejected)
        write_part(path, encoded.heard)
        return WrittenPart.of(
            encoded.name, encoded.heard, encoded.said, self._frames, encoded.agreement
        )


Place = tuple[int, int, int]
"""Where a clip comes in its part: by its samples, its recording's number, its own in that."""
Placed = tuple[Place, tuple[Utterance, Tensor]]
Listed = tuple[int, list[Rejection]]
"""A recording's number, and what of it was rejected."""


def batches(
    said: Sequence[Utterance], settings: Tokenize, readers: int, rejected: list[Listed]
) -> Iterator[list[Placed]]:
    """Clips of about one length, `batch_seconds` together, decoded ahead by so many threads; adds
    to `rejected` on the way."""
    limit = settings.batch_seconds * audio.SAMPLE_RATE
    waiting: list[Placed] = []
    samples = 0
    with closing(open_ahead([one for one in said if one.audio], settings, readers)) as opened:
        for number, clips, unread in opened:
            rejected.append((number, unread))
            for index, clip in enumerate(clips):
                waiting.append(((len(clip[1]), number, index), clip))
                samples += len(clip[1])
            if samples >= GATHERED * limit:
                yield from _by_length(waiting, limit)
                waiting, samples = [], 0
        yield from _by_length(waiting, limit)


def _by_length(placed: list[Placed], limit: float) -> Iterator[list[Placed]]:
    """Batches of at most `limit` samples, sorted."""
    placed = sorted(placed, key=itemgetter(0))
    for part in parts(placed, lambda one: one[0][0], limit):
        yield part.work
