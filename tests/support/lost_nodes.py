"""A node of a Ray cluster on this machine is lost as a machine is: with all that runs on it."""

from contextlib import suppress

import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster


def lose(nodes: Cluster, lost: Node) -> None:
    """End a node without a word, and its workers, which otherwise go on for a moment."""
    [raylet] = lost.all_processes["raylet"]
    workers = psutil.Process(raylet.process.pid).children(recursive=True)
    nodes.remove_node(lost, allow_graceful=False)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(workers)
