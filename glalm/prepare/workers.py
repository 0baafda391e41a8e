"""Worker processes of this machine: they apply a pure function to many items and end when their parent does."""

import os
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

from glalm.data.processes import call_without_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

PENDING_BYTES = 2**23  # of items per worker that are handed out at once
BUFFER_BYTES = 2**26  # of results per worker that wait for those of earlier items
UNSENT_RESULTS = 8  # of a worker that wait until its parent receives them
# The first byte of a message from a worker says what follows: a result, nothing after the last one, or an exception.
RESULT, END, ERROR = (bytes([kind]) for kind in range(3))


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    # Not every system has sched_getaffinity, which counts only these.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stream_in_order(
    function: Callable[[Item], Iterable[Result]],
    items: Iterable[Item],
    workers: int,
    size_of: Callable[[Item], int],
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with each result of function(item), in order, computed by `workers` processes, or by this one if
    it is 1.

    Memory does not grow with the number of results: a worker waits while BUFFER_BYTES of its results cannot be yielded.

    Args:
        function: A picklable function.
        size_of: Returns the bytes that an item takes. At most PENDING_BYTES per worker, or one item, are handed out.

    Raises:
        ValueError: A worker process was killed.
    """
    if workers == 1:
        for item in items:
            for result in function(item):
                yield item, result
        return
    pool = [_Worker(function) for _ in range(workers)]
    tasks: deque[_Task] = deque()  # not yielded completely, in order
    remaining = iter(items)
    try:
        while True:
            tasks.extend(_hand_out(remaining, pool, size_of))
            if not tasks:
                return
            _receive(pool, first=tasks[0])
            while tasks[0].results:
                yield tasks[0].item, tasks[0].take_result()
            if tasks[0].is_done:
                tasks.popleft()
    except (EOFError, ConnectionError) as error:
        problem = f"One of the {workers} worker processes was killed, as the system does when memory runs out."
        advice = "Run the same command again to resume, with a smaller --workers if memory is short."
        raise ValueError(f"{problem} {advice}") from error
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """A process that applies `function` to one item after the other, as its parent sees it."""

    def __init__(self, function: Callable):
        # Spawn instead of fork: locks that this process's threads hold would stay locked in forked children.
        context = get_context("spawn")
        self.connection, connection = context.Pipe()
        self.process = context.Process(target=_serve, args=(connection, function), daemon=True)
        self.process.start()
        connection.close()
        self.tasks: deque[_Task] = deque()  # not done, in order
        self.pending_bytes = 0  # of these
        self.buffered_bytes = 0  # of results that were received and not taken

    def stop(self) -> None:
        """Kill the process, which has nothing to lose, and wait until it has ended."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass
class _Task:
    """An item that was handed to a worker, and its results, pickled, that were received and not taken."""

    item: Any
    size: int
    worker: _Worker
    results: deque[bytes] = field(default_factory=deque)
    is_done: bool = False

    def take_result(self) -> Any:
        """Return the next result, or raise the exception that the function raised."""
        message = self.results.popleft()
        self.worker.buffered_bytes -= len(message)
        value = pickle.loads(memoryview(message)[1:])
        if message[:1] == ERROR:
            raise value
        return value


def _hand_out(items: Iterator, pool: list[_Worker], size_of: Callable[[Any], int]) -> Iterator[_Task]:
    """Give items to the workers that have the least to do, and yield the tasks, until all have enough."""
    while (worker := min(pool, key=lambda worker: worker.pending_bytes)).pending_bytes < PENDING_BYTES:
        item = next(items, None)
        if item is None:
            return
        task = _Task(item, size_of(item), worker)
        worker.tasks.append(task)
        worker.pending_bytes += task.size
        worker.connection.send(item)
        yield task


def _receive(pool: list[_Worker], first: _Task) -> None:
    """Receive what the workers have sent. If there is no result of the task `first` yet, wait for the next message.

    Workers whose results fill their buffer are left waiting, except for the one whose results are yielded next.
    """
    open_workers = {}
    for worker in pool:
        if worker.tasks and (worker is first.worker or worker.buffered_bytes < BUFFER_BYTES):
            open_workers[worker.connection] = worker
    for connection in wait(list(open_workers), timeout=0 if first.results or first.is_done else None):
        worker = open_workers[connection]
        message = worker.connection.recv_bytes()
        if message[:1] == END:
            task = worker.tasks.popleft()
            task.is_done = True
            worker.pending_bytes -= task.size
        else:
            worker.tasks[0].results.append(message)
            worker.buffered_bytes += len(message)


def _serve(connection: Connection, function: Callable) -> NoReturn:
    """Receive items, apply the function, and send the results, until the parent kills this process or is gone.

    Threads receive and send, so that neither this process nor its parent waits while the other one computes.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One thread for each worker.
    bind_to_parent()
    items: queue.SimpleQueue = queue.SimpleQueue()
    messages: queue.Queue[bytes] = queue.Queue(UNSENT_RESULTS)
    threading.Thread(target=_receive_items, args=(connection, items), daemon=True).start()
    threading.Thread(target=_send_messages, args=(connection, messages), daemon=True).start()
    while True:
        item = items.get()
        try:
            for result in function(item):
                messages.put(RESULT + pickle.dumps(result))
        except BaseException as error:
            messages.put(ERROR + _pickle_error(error))
        messages.put(END)


def _receive_items(connection: Connection, items: queue.SimpleQueue) -> None:
    while True:
        try:
            items.put(connection.recv())
        except (EOFError, OSError):  # The parent is gone.
            os._exit(1)


def _send_messages(connection: Connection, messages: queue.Queue[bytes]) -> None:
    while True:
        try:
            connection.send_bytes(messages.get())
        except OSError:  # The parent is gone.
            os._exit(1)


def _pickle_error(error: BaseException) -> bytes:
    """Return an exception with the traceback of this process, or one with its message if it cannot be pickled."""
    error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # It fails for classes whose arguments differ from `args`.
    except Exception:
        data = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def bind_to_parent() -> None:
    """Make this worker process ignore Ctrl-C, on which its parent acts, and exit when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    call_without_parent(lambda: os._exit(1))
