import threading

import pytest

from mmrag.ahead import ahead


def test_what_is_made_ahead_comes_in_order():
    assert list(ahead(lambda number: number * number, range(5))) == [0, 1, 4, 9, 16]
    assert list(ahead(str, [])) == []


def test_one_is_made_while_the_one_before_is_used_and_no_more():
    made, second = [], threading.Event()

    def make(number: int) -> int:
        made.append(number)
        if number == 1:
            second.set()
        return number

    reading = ahead(make, range(9))
    assert next(reading) == 0
    assert second.wait(10), "nobody asked for it yet"
    assert made == [0, 1]
    assert next(reading) == 1
    reading.close()
    assert max(made) <= 2


def test_an_error_comes_where_its_number_would_have():
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("of number two")
        return number

    reading = ahead(make, range(4))
    assert [next(reading), next(reading)] == [0, 1]
    with pytest.raises(ValueError, match="of number two"):
        next(reading)
