"""Ray's nodes on this machine, which may be lost as machines are: with all that runs on them.

To be imported once Ray's environment is set (`cluster.connection`).
"""

from contextlib import suppress

import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster

STORE_BYTES = 80_000_000


def head() -> Cluster:
    """A cluster of a head without CPUs, which this process is connected to. Without the dashboard,
    whose port others may have."""
    own = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    return Cluster(initialize_head=True, connect=True, head_node_args=own)


def add(nodes: Cluster) -> Node:
    """A node more, of one CPU."""
    return nodes.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


def lose(nodes: Cluster, lost: Node) -> None:
    """End a node without a word, and its workers, which otherwise go on for a moment."""
    [raylet] = lost.all_processes["raylet"]
    workers = psutil.Process(raylet.process.pid).children(recursive=True)
    nodes.remove_node(lost, allow_graceful=False)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(workers)
