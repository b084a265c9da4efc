"""What a training will take, printed before anything is rented: memory, traffic, time and cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from cluster.zero import deepspeed_config
from jobs import stage
from mmrag import terminal
from mmrag.config import ConfigError, Experiment, Train, read
from mmrag.model import plan
from mmrag.model.flops import PEAK_FLOPS
from mmrag.model.plan import CARDS, GIB, Cluster, Partition, Plan
from mmrag.model.vocabulary import SPECIALS

GIGA = 1e9
NODE = 8


@dataclass(frozen=True)
class Case:
    """A way to run the same training, and what it takes."""

    name: str
    settings: Train
    partition: Partition
    plan: Plan


def main(arguments: Sequence[str]) -> None:
    """`python -m jobs.train --plan`: no cluster is started and no weights are loaded."""
    with terminal.command("error"):
        stage.explained(lambda: _main(_parser().parse_args(arguments)))


def _main(asked: argparse.Namespace) -> None:
    experiment = read(asked.config, asked.overrides)
    cases = cases_of(experiment, cluster_of(experiment, asked), asked.context)
    if asked.json:
        stage.console.print_json(json.dumps(as_json(experiment, cases, asked)))
        return
    for table in tables(experiment, cases, asked):
        stage.console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.train --plan", description=__doc__)
    add = parser.add_argument
    add("--plan", action="store_true", help="print this, in place of training")
    add("--config", type=Path, default=stage.CONFIGS / "330m.yaml", help="experiment YAML")
    add("--gpu", choices=CARDS, default="H100-80GB", help="default: %(default)s")
    add("--gpus-per-node", type=int, default=NODE, metavar="N", help="default: %(default)s")
    add("--mfu", type=float, default=0.4, help="share of peak that computing reaches (%(default)s)")
    add("--intranode", type=float, metavar="GB/s", help="a GPU receives from those of its node")
    add("--internode", type=float, metavar="GB/s", help="a node receives from all others")
    add("--storage", type=float, default=1.0, metavar="GB/s", help="a node writes of a checkpoint")
    add("--context", type=int, default=512, help="tokens of a sequence (%(default)s)")
    add("--json", action="store_true", help="the same as one JSON object")
    add("overrides", nargs="*", metavar="key.sub=value")
    return parser


def cluster_of(experiment: Experiment, asked: argparse.Namespace) -> Cluster:
    """The machines that were asked for, with `train.workers.count` GPUs, or the most of a range.

    ConfigError for figures that describe no cluster.
    """
    for name in ("gpus_per_node", "mfu", "storage", "context", "intranode", "internode"):
        if (value := getattr(asked, name)) is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: has to be more than 0")
    if asked.mfu > 1:
        raise ConfigError(f"--mfu {asked.mfu}: a share of the card's peak, at most 1")
    card, node = CARDS[asked.gpu], asked.gpus_per_node
    card = replace(
        card,
        intranode=asked.intranode * GIGA if asked.intranode else card.intranode,
        internode=asked.internode * GIGA / node if asked.internode else card.internode,
    )
    return Cluster(card, experiment.train.workers.most, node, asked.mfu, asked.storage * GIGA)


def cases_of(experiment: Experiment, cluster: Cluster, context: int) -> list[Case]:
    """The configured way first, then others that learn the same: with the fewest workers, if there
    may be more or fewer.

    ConfigError for an experiment that trains no language model of its own.
    """
    if experiment.adapter is not None:
        raise ConfigError(
            "--plan is of a language model's training; this experiment has an adapter"
        )
    vocabulary = len(SPECIALS) + experiment.vocabulary.pieces + experiment.tokenize.units
    settings, stage_number = experiment.train, experiment.train.zero_stage
    given = deepspeed_config(experiment, torch.bfloat16)["zero_optimization"]

    def case(name: str, settings: Train, partition: Partition, cluster: Cluster = cluster) -> Case:
        made = plan.plan(experiment.lm, vocabulary, settings, partition, cluster, context)
        return Case(name, settings, partition, made)

    partition, fewest = Partition.of(stage_number, given), settings.workers.fewest
    cases = [case("as configured", settings, partition)]
    if fewest < settings.workers.most:
        workers = settings.workers.model_copy(update={"count": fewest})
        changed = settings.model_copy(update={"workers": workers})
        name, fewer = f"the fewest workers, {fewest}", replace(cluster, gpus=fewest)
        cases.append(case(name, changed, partition, fewer))
    for every in (None, 1):
        if every != settings.activation_checkpointing:
            name = "all activations kept" if every is None else "activation checkpointing"
            changed = settings.model_copy(update={"activation_checkpointing": every})
            cases.append(case(name, changed, partition))
    node = cluster.gpus_per_node
    others = [("ZeRO-2", 2, 1), ("ZeRO-3", 3, 1)]
    if cluster.nodes > 1:
        others.append((f"ZeRO-3, hpZ {node}", 3, node))
    for name, number, secondary in others:
        if (number, secondary) != (partition.stage, partition.secondary):
            changed = replace(partition, stage=number, secondary=secondary)
            cases.append(case(name, settings, changed))
    return cases


def tables(
    experiment: Experiment, cases: Sequence[Case], asked: argparse.Namespace
) -> Iterator[Table | str]:
    """What is printed, in reading order."""
    made, settings = cases[0].plan, experiment.train
    cluster = cluster_of(experiment, asked)
    peak = PEAK_FLOPS[cluster.card.name]
    nodes = "one node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    yield (
        f"{asked.config}: {made.parameters / 1e9:.2f} B parameters, ZeRO-{settings.zero_stage} on "
        f"{cluster.gpus} x {cluster.card.name} ({nodes} of {cluster.gpus_per_node}), "
        f"{settings.micro_batches} micro-batches of {settings.micro_batch_tokens:,} tokens a step"
    )
    for case in cases:
        if case.plan.gpus != made.gpus:
            yield _range(settings, made, case.plan)
    yield _memory(made)
    yield _traffic(made, cluster)
    yield _time(made, settings, peak)
    yield _schedule(made, settings)
    yield _others(cases)


def _range(settings: Train, most: Plan, fewest: Plan) -> str:
    """What a plan for the most workers does not say of the fewest."""
    verdict = "which fits" if fewest.fits else "which DOES NOT FIT"
    return (
        f"train.workers.count is [{fewest.gpus}, {most.gpus}], and this is planned for "
        f"{most.gpus}. The fewest make the same step in {fewest.step:.2f} s, "
        f"{settings.micro_batches // fewest.gpus} micro-batches each in place of "
        f"{settings.micro_batches // most.gpus}, and a GPU of theirs takes "
        f"{fewest.needed / GIB:.2f} GiB, {verdict}"
    )


def _memory(made: Plan) -> Table:
    title = "Memory of a GPU (in brackets: at another moment than the most)"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("")
    for part in made.resident:
        where = f"{part.about}; on the host" if part.on_host else part.about
        table.add_row(part.name, f"{part.bytes / GIB:.2f}", where)
    table.add_section()
    for part in made.passing:
        table.add_row(part.name, f"{part.bytes / GIB:.2f}", part.about)
    most = max(made.moments, key=lambda part: part.bytes)
    for part in made.moments:
        size = f"{part.bytes / GIB:.2f}"
        table.add_row(part.name, size if part is most else f"({size})", part.about)
    update = made.updating
    table.add_row(update.name, f"({update.bytes / GIB:.2f})", update.about)
    table.add_section()
    table.add_row("used at most", f"{made.used / GIB:.2f}", "")
    table.add_row(
        "with fragmentation", f"{made.needed / GIB:.2f}", f"a margin of {plan.MARGIN:.0%}, assumed"
    )
    verdict = "fits" if made.fits else "DOES NOT FIT"
    table.add_row("the card has", f"{made.memory / GIB:.2f}", verdict)
    return table


def _traffic(made: Plan, cluster: Cluster) -> Table:
    table = Table(title="Traffic of a step", title_justify="left")
    table.add_column("collective")
    table.add_column("GB into a GPU\nfrom its node", justify="right")
    table.add_column("GB into a node\nfrom the others", justify="right")
    for one in made.transfers:
        table.add_row(one.name, f"{one.inside / GIGA:.1f}", f"{one.between / GIGA:.1f}")
    table.add_section()
    card, node = cluster.card, cluster.gpus_per_node
    table.add_row(
        "GB/s of the link", f"{card.intranode / GIGA:.0f}", f"{card.internode * node / GIGA:.1f}"
    )
    return table


def _time(made: Plan, settings: Train, peak: float) -> Table:
    table = Table(title="Time", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    hidden = "overlapped" if made.overlaps else "one after the other"
    written = settings.steps // settings.checkpoint_steps
    rows = {
        "computing, of a step": f"{made.compute:.2f} s",
        "transfers, of a step": f"{made.traffic:.2f} s",
        f"a step ({hidden})": f"{made.step:.2f} s",
        "a step, if nothing overlaps": f"{made.step_at_worst:.2f} s",
        "tokens a second": f"{made.tokens_per_second:,.0f}",
        "tokens a second and GPU": f"{made.tokens_per_second / made.gpus:,.0f}",
        f"MFU (of {peak / 1e12:.0f} TFLOP/s, waiting included)": f"{made.mfu:.0%}",
        "a checkpoint": f"{made.checkpoint / GIGA:.1f} GB",
        "to write it": f"{made.checkpoint_seconds:.0f} s",
        f"all {written} of them": f"{written * made.checkpoint_seconds / 3600:.1f} h",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _schedule(made: Plan, settings: Train) -> Table:
    table = Table(title="The phases", title_justify="left")
    for name in ("phase", "steps", "tokens", "hours of speech", "hours", "GPU-hours"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in settings.phases:
        hours = phase.steps * made.step / 3600
        heard = plan.hours_heard(phase, made.tokens)
        tokens = f"{phase.steps * made.tokens / 1e9:.2f} B"
        row = (f"{phase.steps:,}", tokens, f"{heard:,.0f}", f"{hours:.1f}")
        table.add_row(phase.name, *row, f"{hours * made.gpus:,.0f}")
    table.add_section()
    hours = settings.steps * made.step / 3600
    heard = sum(plan.hours_heard(phase, made.tokens) for phase in settings.phases)
    tokens = f"{settings.steps * made.tokens / 1e9:.2f} B"
    row = (f"{settings.steps:,}", tokens, f"{heard:,.0f}", f"{hours:.1f}")
    table.add_row("all", *row, f"{hours * made.gpus:,.0f}")
    return table


def _others(cases: Sequence[Case]) -> Table:
    table = Table(title="The same training by other ways", title_justify="left")
    table.add_column("way")
    for name in ("GiB a GPU", "fits", "GB into a node", "step, s", "at worst, s", "GPU-hours"):
        table.add_column(name, justify="right")
    for case in cases:
        made = case.plan
        between = sum(one.between for one in made.transfers) / GIGA
        hours = case.settings.steps * made.step * made.gpus / 3600
        row = (f"{made.needed / GIB:.1f}", "yes" if made.fits else "no", f"{between:.0f}")
        row += (f"{made.step:.2f}", f"{made.step_at_worst:.2f}", f"{hours:,.0f}")
        table.add_row(case.name, *row)
    return table


def as_json(
    experiment: Experiment, cases: Sequence[Case], asked: argparse.Namespace
) -> dict[str, Any]:
    """The same figures in bytes and seconds, by case."""
    return {
        "config": str(asked.config),
        "cluster": asdict(cluster_of(experiment, asked)),
        "cases": {case.name: _figures(case) for case in cases},
    }


def _figures(case: Case) -> dict[str, Any]:
    made, settings = case.plan, case.settings
    hours = {phase.name: phase.steps * made.step / 3600 for phase in settings.phases}
    return {
        "gpus": made.gpus,
        "parameters": made.parameters,
        "tokens_a_step": made.tokens,
        "memory": {
            "resident": [part._asdict() for part in made.resident],
            "passing": [part._asdict() for part in made.passing],
            "moments": [part._asdict() for part in made.moments],
            "updating": made.updating._asdict(),
            "used": made.used,
            "needed": made.needed,
            "card": made.memory,
            "fits": made.fits,
        },
        "transfers": [one._asdict() for one in made.transfers],
        "seconds": {
            "compute": made.compute,
            "traffic": made.traffic,
            "step": made.step,
            "step_at_worst": made.step_at_worst,
            "checkpoint": made.checkpoint_seconds,
        },
        "tokens_per_second": made.tokens_per_second,
        "mfu": made.mfu,
        "checkpoint_bytes": made.checkpoint,
        "hours": hours,
        "gpu_hours": {name: value * made.gpus for name, value in hours.items()},
        "hours_of_speech": {
            phase.name: plan.hours_heard(phase, made.tokens) for phase in settings.phases
        },
    }
