"""Whether workers fit on the cluster: asked before they are started, for Ray waits for ever.

Each group of workers is a `Demand`, which knows the settings that decide it. What no node of the
cluster can hold is refused, unless an autoscaler may add nodes: then the user is told what it waits
for. What fits and finds no room yet, since others are at work, is told after a while too.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get

from mmrag.config import Workers

NOTICE_SECONDS = 12.0
"""How long nothing may come of a start before the user is told what it may be waiting for."""
AUTOSCALER_STATUS = b"__autoscaling_status"
"""Where an autoscaler reports to its cluster, in Ray's key-value store."""
_SHARE = 10_000
"""Ray counts resources in ten-thousandths."""


class PlacementError(ValueError):
    """Workers that no cluster node can hold; the message names what there is and the setting."""


@dataclass(frozen=True)
class Demand:
    """`count` workers of so many CPUs and GPUs each, all of which have to be there at once."""

    key: str
    """The setting that decides it, or the section of settings: `tokenize.workers`."""
    count: int
    num_cpus: float
    num_gpus: float = 0.0
    lower: str | None = None
    """What to lower instead of `<key>.num_cpus`, `<key>.num_gpus` and `<key>.count`."""
    counted: str = "count"
    """The key that says how many, where it is not `count`."""

    @classmethod
    def of(cls, key: str, workers: Workers, count: int | None = None) -> Demand:
        """What a section of workers asks for: all of them, or the `count` it can begin with."""
        return cls(key, count or workers.count, workers.num_cpus, workers.num_gpus)

    def __str__(self) -> str:
        each = _amount(self.num_cpus, self.num_gpus) + (" each" if self.count > 1 else "")
        return f"{self.key}: {self.count} worker{'s' if self.count > 1 else ''} of {each}"


def require(*demands: Demand) -> None:
    """See that the cluster this process is connected to can hold all of `demands` at once.

    Raises PlacementError, which names the first setting that is too large, if it cannot, whatever
    else ends; a cluster whose autoscaler may add nodes is given the benefit of the doubt.
    """
    if (problem := problem_with(demands, _nodes())) and not may_grow():
        raise PlacementError(problem)


@contextmanager
def placing(*demands: Demand) -> Iterator[Callable[[], None]]:
    """`require`, and start workers in the block; call what is yielded when one has answered.

    If none has after NOTICE_SECONDS, and there was no room for one at the start, what is missing
    goes to standard error.
    """
    problem = problem_with(demands, _nodes())
    if problem and not may_grow():
        raise PlacementError(problem)
    problem = f"{problem} Its autoscaler may add nodes." if problem else _busy(demands)
    answered = threading.Event()

    def notice() -> None:
        if not answered.wait(NOTICE_SECONDS):
            print(f"waiting: {problem}", file=sys.stderr, flush=True)

    if problem:
        threading.Thread(target=notice, daemon=True).start()
    try:
        yield answered.set
    finally:
        answered.set()


def may_grow() -> bool:
    """Whether an autoscaler looks after this cluster.

    Its nodes then have the type names of its configuration. Where there is none, Ray names each
    node's type after the node.
    """
    own = {f"node_{node['NodeID']}" for node in ray.nodes()}
    return any(name not in own for name in _reported_types() | _node_types())


def _reported_types() -> set[str]:
    """The node types in the report of Ray's first autoscaler, `ray up`'s; none without a report."""
    try:
        report = json.loads(_internal_kv_get(AUTOSCALER_STATUS) or b"{}").get("autoscaler_report")
    except ValueError:
        return set()
    kinds = [(report or {}).get(name) or {} for name in ("active_nodes", "idle_nodes")]
    return {name for kind in kinds for name in kind}


def _node_types() -> set[str]:
    """The type that each node says it is of: KubeRay's and the second autoscaler's tell it."""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)
    except (RayError, RuntimeError, ValueError):  # over ray:// it cannot be asked
        return set()
    return {node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)}


def _nodes() -> list[Mapping[str, float]]:
    """What each living node has in all, by resource."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def problem_with(demands: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why nodes cannot hold all of `demands`, were nothing else there; None if they may.

    `nodes` are what each has in all, by Ray's name of the resource.
    """
    for one in demands:
        room = sum(_room(one, node) for node in nodes)
        if room < one.count:
            return _refusal(one, nodes, room)
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    wanted = [sum(one.count * each for one, each in pairs) for pairs in _each(demands)]
    for name, has, needs in (("num_cpus", cpus, wanted[0]), ("num_gpus", gpus, wanted[1])):
        if round(needs * _SHARE) > round(has * _SHARE):
            listed = "; ".join(map(str, demands))
            return (
                f"{listed}: together {_amount(*wanted)} cannot be placed: this cluster has "
                f"{_amount(cpus, gpus, whole=True)}. Lower {_settings(demands, name)}, or use a "
                "larger cluster (RAY_ADDRESS)."
            )
    return None


def _refusal(one: Demand, nodes: Sequence[Mapping[str, float]], room: int) -> str:
    """What to say of workers of which the nodes hold only `room`."""
    cpus, gpus = (max((node.get(n, 0) for node in nodes), default=0) for n in ("CPU", "GPU"))
    there = f"this cluster's largest node has {_amount(cpus, gpus, whole=True)}"
    if room:
        there = f"this cluster has room for {room} of them"
        setting = one.lower or f"{one.key}.{one.counted}"
    else:
        name = "num_gpus" if one.num_gpus > gpus else "num_cpus"
        setting = one.lower or f"{one.key}.{name}"
    return (
        f"{one} cannot be placed: {there}. Lower {setting}, or use a larger cluster (RAY_ADDRESS)."
    )


def _busy(demands: Sequence[Demand]) -> str | None:
    """What is not free at this moment, though the cluster has it."""
    free, total = ray.available_resources(), ray.cluster_resources()
    for one in demands:
        for name, needs in (("CPU", one.num_cpus), ("GPU", one.num_gpus)):
            if round(needs * _SHARE) > round(free.get(name, 0) * _SHARE):
                return (
                    f"{one}: none has answered yet; {_number(free.get(name, 0))} of this cluster's "
                    f"{_number(total.get(name, 0))} {name}s were free at the start, so it may be "
                    "waiting for other work on the cluster to end"
                )
    return None


def _room(one: Demand, node: Mapping[str, float]) -> int:
    """How many workers of a demand an empty node holds."""
    shares = [
        round(node.get(name, 0) * _SHARE) // round(each * _SHARE)
        for name, each in (("CPU", one.num_cpus), ("GPU", one.num_gpus))
        if each
    ]
    return min(shares, default=one.count)


def _each(demands: Sequence[Demand]) -> tuple[list[tuple[Demand, float]], ...]:
    return [(one, one.num_cpus) for one in demands], [(one, one.num_gpus) for one in demands]


def _settings(demands: Sequence[Demand], name: str) -> str:
    named = [one.lower or f"{one.key}.{name}" for one in demands if getattr(one, name)]
    return " or ".join(dict.fromkeys(named))


def _amount(cpus: float, gpus: float, whole: bool = False) -> str:
    """`2 CPUs and 1 GPU`; `whole` says also how much there is of what there is nothing of."""
    parts = [(cpus, "CPU"), (gpus, "GPU")]
    named = [f"{_number(n)} {unit}{'' if n == 1 else 's'}" for n, unit in parts if n or whole]
    return " and ".join(named) or "0 CPUs"


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")
