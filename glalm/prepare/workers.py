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

PENDING_BYTES = 2**23  # A worker that has items of this size to do is handed no others.
BUFFER_BYTES = 2**26  # A worker waits if results of this size cannot be yielded, because earlier items are not done.
UNSENT_RESULTS = 8  # A worker computes up to this many results before its parent receives one.
# The first byte of a message from a worker says what follows: a result, nothing after the last one, or an exception.
RESULT, END, ERROR = (bytes([kind]) for kind in range(3))


def stream_in_order(
    function: Callable[[Item], Iterable[Result]],
    items: Iterable[Item],
    workers: int,
    size_of: Callable[[Item], int],
) -> Iterator[Result]:
    """Yield the results of function(item) for each item, in order, computed by `workers` processes.

    With 1, this process computes them. Memory does not grow with the number of items or results: an item is kept only
    until a worker has it, and a worker waits while BUFFER_BYTES of its results cannot be yielded.

    Args:
        function: A picklable function.
        size_of: Returns the bytes that an item takes. Per worker, PENDING_BYTES and the item that exceeds them are
            handed out.

    Raises:
        ValueError: A worker process was killed, or could not start.
        Exception: What `items` or `function` raises.
    """
    if workers == 1:
        for item in items:
            yield from function(item)
        return
    pool: list[_Worker] = []
    unyielded: deque[_Task] = deque()  # in the order of the items
    remaining = iter(items)
    try:
        for _ in range(workers):
            pool.append(_Worker(function))
        while True:
            unyielded.extend(_hand_out(remaining, pool, size_of))
            if not unyielded:
                return
            first = unyielded[0]
            _receive(pool, first)
            while first.results:
                yield first.take_result()
            if first.is_done:
                unyielded.popleft()
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
        self.unfinished: deque[_Task] = deque()  # in the order in which they were handed out
        self.pending_bytes = 0  # the size of the items of these tasks
        self.buffered_bytes = 0  # the size of the results that were received and not taken

    def send(self, item: Any) -> None:
        """Send an item to the process. Raises ValueError if it has ended."""
        data = pickle.dumps(item)
        try:
            self.connection.send_bytes(data)
        except ConnectionError as error:
            raise self._explain_end() from error

    def receive(self) -> bytes:
        """Return the next message of the process. Raises ValueError if it has ended."""
        try:
            return self.connection.recv_bytes()
        except (EOFError, ConnectionError) as error:
            raise self._explain_end() from error

    def _explain_end(self) -> ValueError:
        """Return the error of a process that has ended though its parent did not stop it."""
        self.process.join()
        code = self.process.exitcode or 0
        if code == -signal.SIGKILL:
            problem = "A worker process was killed, as the system does when memory runs out."
            advice = "Run the same command again to resume, with a smaller --workers if memory is short."
        elif code < 0:
            problem = f"A worker process was ended by the signal {signal.Signals(-code).name}."
            advice = "Run the same command again to resume. If it ends again, find its file with --workers 1."
        else:
            problem = f"A worker process ended with exit code {code}. Its own error is printed above."
            advice = "A script that starts worker processes must do so below: if __name__ == '__main__':"
        return ValueError(f"{problem} {advice}")

    def stop(self) -> None:
        """Kill the process, which has nothing to lose, and wait until it has ended."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass
class _Task:
    """An item of this size that was handed to a worker, and its pickled results that were received and not taken."""

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
    """Hand items to the workers that have the least to do, until all have enough, and yield the tasks."""
    while (worker := min(pool, key=lambda worker: worker.pending_bytes)).pending_bytes < PENDING_BYTES:
        try:
            item = next(items)
        except StopIteration:
            return
        task = _Task(size_of(item), worker)
        worker.unfinished.append(task)
        worker.pending_bytes += task.size
        worker.send(item)
        yield task


def _receive(pool: list[_Worker], first: _Task) -> None:
    """Receive what the workers have sent. If there is no result of the task `first` yet, wait for the next message.

    Workers whose results fill their buffer are left waiting, except for the one whose results are yielded next.
    """
    readable = {}
    for worker in pool:
        if worker.unfinished and (worker is first.worker or worker.buffered_bytes < BUFFER_BYTES):
            readable[worker.connection] = worker
    for connection in wait(list(readable), timeout=0 if first.results or first.is_done else None):
        worker = readable[connection]
        message = worker.receive()
        if message[:1] == END:
            task = worker.unfinished.popleft()
            task.is_done = True
            worker.pending_bytes -= task.size
        else:
            worker.unfinished[0].results.append(message)
            worker.buffered_bytes += len(message)


def _serve(connection: Connection, function: Callable) -> NoReturn:
    """Receive items, apply the function, and send the results, until the parent kills this process or is gone.

    Threads receive and send, so that neither this process nor its parent waits while the other one computes.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One thread for each worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on.
    call_without_parent(lambda: os._exit(1))
    items: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    messages: queue.Queue[bytes] = queue.Queue(UNSENT_RESULTS)
    threading.Thread(target=_receive_items, args=(connection, items), daemon=True).start()
    threading.Thread(target=_send_messages, args=(connection, messages), daemon=True).start()
    while True:
        try:
            for result in function(pickle.loads(items.get())):
                messages.put(RESULT + pickle.dumps(result))
        except BaseException as error:
            messages.put(ERROR + _pickle_error(error))
        messages.put(END)


def _receive_items(connection: Connection, items: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            items.put(connection.recv_bytes())
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
    note = f"In a worker process:\n{traceback.format_exc()}"
    error.add_note(note)
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # It fails for classes whose arguments differ from `args`.
    except Exception:
        substitute = RuntimeError(f"{type(error).__name__}: {error}")
        substitute.add_note(note)
        data = pickle.dumps(substitute)
    return data
