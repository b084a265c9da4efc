"""How fast the engine decodes: beside transformers on the same weights, beside what memory can
deliver, and with each of the things that are asked of it besides.

The model has random weights and writes transcripts of a given length, so that both sides write the
same number of tokens. Ways that are compared take turns; a ratio is of what was measured in turn.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.benchmark import grids as tables
from jobs.benchmark import read, scaling, spared
from jobs.benchmark.bandwidth import read_bandwidth, weight_bytes
from jobs.benchmark.grids import Grid, power
from jobs.benchmark.machine import threads
from jobs.benchmark.progress import Progress
from jobs.benchmark.repeats import at_least, at_most, interleaved, ratio, spread, told, worst
from jobs.benchmark.sizes import FULL, QUICK, Sizes
from jobs.benchmark.transformers_peer import TransformersPeer
from jobs.benchmark.workload import (
    Ids,
    Request,
    answered,
    language_model,
    requests,
    stepped,
)
from mmrag.decoding.boost import Boost
from mmrag.decoding.engine import Engine
from mmrag.model.lm import LM, parameter_count
from mmrag.model.prepared import prepare

SEED = 1
OURS, EXACT, GENERATE = "engine, int8", "engine", "generate"
CONTINUOUS = "continuous batching"
SWEPT = 32
"""Requests that batch sizes are tried on, or as many as the batch has."""
BEAMS, ROWS = 4, 16
"""Beams, and requests where beams, phrases and float32 are measured."""
BOOST_WEIGHT, WORD_STARTS = 2.0, 0.5
"""Nats a piece of a phrase; the share of pieces that begin a word."""
PHRASE_PIECES = (2, 6)
TARGETS = {
    "decode.vs_generate": at_least("tokens a second, over transformers' generate at its best", 3),
    "decode.vs_continuous_batching": at_least(
        "tokens a second, over transformers' continuous batching at its best", 1.5
    ),
    "decode.single_vs_generate": at_most("time of a lone request, over generate's", 0.5),
    "decode.vs_roofline": at_least("a lone request's steps: weights read, over bandwidth", 0.6),
    "decode.beam_cost": at_most(f"time with {BEAMS} beams, over one", 2),
    "decode.phrase_overhead": at_most("time with boosted phrases, over none", 1.15),
    "decode.knn_overhead": at_most("time with kNN-LM, over none, mmrag:tiny", 1.1),
    "decode.knn_overhead_sharded": at_most("the same, the index in other processes", 1.25),
    "decode.cross_attention_overhead": at_most(
        "time reading a list of 100, over none, mmrag:tiny", 1.2
    ),
    "decode.cross_attention_overhead_datastore": at_most("the same, a datastore of 75,000", 1.3),
}
__all__ = ["FULL", "QUICK", "Sizes", "grids", "measure", "remarks", "show"]
OTHERS: tuple[Callable[[Path, bool, Progress], dict[str, Any]], ...] = (
    spared.searched,
    spared.overheads,
    read.overheads,
)
"""Measurements of other modules, of fields of TARGETS: called with a directory, whether to be quick
and what to tell."""


class Decoding:
    """The measurements, in order, of one model."""

    def __init__(self, directory: Path, sizes: Sizes, tell: Progress) -> None:
        self.sizes, self.tell = sizes, tell
        self._directory = directory
        torch.set_num_threads(threads())
        self.lm = language_model(sizes.lm, sizes.vocabulary, torch.bfloat16, SEED)
        self.dtype = self.lm.embedding.weight.dtype
        self.peer = TransformersPeer(directory / "peer", self.lm, self.dtype)
        self.exact = copy.deepcopy(self.lm)
        rows = max(sizes.rows)
        tell(
            "weights as this machine multiplies them quickest, steps compiled where that is quicker"
        )
        self.computes = {
            EXACT: str(prepare(self.exact, "auto", rows, sizes.compiled)),
            OURS: str(prepare(self.lm, "int8", rows, sizes.compiled)),
        }
        for way, how in self.computes.items():
            tell(f"  {way}: {how}")
        self.asked = requests(sizes.requests, sizes.prompts, sizes.outputs, sizes.vocabulary, SEED)
        self.alone = sizes.alone or max(self.asked, key=lambda one: one.tokens)

    def measure(self) -> dict[str, Any]:
        """All fields; None for one that nothing here measures."""
        results: dict[str, Any] = dict.fromkeys(TARGETS)
        results |= {
            "parameters": parameter_count(self.sizes.lm, self.sizes.vocabulary),
            "requests": len(self.asked),
            "tokens": _tokens(self.asked),
            "computes": self.computes,
            "quick": self.sizes.quick,
            "reasons": {},
        }
        for part in (self.throughput, self.single, self.roofline, self.beams, self.phrases):
            self.tell(part.__doc__.partition("\n")[0].rstrip("."))
            found = part()
            results["reasons"] |= found.pop("reasons", {})
            results |= found
        self.tell("how time grows")
        results["growth"] = scaling.measure(
            self._directory / "growing", self.lm, self.sizes.axes, self.tell
        )
        for other in OTHERS:
            results |= other(self._directory / other.__module__, self.sizes.quick, self.tell)
        return results

    def throughput(self) -> dict[str, Any]:
        """Many requests at once, beside transformers."""
        swept = [self._swept(OURS, rows, self._engine_once) for rows in self.sizes.rows]
        swept += [self._swept(EXACT, rows, self._exact_once) for rows in self.sizes.rows]
        for batch in self.sizes.batches:
            swept.append(self._swept(GENERATE, batch, self._generate_once))
        reasons = {}
        try:
            for rows in self.sizes.continuous:
                swept.append(self._swept(CONTINUOUS, rows, self._continuous_once))
        except (RuntimeError, ValueError, ImportError) as error:
            self.tell(f"continuous batching: {error}")
            reasons["decode.vs_continuous_batching"] = f"transformers on this machine: {error}"
        best = {one["way"]: one for one in sorted(swept, key=lambda one: one["tokens_per_second"])}
        sizes = {way: one["at_a_time"] for way, one in best.items()}
        seconds = self._all_in_turn(sizes)
        speeds = {
            way: spread([_tokens(self.asked) / one for one in each])
            for way, each in seconds.items()
        }
        results = {
            "swept": swept,
            "throughput": {way: {**speeds[way], "at_a_time": sizes[way]} for way in speeds},
            "decode.vs_generate": ratio(seconds[GENERATE], seconds[OURS]),
            "exact_vs_generate": ratio(seconds[GENERATE], seconds[EXACT]),
            "float32": self._float32(sizes),
            "reasons": reasons,
        }
        if CONTINUOUS in seconds:
            results["decode.vs_continuous_batching"] = ratio(seconds[CONTINUOUS], seconds[OURS])
        return results

    def _all_in_turn(self, sizes: Mapping[str, int]) -> dict[str, list[float]]:
        """Seconds for all requests of each way, with so many at a time."""
        with ExitStack() as stack:
            engine = stack.enter_context(closing(self._engine(sizes[OURS])))
            exact = stack.enter_context(closing(self._engine(sizes[EXACT], self.exact)))
            ways: dict[str, Callable[[], object]] = {
                OURS: lambda: answered(engine, self.asked),
                EXACT: lambda: answered(exact, self.asked),
                GENERATE: lambda: self.peer.generate(self.asked, sizes[GENERATE]),
            }
            if CONTINUOUS in sizes:
                ready = self.peer.continuous(self.asked, sizes[CONTINUOUS])
                ways[CONTINUOUS] = stack.enter_context(ready)
            return interleaved(ways, self.sizes.repeats, self.tell)

    def _swept(
        self, way: str, size: int, seconds: Callable[[Sequence[Request], int], float]
    ) -> dict[str, Any]:
        """The speed of one way with one batch size, on a part of the requests."""
        asked = self.asked[: max(SWEPT, size)]
        speed = _tokens(asked) / seconds(asked, size)
        self.tell(f"  {way}, {size} at a time: {speed:,.0f} tokens a second")
        return {"way": way, "at_a_time": size, "tokens_per_second": speed}

    def _generate_once(self, asked: Sequence[Request], batch: int) -> float:
        return _seconds(lambda: self.peer.generate(asked, batch))

    def _exact_once(self, asked: Sequence[Request], rows: int) -> float:
        return self._engine_once(asked, rows, self.exact)

    def _engine_once(self, asked: Sequence[Request], rows: int, lm: LM | None = None) -> float:
        with closing(self._engine(rows, lm)) as engine:
            answered(engine, asked[:4])  # the first is slow
            return _seconds(lambda: answered(engine, asked))

    def _continuous_once(self, asked: Sequence[Request], rows: int) -> float:
        with self.peer.continuous(asked, rows) as answer:
            return _seconds(answer)

    def _float32(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The same in float32, on a part of the requests; and the share of equal tokens."""
        lm = language_model(self.sizes.lm, self.sizes.vocabulary, torch.float32, SEED)
        peer = TransformersPeer(self._directory / "float32", lm, torch.float32)
        computes = prepare(lm, "float32", sizes[EXACT], self._compiles())
        asked = self.asked[:ROWS]
        with closing(self._engine(sizes[EXACT], lm)) as engine:
            few = self.asked[: self.sizes.alike]
            ours, theirs = answered(engine, few), peer.generate(few, len(few))
            ways = {
                EXACT: lambda: answered(engine, asked),
                GENERATE: lambda: peer.generate(asked, sizes[GENERATE]),
            }
            seconds = interleaved(ways, 1, self.tell)
        return {
            "tokens_per_second": {way: _tokens(asked) / each[0] for way, each in seconds.items()},
            "vs_generate": ratio(seconds[GENERATE], seconds[EXACT]),
            "computes": str(computes),
            "compared": _tokens(few),
            "alike": sum(
                one == other
                for mine, other_ones in zip(ours, theirs, strict=True)
                for one, other in zip(mine, other_ones, strict=True)
            ),
        }

    def single(self) -> dict[str, Any]:
        """A lone request, beside transformers."""
        with closing(self._engine(1)) as engine, closing(self._engine(1, self.exact)) as exact:
            ways = {
                OURS: lambda: answered(engine, [self.alone]),
                EXACT: lambda: answered(exact, [self.alone]),
                GENERATE: lambda: self.peer.generate([self.alone], 1),
            }
            interleaved(ways, 1, lambda _: None)  # the first is slow
            seconds = interleaved(ways, self.sizes.repeats, self.tell)
        times = {way: spread([1e3 * one for one in each]) for way, each in seconds.items()}
        about = {"prompt": len(self.alone.prompt), "tokens": self.alone.tokens}
        found = ratio(seconds[OURS], seconds[GENERATE])
        return {"alone_ms": {**times, **about}, "decode.single_vs_generate": found}

    def roofline(self) -> dict[str, Any]:
        """The steps of a lone request, beside the memory's bandwidth."""
        read, ratios, steps = [], [], []
        for _ in range(self.sizes.repeats):
            read.append(read_bandwidth(self.sizes.bandwidth_bytes))
            _, times = stepped(self.lm, [self.alone], time.perf_counter)
            steps.append(float(np.median(times)))
            ratios.append(weight_bytes(self.lm) / steps[-1] / read[-1])
        return {
            "decode.vs_roofline": spread(ratios),
            "roofline": {
                "weight_bytes": weight_bytes(self.lm),
                "step_ms": spread([1e3 * one for one in steps]),
                "bytes_per_second": spread(read),
            },
        }

    def beams(self) -> dict[str, Any]:
        """Several beams, beside one."""
        asked = self.asked[:ROWS]
        with closing(self._engine(ROWS * BEAMS)) as engine:
            ways = {
                f"{count} beams": lambda count=count: answered(engine, asked, beams=count)
                for count in (1, BEAMS)
            }
            interleaved(ways, 1, lambda _: None)
            seconds = interleaved(ways, self.sizes.repeats, self.tell)
        greedy, several = seconds.values()
        return {"decode.beam_cost": ratio(several, greedy)}

    def phrases(self) -> dict[str, Any]:
        """Boosted phrases, beside none."""
        asked = self.asked[:ROWS]
        with closing(self._engine(ROWS)) as engine:
            ways: dict[str, Callable[[], object]] = {"none": lambda: answered(engine, asked)}
            made = {}
            for count in self.sizes.phrases:
                started = time.perf_counter()
                boost = phrases(count, self.sizes.vocabulary)
                made[f"{count:,} phrases"] = time.perf_counter() - started
                ways[f"{count:,} phrases"] = lambda boost=boost: answered(
                    engine, asked, boost=boost
                )
            interleaved(ways, 1, lambda _: None)
            seconds = interleaved(ways, self.sizes.repeats, self.tell)
        found = {name: ratio(seconds[name], seconds["none"]) for name in made}
        return {"decode.phrase_overhead": worst(found), "phrases_made_seconds": made}

    def _engine(self, rows: int, lm: LM | None = None) -> Engine:
        lm = lm or self.lm
        return Engine(lm, Ids(lm.vocabulary), rows, threads())

    def _compiles(self) -> bool:
        return self.exact.block_step is not None


