import os
import signal
import time
import weakref

import pytest

from glalm.prepare import workers
from glalm.prepare.workers import stream_in_order

pytestmark = pytest.mark.slow  # They start processes.


def count_to(item):
    """Give `item` results. An item below zero is a signal that ends the process, and one hundred is an error."""
    if item < 0:
        os.kill(os.getpid(), -item)
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


def read(item):
    """Read what was cut short, as gzip does."""
    yield item
    if item == 2:
        raise EOFError("the file ends early")


def load():
    raise ImportError("no module of this name")


class Unloadable:
    """A function or an item that can be sent to a process, but not be loaded there."""

    def __reduce__(self):
        return load, ()


class Numbered:
    def __init__(self, number, last):
        self.number = number
        self.last = last


def wait_for_last(item):
    """Give the item's number, for the first item only after the last one was taken."""
    while item.number == 0 and not item.last.exists():
        time.sleep(0.01)
    yield item.number


def slow_first(item):
    """Give 20 results of 1 MiB. The first item waits until others could have been done."""
    if item == 0:
        time.sleep(1)
    for _ in range(20):
        yield bytes([item]) * 2**20


def test_results_come_in_the_order_of_the_items():
    items = [3, 0, 50, 1, 2, 0, 0, 7] * 5
    found = list(stream_in_order(count_to, items, 3, size_of=lambda item: 2**20))
    assert found == [(item, number) for item in items for number in range(item)]


def test_an_exception_is_raised_where_it_belongs():
    found = []
    with pytest.raises(KeyError, match="one hundred") as caught:
        for result in stream_in_order(count_to, [2, 101, 1], 2, size_of=lambda item: 1):
            found.append(result)
    assert found == [(2, 0), (2, 1), *((101, number) for number in range(100))]
    assert "count_to" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="UnpicklableError: too bad") as caught:
        list(stream_in_order(fail, [1], 2, size_of=lambda item: 1))
    assert "in fail" in caught.value.__notes__[0]
    with pytest.raises(EOFError, match="the file ends early"):
        list(stream_in_order(read, [1, 2], 2, size_of=lambda item: 1))
    with pytest.raises(ImportError, match="no module of this name"):
        list(stream_in_order(read, [Unloadable()], 2, size_of=lambda item: 1))


def test_an_exception_of_the_items_is_raised_as_it_is():
    def receive():
        yield 1
        raise ConnectionResetError("connection reset by peer")

    with pytest.raises(ConnectionResetError, match="connection reset by peer"):
        list(stream_in_order(read, receive(), 2, size_of=lambda item: 1))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (signal.SIGKILL, r"A worker process was killed.*smaller --workers"),
        (signal.SIGSEGV, r"ended by the signal SIGSEGV.*--workers 1"),
    ],
)
def test_a_killed_worker_is_named(sent, message):
    with pytest.raises(ValueError, match=message):
        list(stream_in_order(count_to, [1, -sent, 1], 2, size_of=lambda item: 1))


def test_a_worker_that_cannot_start_says_its_exit_code(capfd):
    with pytest.raises(ValueError, match=r"ended with exit code 1\. Its own error is printed above.*__main__"):
        list(stream_in_order(Unloadable(), [1, 2], 2, size_of=lambda item: 1))
    assert "no module of this name" in capfd.readouterr().err


def test_items_are_kept_only_until_a_worker_has_them(tmp_path):
    alive = weakref.WeakSet()
    most = 0

    def make_items():
        nonlocal most
        for number in range(30):
            item = Numbered(number, tmp_path / "last")
            alive.add(item)
            most = max(most, len(alive))
            yield item
        item.last.touch()

    found = list(stream_in_order(wait_for_last, make_items(), 2, size_of=lambda item: workers.PENDING_BYTES))
    assert found == list(range(30)) and most <= 3


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
    found = [result[0] for result in stream_in_order(slow_first, items, 3, size_of=lambda item: 2**22)]
    assert found == [item for item in items for _ in range(20)]
    assert 2**22 <= most <= 2**22 + 2**21
