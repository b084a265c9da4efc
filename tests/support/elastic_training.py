"""A training by one or two workers on two nodes, of which one is removed; what is seen, as JSON.

A program of its own: the process that runs tests is connected to another cluster.
"""

import json
import sys
import threading
import time
from pathlib import Path

import cluster.connection  # noqa: F401 - Ray's environment

# isort: split
import ray
from ray.cluster_utils import Cluster

from cluster.checkpoints import FIELDS, listed
from cluster.progress import records
from cluster.train import CHECKPOINTS, RUN, fit
from jobs.benchmark.train import QUICK, _corpus, _experiment
from mmrag.config import Experiment

STEPS = 30


def elastic(directory: Path) -> Experiment:
    quick = _experiment(directory, QUICK)
    phases = (quick.train.phases[0].model_copy(update={"steps": STEPS}),)
    workers = quick.train.workers.model_copy(update={"count": (1, 2), "num_cpus": 1.0})
    changes = {"phases": phases, "workers": workers, "checkpoint_steps": 5, "max_failures": 3}
    settings = quick.train.model_copy(update=changes | {"precision": "fp32", "zero_stage": 2})
    return quick.model_copy(update={"train": settings})


def workers(directory: Path) -> dict[int, int]:
    """Step of each checkpoint that counts -> how many workers stored it."""
    folder = directory / CHECKPOINTS / RUN
    told = [json.loads((folder / name / FIELDS).read_text()) for name in listed(folder) or ()]
    return {one["step"]: one["workers"] for one in told}


def main(directory: Path) -> dict:
    """How many workers stored the first checkpoint, and the last one; the steps that were made."""
    nodes = Cluster(
        initialize_head=True,
        connect=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000},
    )
    try:
        for _ in range(2):
            last = nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
        nodes.wait_for_nodes()
        _, split = _corpus(directory, QUICK)
        order = (elastic(directory), [split], directory, lambda record: None)
        training = threading.Thread(target=fit, args=order)
        training.start()
        while not workers(directory):
            time.sleep(0.02)
        before = workers(directory)
        nodes.remove_node(last, allow_graceful=False)
        training.join()
        return {
            "before": list(before.values()),
            "after": list(workers(directory).values()),
            "steps": [one["step"] for one in records(directory)],
        }
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
