"""However much some ask for, the others' turn comes."""

import threading
import time

import pytest

from cluster.turns import Turns


def order_of(asking: list[str]) -> list[str]:
    """In which order those who ask are let in, all of them asking while `first` is in."""
    turns, order, threads = Turns(), [], []

    def ask(name):
        with turns.of(name):
            order.append(name)

    with turns.of("first"):
        for count, name in enumerate(asking, 1):
            threads.append(threading.Thread(target=ask, args=(name,)))
            threads[-1].start()
            while sum(turns.waiting().values()) < count:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert turns.waiting() == {}
    return order


def test_names_take_turns_however_many_wait_under_one():
    assert order_of([*"aaaaaa", "b"]) == [*"ab", *"aaaaa"]
    assert order_of([*"aaa", *"bb", "c", "a"]) == [*"abc", *"ab", *"aa"]


def test_one_is_in_at_a_time():
    turns, within, most = Turns(), [], []

    def ask(name):
        for _ in range(50):
            with turns.of(name):
                within.append(name)
                most.append(len(within))
                time.sleep(0)
                within.pop()

    threads = [threading.Thread(target=ask, args=(name,)) for name in "aabbc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 250


def test_an_error_passes_the_turn_on():
    turns = Turns()
    with pytest.raises(KeyError), turns.of("a"):
        raise KeyError
    with turns.of("b"):
        pass
