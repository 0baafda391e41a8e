import os
import signal
import time

import pytest

from glalm.prepare import workers
from glalm.prepare.workers import stream_in_order

pytestmark = pytest.mark.slow  # They start processes.


def count_to(item):
    """Give `item` results. An item below zero kills the process, and one hundred is an error."""
    if item < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    for number in range(item):
        if number == 100:
            raise KeyError("one hundred")
        yield item, number


class UnpicklableError(Exception):
    def __init__(self, first, second):
        super().__init__(first)


def fail(item):
    raise UnpicklableError("too bad", 1)
    yield


def slow_first(item):
    """Give 20 results of 1 MiB. The first item waits until others could have been done."""
    if item == 0:
        time.sleep(1)
    for _ in range(20):
        yield bytes(2**20)


def test_results_come_in_the_order_of_the_items():
    items = [3, 0, 50, 1, 2, 0, 0, 7] * 5
    found = list(stream_in_order(count_to, items, 3, size_of=lambda item: 2**20))
    assert found == [(item, (item, number)) for item in items for number in range(item)]


def test_an_exception_is_raised_where_it_belongs():
    found = []
    with pytest.raises(KeyError, match="one hundred") as caught:
        for _, result in stream_in_order(count_to, [2, 101, 1], 2, size_of=lambda item: 1):
            found.append(result)
    assert found == [(2, 0), (2, 1), *((101, number) for number in range(100))]
    assert "count_to" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="UnpicklableError: too bad"):
        list(stream_in_order(fail, [1], 2, size_of=lambda item: 1))


def test_a_killed_worker_is_named():
    with pytest.raises(ValueError, match=r"One of the 2 worker processes was killed.*smaller --workers"):
        list(stream_in_order(count_to, [1, -1, 1], 2, size_of=lambda item: 1))


def test_results_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(workers, "BUFFER_BYTES", 2**22)
    most = 0
    received = workers._receive

    def observe(pool, first):
        nonlocal most
        received(pool, first)
        most = max(most, *(worker.buffered_bytes for worker in pool if worker is not first.worker))

    monkeypatch.setattr(workers, "_receive", observe)
    items = list(range(6))
    found = [item for item, _ in stream_in_order(slow_first, items, 3, size_of=lambda item: 2**22)]
    assert found == [item for item in items for _ in range(20)]
    assert 2**22 <= most <= 2**22 + 2**21
