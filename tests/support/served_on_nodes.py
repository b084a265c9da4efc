"""Shards on a Ray cluster of several nodes, one of which is removed; what is seen of it, as JSON.

A program of its own: the process that runs tests is connected to another cluster.
"""

import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import cluster.connection  # noqa: F401 - Ray's environment

# isort: split
import numpy as np
import ray
from lost_nodes import add, head

from cluster.shards import ShardedRetriever, serve_shards
from mmrag.retrieval.datastore import Datastore

CPUS = 0.1
NODES = 3


def main(directory: Path) -> dict:
    """Where replicas are, and what searches find before, while and after a node is removed."""
    nodes = head()
    try:
        workers = {node.node_id: node for node in (add(nodes) for _ in range(NODES))}
        nodes.wait_for_nodes()
        keys = Datastore.open(directory).keys(0, 5)
        seen = {}
        twice = serve_shards(directory, 2, CPUS, owner="twice")
        seen["twice"] = placed(twice)
        single = serve_shards(directory, 1, CPUS, owner="single")
        seen["single"] = placed(single)
        gone = seen["single"][0][0]
        with searching(twice, keys) as with_two, searching(single, keys) as with_one:
            time.sleep(2)
            nodes.remove_node(workers[gone], allow_graceful=False)
            until(lambda: any(with_one["missing"]))
            until(lambda: with_one["missing"][-1] == 0)
            until(lambda: not twice.ping(5))
            time.sleep(2)
        seen |= {"gone": gone, "with_two": with_two, "with_one": with_one}
        seen["moved"] = placed(single)
        seen["nodes"] = sorted(workers)
        return seen
    finally:
        ray.shutdown()
        nodes.shutdown()


def placed(served: ShardedRetriever) -> list[list[str]]:
    """The nodes of each shard's replicas."""

    def node(_: object) -> str:
        return ray.get_runtime_context().get_node_id()

    return [ray.get([one.__ray_call__.remote(node) for one in own]) for own in served._replicas]


@contextmanager
def searching(served: ShardedRetriever, keys: np.ndarray):
    """Searches for the first entries' keys without a pause in the block: what happens meanwhile.

    `missing` are the shards that did not answer, `wrong` the searches with all shards that did not
    find each key's own entry, `errors` what was raised.
    """
    seen: dict[str, list] = {"missing": [], "wrong": [], "errors": []}
    over = threading.Event()

    def search() -> None:
        while not over.is_set():
            try:
                found = served.search(keys, 1)
            except Exception as error:
                seen["errors"].append(repr(error))
                continue
            seen["missing"].append(found.missing_shards)
            if not found.missing_shards and found.distances.any():
                seen["wrong"].append(found.distances.tolist())
            time.sleep(0.01)

    thread = threading.Thread(target=search)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def until(happens) -> None:
    deadline = time.monotonic() + 120
    while not happens():
        if time.monotonic() > deadline:
            raise TimeoutError("it never happens")
        time.sleep(0.1)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
