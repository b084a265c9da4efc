"""A process is killed while callers are being served: each of them gets an answer, or is told to
come again; afterwards everything is as before."""

import os
import threading
import time
from signal import SIGKILL

import pytest

SENTENCE = "please call priya raghavan tomorrow"
NAME = "priya raghavan"
CALLERS = 4


def killed(service, kind):
    [process] = service.processes(kind)
    os.kill(process.pid, SIGKILL)


@pytest.fixture
def besieged(service, clip, datastore):
    """`besieged(kill)`: every status that callers saw from before `kill` until all was well."""
    data, name = clip(SENTENCE), datastore(NAME)
    ways = [{}, {"stream": "true"}, {"datastore": name}, {"datastore": name, "stream": "true"}]
    assert service.text(data, datastore=name) == SENTENCE

    def run(kill):
        seen, stop = [], threading.Event()

        def call(number):
            while not stop.is_set():
                answer = service.transcribe(data, **ways[number % len(ways)])
                if answer.status_code == 200 and '"error"' in answer.text:  # amid a stream
                    assert '"unavailable"' in answer.text, answer.text
                    seen.append(503)
                else:
                    seen.append(answer.status_code)

        callers = [threading.Thread(target=call, args=(n,)) for n in range(CALLERS)]
        for caller in callers:
            caller.start()
        time.sleep(1)
        kill()
        time.sleep(1)
        service.ready()
        time.sleep(1)
        stop.set()
        for caller in callers:
            caller.join(120)
            assert not caller.is_alive(), "a caller is still waiting"
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            whole = service.transcribe(data, datastore=name, include=["retrieval"]).json()
            if (whole["text"], whole["missing_shards"]) == (SENTENCE, 0):
                return seen
            time.sleep(0.2)
        pytest.fail(f"it is not as before: {whole}")

    return run


def test_a_killed_pool_of_datastores_is_missed_by_nobody_for_long(service, besieged):
    seen = besieged(lambda: killed(service, "DatastorePool"))
    assert set(seen) <= {200, 503} and seen.count(200) > CALLERS


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("part", ["encoder", "decoder", "retriever"])
def test_a_killed_replica_costs_nobody_more_than_a_second_try(service, besieged, part):
    seen = besieged(lambda: killed(service, part))
    assert set(seen) <= {200, 503} and seen.count(200) > CALLERS


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_everything_killed_at_once_comes_back(service, besieged):
    def kill():
        for part in ("encoder", "decoder", "retriever", "DatastorePool"):
            killed(service, part)

    seen = besieged(kill)
    assert set(seen) <= {200, 503} and seen.count(200) > CALLERS
