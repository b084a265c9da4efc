"""Whether a cluster has room for the deployments, asked before anything waits for a place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.settings import Replicas, Settings

RESOURCES = {"CPU": ("num_cpus", "CPUs"), "GPU": ("num_gpus", "GPUs")}
"""Ray's name of a resource -> the setting that reserves it, and how people call it."""


class PlacementError(RuntimeError):
    """The deployments cannot be placed; the message says what is missing and what sets it."""


@dataclass(frozen=True)
class Demand:
    """Workers of one kind: `count` of them, each reserving `resources` of one machine."""

    section: str
    """The section of the settings that says so."""
    resources: Mapping[str, float]
    count: int


def demands(settings: Settings) -> list[Demand]:
    """What the deployments reserve from the start."""
    parts: dict[str, Replicas] = {
        "ingress": settings.ingress,
        "encoder": settings.encoder,
        "retriever": settings.retriever,
        "decoder": settings.decoder,
    }
    return [
        Demand(name, {"CPU": part.num_cpus, "GPU": part.num_gpus}, part.min)
        for name, part in parts.items()
    ]


def require(wanted: Sequence[Demand], machines: Sequence[Mapping[str, float]]) -> None:
    """Raises PlacementError if the machines, each with its total resources, have no room.

    Each worker has to fit on a machine, and all of them together into the cluster.
    """
    for resource, (setting, name) in RESOURCES.items():
        largest = max((machine.get(resource, 0.0) for machine in machines), default=0.0)
        for one in wanted:
            if one.resources.get(resource, 0.0) > largest:
                raise PlacementError(
                    f"{one.section}.{setting}={one.resources[resource]:g}: no machine of the "
                    f"cluster has so many {name}, the largest has {largest:g}; set "
                    f"{one.section}.{setting} to at most that"
                )
        total = sum(machine.get(resource, 0.0) for machine in machines)
        needed = {one.section: one.count * one.resources.get(resource, 0.0) for one in wanted}
        if round(sum(needed.values()), 4) > total:
            each = ", ".join(f"{section} {need:g}" for section, need in needed.items() if need)
            keys = ", ".join(f"{section}.{setting}" for section, need in needed.items() if need)
            raise PlacementError(
                f"the service reserves {sum(needed.values()):g} {name} ({each}) and the cluster "
                f"has {total:g}; lower {keys} or their .min"
            )
