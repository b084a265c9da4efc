"""How well what was said is found among very many phrases, and what transcripts gain: by a
shortlist, by the sound of a first transcript, and by spotting.

Requests to an assistant about people, places and companies, in voices and with names that the
shipped models never met; the other phrases are names of the same kinds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from rich.console import Console

from jobs.benchmark.targets import Target, compared, table
from mmrag import shipped
from mmrag.config import Decode, Spotting, Synthesize, Workers
from mmrag.corpora import synthetic
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.decoding.spotting import Favoured
from mmrag.decoding.tune import default
from mmrag.recogniser import Recogniser
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.phrases import Phrases, remember
from mmrag.retrieval.retrievers import SubsetRetriever
from mmrag.retrieval.shortlist import SHORTLIST, Shortlist, SoundIndex
from mmrag.score.entities import entity_recall
from mmrag.score.rates import word_error_rate
from mmrag.transcribe import recognise

SEED = 1
LENGTHS = (10, 50, 100, 300)
"""Of shortlists whose recall is measured."""
DECODE = Decode(beams=1, length_penalty=0.6, tokens_per_second=16, max_seconds=30)
SPELLED = DECODE.model_copy(update={"beams": None})
"""With as many beams as an encoder that spells gets."""
progress = Console(stderr=True, highlight=False)
TARGETS = {
    "recall": Target(
        f"said phrases in a shortlist of {LENGTHS[-1]} of 200,000",
        "≥ 0.80",
        lambda r: r >= 0.8,
        "{:.3f}".format,
    ),
    "entity_recall": Target(
        "said phrases in the transcripts, list of 2,000",
        "≥ 0.80",
        lambda r: r >= 0.8,
        "{:.3f}".format,
    ),
    "ms": Target("time a request, of 200,000", "≤ 20 ms", lambda ms: ms <= 20, "{:.1f} ms".format),
    "spotted": Target(
        "said phrases in the transcripts, 2,000 spotted by mmrag:small",
        "≥ 0.80",
        lambda r: r >= 0.8,
        "{:.3f}".format,
    ),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    clips: int
    phrases: tuple[int, ...]
    spoken: int
    """Phrases in the list that requests are transcribed with: all of them are spoken."""


FULL = Sizes(clips=150, phrases=(2_000, 20_000, 200_000), spoken=2_000)
QUICK = Sizes(clips=60, phrases=(2_000, 20_000), spoken=400)


@dataclass(frozen=True)
class Request:
    """What somebody said, and what was heard."""

    text: str
    said: tuple[str, ...]
    wave: torch.Tensor
    heard: str
    units: Any


def measure(directory: Path, sizes: Sizes) -> dict[str, Any]:
    """Everything, below `directory`."""
    torch.set_num_threads(1)
    recogniser = Recogniser.load(shipped.find(shipped.TINY))
    progress.print(f"hearing {sizes.clips} requests without any phrases")
    requests = list(_heard(recogniser, sizes.clips))
    results: dict[str, Any] = {"shortlists": []}
    for size in sizes.phrases:
        progress.print(f"{size:,} phrases")
        results["shortlists"].append(_searched(_list(requests, size), requests))
    progress.print(f"speaking {sizes.spoken:,} phrases and transcribing with them")
    results["transcripts"] = _transcribed(recogniser, requests, sizes.spoken, directory)
    largest = results["shortlists"][-1]
    whole = largest["phrases"] == 200_000
    results["recall"] = largest["recall"][LENGTHS[-1]] if whole else None
    results["ms"] = largest["ms"] if whole else None
    found = [one["entity_recall"] for one in results["transcripts"] if one["way"] == "shortlist"]
    results["entity_recall"] = found[0] if sizes.spoken == 2_000 else None
    results["spots"] = list(_spotted(requests, sizes.phrases))
    found = {one["phrases"]: one["entity_recall"] for one in results["spots"]}
    results["spotted"] = found.get(2_000)
    return results


def _heard(recogniser: Recogniser, count: int) -> Iterator[Request]:
    counts = {"lm": 1, "adapter": 1, "mentions": 1, "dev": 1, "text": 0, "everyday_share": 0}
    workers = Workers(count=1, num_cpus=1)
    planned = synthetic.plan(Synthesize(test=count, workers=workers, **counts), SEED)["test"]
    speaker = Synthesizer()
    waves = [torch.from_numpy(synthetic.render(one, speaker).wave) for one in planned]
    units = [recogniser.encode([wave])[0] for wave in waves]
    decoded = recognise(recogniser, units, DECODE)
    for one, wave, own, found in zip(planned, waves, units, decoded, strict=True):
        heard = recogniser.vocabulary.decode(found.tokens)
        yield Request(one.text, one.entities, wave, heard, own)


def _list(requests: Sequence[Request], size: int) -> list[str]:
    """Everything that is said, and other names up to `size`, in random order."""
    names, draw = synthetic.make_names(SEED), Random(f"{SEED} {size}")
    families = sorted(chain.from_iterable(names.family.values()))
    towns = sorted(chain.from_iterable(names.towns.values()))
    listed = dict.fromkeys(chain.from_iterable(one.said for one in requests))
    while len(listed) < size:
        person = draw.random() < 0.8
        other = f"{draw.choice(names.first)} {draw.choice(families)}" if person else None
        place = f"{draw.choice(towns)} {draw.choice(('', 'road', 'and sons'))}".strip()
        listed[other or place] = None
    every = list(listed)
    draw.shuffle(every)
    return every


def _searched(listed: list[str], requests: Sequence[Request]) -> dict[str, Any]:
    """How often what was said is in shortlists, and how long that takes."""
    speaker = Synthesizer()
    start = time.perf_counter()
    sounds = SoundIndex(listed, speaker.pronounce)
    built = time.perf_counter() - start
    number = {phrase: n for n, phrase in enumerate(listed)}
    places, took = [], []
    for one in requests:
        start = time.perf_counter()
        found = sounds.near(one.heard, LENGTHS[-1])
        took.append(time.perf_counter() - start)
        for phrase in one.said:
            [place] = np.flatnonzero(found == number[phrase]).tolist() or [len(listed)]
            places.append(place)
    recall = {length: float(np.mean(np.array(places) < length)) for length in LENGTHS}
    spread = np.quantile(took, [0.5, 0.95]) * 1000
    return {
        "phrases": len(listed),
        "said": len(places),
        "recall": recall,
        "ms": float(spread[0]),
        "p95_ms": float(spread[1]),
        "build_seconds": built,
    }


def _transcribed(
    recogniser: Recogniser, requests: Sequence[Request], size: int, directory: Path
) -> list[dict[str, Any]]:
    """Word error rate and entity recall without phrases, searching all of them, and with a
    shortlist of them."""
    datastore = remember(
        directory,
        _list(requests, size),
        recogniser.lm,
        recogniser.vocabulary,
        recogniser.keyed_by,
        recogniser.synthesizer(),
    )
    every, phrases = SubsetRetriever(datastore, np.arange(datastore.entries)), Phrases(datastore)
    settings = default(shipped.find(shipped.TINY), datastore)
    windows = phrases.first_mentions()
    reading = AttentionSource(recogniser.window_cache(every), settings.attention, every, windows)
    shortlist = Shortlist.of(phrases, Synthesizer().pronounce, SHORTLIST)
    units, read = [one.units for one in requests], [reading] * len(requests)
    texts = {"none": [one.heard for one in requests]}
    for way, own in (("search", None), ("shortlist", shortlist)):
        found = recognise(recogniser, units, DECODE, shortlist=own, attention_sources=read)
        texts[way] = [recogniser.vocabulary.decode(one.tokens) for one in found]
    said = [one.said for one in requests]
    rows = []
    for way, heard in texts.items():
        wer = word_error_rate([one.text for one in requests], heard)
        rows.append(
            {
                "way": way,
                "phrases": size,
                "wer": [wer.rate, wer.low, wer.high],
                "entity_recall": entity_recall(said, heard).rate,
            }
        )
    return rows


def _spotted(requests: Sequence[Request], sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """How often what was said is spotted by the model that spells, how much else is, how long it
    takes, and what becomes of the transcripts: without phrases, and with lists of `sizes`."""
    speller = Recogniser.load(shipped.find(shipped.DEFAULT))
    units = [speller.encode([one.wave])[0] for one in requests]
    references, said = [one.text for one in requests], [one.said for one in requests]
    for size in (0, *sizes):
        progress.print(f"spotting among {size:,} phrases")
        listed = _list(requests, size) if size else []
        favoured = Favoured(listed, speller.vocabulary, Spotting())
        if size:
            favoured.spotted(units[0].letters)  # spells the list
        found, others, took = [], [], []
        for one, own in zip(requests, units, strict=True):
            start = time.perf_counter()
            names = {entry.text for entry in favoured.spotted(own.letters)}
            took.append(time.perf_counter() - start)
            found += [phrase in names for phrase in one.said]
            others.append(len(names.difference(one.said)))
        decoded = recognise(speller, units, SPELLED, favoured=favoured)
        heard = [speller.vocabulary.decode(one.tokens) for one in decoded]
        wer = word_error_rate(references, heard)
        median, p95 = (np.quantile(took, [0.5, 0.95]) * 1000).tolist()
        yield {
            "phrases": size,
            "recall": float(np.mean(found)),
            "others": float(np.mean(others)),
            "ms": median,
            "p95_ms": p95,
            "wer": [wer.rate, wer.low, wer.high],
            "entity_recall": entity_recall(said, heard).rate,
        }


def show(results: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    lengths = [f"in {length}" for length in LENGTHS]
    found = table("Said phrases in a shortlist", "phrases", *lengths, "a request", "p95", "made in")
    for one in results["shortlists"]:
        shares = [f"{share:.3f}" for share in one["recall"].values()]
        times = f"{one['ms']:.1f} ms", f"{one['p95_ms']:.1f} ms", f"{one['build_seconds']:.1f} s"
        found.add_row(f"{one['phrases']:,}", *shares, *times)
    console.print(found)
    ways = {
        "none": "no phrases",
        "search": "searched for at every word",
        "shortlist": f"the {SHORTLIST} likeliest read",
    }
    heard = table("Transcripts (cross-attention)", "phrases", "", "WER", "said phrases found")
    for one in results["transcripts"]:
        size = f"{one['phrases']:,}" if one["way"] != "none" else "–"
        rate, low, high = (f"{share:.1%}" for share in one["wer"])
        recall = f"{one['entity_recall']:.3f}"
        heard.add_row(size, ways[one["way"]], f"{rate} ({low} to {high})", recall)
    console.print(heard)
    columns = (
        "said ones spotted",
        "others a request",
        "a request",
        "p95",
        "WER",
        "said phrases found",
    )
    spots = table("Spotted by mmrag:small, and its transcripts", "phrases", *columns)
    for one in results["spots"]:
        rate, low, high = (f"{share:.1%}" for share in one["wer"])
        spots.add_row(
            f"{one['phrases']:,}",
            *(f"{one['recall']:.3f}", f"{one['others']:.2f}"),
            *(f"{one['ms']:.1f} ms", f"{one['p95_ms']:.1f} ms"),
            *(f"{rate} ({low} to {high})", f"{one['entity_recall']:.3f}"),
        )
    console.print(spots)
    console.print(compared(TARGETS, results))