def phrases(count: int, vocabulary: int) -> Boost:
    """So many phrases of random pieces to favour."""
    random = np.random.default_rng(SEED)
    low, high = PHRASE_PIECES
    lengths = random.integers(low, high + 1, count)
    listed = [random.integers(0, vocabulary, length).tolist() for length in lengths]
    starts = torch.from_numpy(random.random(vocabulary) < WORD_STARTS)
    return Boost(listed, BOOST_WEIGHT, starts)


def measure(directory: Path, sizes: Sizes) -> dict[str, Any]:
    """Everything, below `directory`."""
    return Decoding(directory, sizes, Progress()).measure()


def grids(results: Mapping[str, Any]) -> list[Grid]:
    """What was measured beside the targets."""
    swept = [
        (one["way"], f"{one['at_a_time']}", f"{one['tokens_per_second']:,.0f}")
        for one in results["swept"]
    ]
    best = [
        (way, f"{one['at_a_time']}", told(one, "{:,.0f}"))
        for way, one in results["throughput"].items()
    ]
    wide = results["float32"]
    best += [
        (f"{way}, float32, {ROWS} requests", "as above", f"{speed:,.0f}")
        for way, speed in wide["tokens_per_second"].items()
    ]
    columns = ("", "at a time", "tokens a second")
    lone = results["alone_ms"]
    single = [(way, told(lone[way], "{:.0f}")) for way in (OURS, EXACT, GENERATE)]
    about = f"A lone request, {lone['prompt']} ids in, {lone['tokens']} out"
    listed = results["decode.phrase_overhead"]["each"]
    boosted = [
        (name, told(one), f"{results['phrases_made_seconds'][name]:.2f} s")
        for name, one in listed.items()
    ]
    growth = [
        (
            one["title"],
            power(one["exponent"]),
            _points(one["sizes"], one["ms"]),
            power(one["read_exponent"]),
            _points(one["sizes"], one["read_ms"]),
        )
        for one in results["growth"].values()
    ]
    searched, reads = (
        [
            (
                one["rule"],
                f"{one['searches_per_token']:.2f}",
                "{:.1%} ({:.1%} to {:.1%})".format(*one["wer"]),
                f"{one['changed']} of {one['clips']}",
            )
            for one in results[kind]
        ]
        for kind in ("searches", "reads")
    )
    spares = ("rule", "searches a token", "word error rate", "transcripts changed")
    unspared = [(where, told(one)) for where, one in results["knn_unspared"].items()]
    strides = [(f"{n} tokens", told(one)) for n, one in results["read_for"].items()]
    grown = ("with", "a step as", "ms", "reading the prompts as", "ms")
    return [
        Grid(f"Batch sizes, {SWEPT} requests or a batch", columns, swept),
        Grid(f"{results['requests']} requests waiting at the start", columns, best),
        Grid(about, ("", "ms"), single),
        Grid("Boosted phrases", ("", "time over none", "made in"), boosted),
        Grid("Searches that are spared, mmrag:tiny on its own sentences", spares, searched),
        Grid("A search for every token, mmrag:tiny", ("", "time over none"), unspared),
        Grid("The same of windows that are read, mmrag:tiny on its own sentences", spares, reads),
        Grid("Windows that are read for so many tokens", ("", "time over none"), strides),
        Grid("How time grows", grown, growth),
    ]


