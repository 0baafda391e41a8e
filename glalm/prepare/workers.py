"""Worker processes of this machine: they apply a pure function to many items and end when their parent does."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from glalm.data.processes import call_without_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

PENDING_BYTES = 2**23  # of items per worker that are submitted at once


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, size_of: Callable[[Item], int]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with function(item), in order, computed by `workers` processes, or by this one if it is 1.

    Args:
        function: A picklable function.
        size_of: Returns the bytes that an item takes. At most PENDING_BYTES per worker, or one item, are pending.

    Raises:
        ValueError: A worker process was killed.
    """
    if workers == 1:
        for item in items:
            yield item, function(item)
        return
    # Spawn instead of fork: locks that this process's threads hold would stay locked in forked children.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    pending = deque()
    pending_bytes = 0
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            pending_bytes += size_of(item)
            while pending and (pending_bytes > PENDING_BYTES * workers or pending[0][1].done()):
                first, future = pending.popleft()
                pending_bytes -= size_of(first)
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()
    except BrokenProcessPool as error:
        problem = f"One of the {workers} worker processes was killed, as the system does when memory runs out."
        advice = "Run the same command again to resume, with a smaller --workers if memory is short."
        raise ValueError(f"{problem} {advice}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Prepare this worker process before its first item."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One thread for each worker.
    bind_to_parent()


def bind_to_parent() -> None:
    """Make this worker process ignore Ctrl-C, on which its parent acts, and exit when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    call_without_parent(lambda: os._exit(1))
