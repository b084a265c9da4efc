"""An actor and its callers exchange arrays beside Ray, and nothing but arrays."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from ray.actor import ActorHandle

from cluster.arrays import DTYPES, RefusedError, pack, receive, send, unpack
from cluster.channel import BrokenError, Channel, Listener, channel_to

TYPES = st.sampled_from(sorted(DTYPES))


@given(st.lists(TYPES.flatmap(lambda kind: arrays(kind, array_shapes(min_dims=0, min_side=0)))))
def test_arrays_arrive_as_they_were_sent(sent):
    received = unpack(pack(sent))
    assert [one.dtype for one in received] == [one.dtype for one in sent]
    for ours, theirs in zip(received, sent, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.flags.aligned and ours.flags.writeable


@pytest.mark.parametrize("array", [np.array([None]), np.array(["a"]), np.zeros(2, complex)])
def test_what_is_no_plain_number_is_not_sent(array):
    with pytest.raises(ValueError, match="is not sent"):
        pack([array])


@given(st.binary(max_size=60))
def test_bytes_that_nobody_packed_are_arrays_or_an_error(received):
    with suppress(ValueError):
        assert all(one.dtype.str in DTYPES for one in unpack(received))


@pytest.mark.parametrize("missing", [1, 8, 24, 26, 30])
def test_a_message_that_was_cut_off_is_an_error(missing):
    message = pack([np.arange(3)])
    with pytest.raises(ValueError, match="a message ends amid"):
        unpack(message[:-missing])


@ray.remote(num_cpus=0.1)
class Doubling:
    """Doubles what it is given, after so many seconds; nothing negative."""

    def __init__(self):
        self._listener = Listener(self.double)

    def address(self):
        return self._listener.address

    def double(self, numbers, seconds):
        time.sleep(float(seconds))
        if (numbers < 0).any():
            raise ValueError("negative")
        return [2 * numbers]


@pytest.fixture(scope="module")
def doubling(ray_cluster: str) -> Iterator[ActorHandle]:
    actor = Doubling.remote()
    ray.get(actor.address.remote())
    yield actor
    ray.kill(actor)


@pytest.fixture
def channel(doubling: ActorHandle) -> Channel:
    """A test's own, with one connection."""
    made = Channel(doubling)
    asked(made, [1])
    return made


def asked(channel: Channel, numbers, seconds=0.0, wait=10.0):
    """The answer, once a connection can be had."""
    deadline = time.monotonic() + 20
    question = [np.array(numbers), np.array(seconds)]
    while (answer := channel.ask(question, wait)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    [doubled] = answer(wait)
    return doubled.tolist()


pytestmark = pytest.mark.ray


def test_a_process_has_one_channel_to_an_actor(doubling):
    found = channel_to(doubling)
    assert channel_to(doubling) is found


def test_a_connection_is_used_again(channel):
    for number in range(5):
        assert asked(channel, [number, 3]) == [2 * number, 6]
    assert len(channel._free) == 1


def test_what_the_actor_raises_is_refused_and_the_connection_goes_on(channel):
    with pytest.raises(RefusedError):
        asked(channel, [-1])
    [connection] = channel._free
    assert asked(channel, [4]) == [8]
    assert channel._free == [connection]


@pytest.mark.parametrize("pause", [0, 1.2])
def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(channel, pause):
    with pytest.raises(BrokenError):
        asked(channel, [1], seconds=1.0, wait=0.2)
    time.sleep(pause)
    assert asked(channel, [5]) == [10]


def test_an_answer_that_was_there_in_time_is_read_after_the_deadline(channel):
    answer = channel.ask([np.array([3]), np.array(0.0)], 5)
    time.sleep(0.5)
    [doubled] = answer(0)
    assert doubled.tolist() == [6]


def test_large_questions_and_answers_pass(channel):
    """Larger than what the two ends hold for each other."""
    assert asked(channel, np.arange(3_000_000)) == list(range(0, 6_000_000, 2))


def test_an_actor_that_ended_is_not_asked(ray_cluster):
    actor = Doubling.remote()
    channel = Channel(actor)
    assert asked(channel, [1]) == [2]
    ray.kill(actor)
    deadline = time.monotonic() + 20
    while channel.ask([np.array([1]), np.array(0.0)], 1) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("token", [b"", bytes(32), bytes(500)])
def test_who_lacks_the_token_gets_no_answer(channel, token):
    address = ray.get(channel._actor.address.remote())
    assert repr(address.token) not in repr(address)
    with socket.create_connection((address.host, address.port)) as stranger, suppress(OSError):
        stranger.sendall(token)
        send(stranger, pack([np.array([1]), np.array(0.0)]), 5)
        pytest.fail(f"{receive(stranger, 1, time.monotonic() + 10)} was received")
    assert asked(channel, [1]) == [2]


def test_who_sends_no_arrays_is_hung_up_on_and_the_others_served(channel):
    address = ray.get(channel._actor.address.remote())
    with socket.create_connection((address.host, address.port)) as caller:
        caller.sendall(address.token)
        send(caller, b"\x80\x04no arrays.", 5)
        with pytest.raises(ConnectionError):
            receive(caller, 1, time.monotonic() + 10)
    assert asked(channel, [1]) == [2]


def test_where_nothing_listens_is_not_tried_again_at_once(channel, monkeypatch):
    tried = []

    def blocked(*arguments):
        tried.append(arguments)
        raise TimeoutError("a firewall")

    channel._free.clear()
    monkeypatch.setattr(socket, "create_connection", blocked)
    for _ in range(5):
        assert channel.ask([np.array([1]), np.array(0.0)], 1) is None
    assert len(tried) == 1