def remarks(results: Mapping[str, Any]) -> list[str]:
    """Sentences about the model and the machine, as measured."""
    wide, roof = results["float32"], results["roofline"]
    computes = [f"{way}: {how}." for way, how in results["computes"].items()]
    small = ["Quick: a tiny model, for which the targets are not meant."] * results["quick"]
    return [
        *small,
        f"A model of {results['parameters'] / 1e6:.1f} M parameters with random weights.",
        *computes,
        "Where the weights are exact, the engine has "
        f"{told(results['exact_vs_generate'])} times the tokens a second of generate.",
        "Of transformers, generate has the requests sorted by length, and continuous batching "
        "the attention of torch; both have the batch size that they are fastest with here.",
        f"{wide['alike']} of {wide['compared']} greedy tokens in float32 are those of generate.",
        f"A step of a lone request takes {told(roof['step_ms'])} ms and reads "
        f"{roof['weight_bytes'] / 1e6:,.0f} MB of weights; memory delivers "
        f"{told({k: v / 1e9 for k, v in roof['bytes_per_second'].items()})} GB/s.",
        f"In float32 the engine has {told(wide['vs_generate'])} times the tokens a second of "
        "generate.",
    ]


def show(results: Mapping[str, Any]) -> None:
    """Tables for people."""
    tables.show(grids(results), remarks(results), TARGETS, results)


def _points(sizes: Sequence[int], times: Sequence[float]) -> str:
    return ", ".join(f"{size:,}: {ms:.3g}" for size, ms in zip(sizes, times, strict=True))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _tokens(asked: Sequence[Request]) -> int:
    return sum(one.tokens for one in asked)
