"""The service on a Ray cluster of three nodes, of which one is lost while callers are being served;
what they see, as JSON.

A program of its own: the process that runs tests is connected to another cluster.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cluster.connection  # noqa: F401 - Ray's environment

# isort: split
import ray
import requests
from lost_nodes import add, head, lose
from ray import serve

from cluster.ports import free_ports
from cluster.shards import NAMESPACE
from serve.app import build

APPLICATION = "on-nodes"
NODES = 3
CALLERS = 4
SECONDS = 120
"""No answer may take longer."""
PATIENCE = 300
"""Seconds for the service to start, or to be whole again."""
STORE = "names"
TWICE = {"min": 2, "max": 2, "drain_s": 2}
GIVEN = {
    "model": "mmrag:tiny",
    "limits": {"requests": 32, "timeout_seconds": SECONDS},
    "decode": {"max_seconds": 4},
    "ingress": TWICE,
    "encoder": TWICE | {"num_cpus": 0.1},
    "retriever": TWICE
    | {"shard_replicas": 2, "pool": {"actors": 1, "entries": 0, "memory_mb": 256}},
    "decoder": TWICE | {"num_cpus": 0.6, "compiled": False},
}
"""Two replicas of each part and of each shard; no node has room for two decoders."""


def main(directory: Path, clip: Path, name: str) -> dict[str, Any]:
    """Where the parts are, and what callers who send `clip`, some with a datastore of `name`, are
    answered before, while and after a node is lost."""
    nodes = head()
    try:
        workers = {node.node_id: node for node in (add(nodes) for _ in range(NODES))}
        nodes.wait_for_nodes()
        url = started(directory)
        texts = {"name": STORE, "texts": [name]}
        requests.post(f"{url}/v1/datastores", json=texts, timeout=SECONDS).raise_for_status()
        data = clip.read_bytes()
        until(lambda: whole(url, data))
        until(lambda: all(len(one) > 1 for one in placed().values()))
        seen: dict[str, Any] = {"before": (before := placed())}
        seen["gone"] = gone = next(
            one
            for one in before["decoder"]
            if all(set(replicas) - {one} for replicas in before.values())
        )
        with calling(url, data) as calls:
            until(lambda: len(calls) >= 3 * CALLERS)
            seen["losing"] = time.monotonic()
            lose(nodes, workers[gone])
            seen["lost"] = time.monotonic()
            until(lambda: again(before, placed(), gone))
            until(lambda: whole(url, data))
            seen["whole"] = time.monotonic()
            until(lambda: sum(one["begun"] > seen["whole"] for one in calls) >= 3 * CALLERS)
        return seen | {"calls": calls, "after": placed()}
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.shutdown()


def started(directory: Path) -> str:
    """The service, ready to take calls: its address."""
    [port] = free_ports(1)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    with suppress(TimeoutError):  # Serve waits a minute for HAProxy, which comes all the same
        serve.start(
            proxy_location="HeadOnly",  # nodes on one machine have one port between them
            http_options={"host": "127.0.0.1", "port": port},
            logging_config=quiet,
        )
    given = GIVEN | {"datastores": str(directory / "datastores"), "cache": str(directory / "cache")}
    serve.run(build(given), name=APPLICATION, logging_config=quiet)
    url = f"http://127.0.0.1:{port}"
    until(lambda: ready(url))
    return url


def ready(url: str) -> bool:
    """Whether every part takes calls."""
    with suppress(requests.RequestException):
        return requests.get(f"{url}/readyz", timeout=SECONDS).status_code == 200
    return False


def placed() -> dict[str, list[str]]:
    """The nodes of each part's replicas, and of each shard's."""
    found: dict[str, list[str]] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        replica = actor["name"].removeprefix(f"SERVE_REPLICA::{APPLICATION}#")
        if replica != actor["name"]:
            part = replica.split("#")[0]
        elif actor["namespace"] == NAMESPACE and "-pool-" not in actor["name"]:
            part = "shards"  # a datastore's own: the pool of small ones has one process
        else:
            continue
        try:
            handle = ray.get_actor(**actor)
            node = ray.get(handle.__ray_call__.remote(_node), timeout=SECONDS)
        except (ValueError, ray.exceptions.RayError):  # it is gone, or not there again yet
            continue
        found.setdefault(part, []).append(node)
    return found


def _node(_: object) -> str:
    return ray.get_runtime_context().get_node_id()


def again(before: dict[str, list[str]], now: dict[str, list[str]], gone: str) -> bool:
    """Whether as many replicas of each part as there were are on nodes that are left."""
    counts = {part: len(nodes) for part, nodes in before.items()}
    return counts == {part: len(nodes) for part, nodes in now.items()} and not any(
        gone in nodes for nodes in now.values()
    )


@contextmanager
def calling(url: str, data: bytes) -> Iterator[list[dict[str, Any]]]:
    """Callers who transcribe without a pause in the block, in four ways; their calls, as `called`
    has them."""
    calls: list[dict[str, Any]] = []
    over = threading.Event()
    ways = [{}, {"stream": "true"}, {"datastore": STORE}, {"datastore": STORE, "stream": "true"}]

    def call(number: int) -> None:
        while not over.is_set():
            calls.append(called(url, data, ways[number % len(ways)]))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
    for caller in callers:
        caller.start()
    try:
        yield calls
    finally:
        over.set()
        for caller in callers:
            caller.join()


def called(url: str, data: bytes, form: dict[str, str]) -> dict[str, Any]:
    """A call: when it was `begun` and `ended` (seconds), its `form`, `status` and `answer`; status
    None where the connection broke."""
    begun = time.monotonic()
    try:
        told = requests.post(
            f"{url}/v1/audio/transcriptions",
            files={"file": ("clip.flac", data)},
            data=form,
            timeout=SECONDS,
        )
        status, answer = told.status_code, told.text
    except requests.RequestException as error:
        status, answer = None, repr(error)
    ended = time.monotonic()
    return {"begun": begun, "ended": ended, "form": form, "status": status, "answer": answer}


def whole(url: str, data: bytes) -> bool:
    """Whether a call with the datastore is answered by all of its shards."""
    told = called(url, data, {"datastore": STORE, "include[]": "retrieval"})
    return told["status"] == 200 and json.loads(told["answer"])["missing_shards"] == 0


def until(happens: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it never happens; the parts are on {placed()}")
        time.sleep(0.2)


if __name__ == "__main__":
    directory, clip, name = sys.argv[1:]
    print(json.dumps(main(Path(directory), Path(clip), name)))
