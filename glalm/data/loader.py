"""Windows of a token stream as batches for one rank, read ahead by a thread."""

import itertools
import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch

from glalm.data.order import rank_slice, window_ids
from glalm.data.shards import TokenSet

Batch = dict[str, torch.Tensor]
Item = TypeVar("Item")

IGNORED = -100  # the label that torch's cross entropy leaves out
READ_AHEAD = 4  # batches


class Windows:
    """The stream of `tokens` cut into windows of T = `length` positions, documents packed end to end.

    Window i holds the T + 1 tokens from i * T on; its last is the next window's first, so that every token but
    the first of the stream is a target exactly once. The `dropped_tokens` at the end fill no window.
    Raises ValueError if the stream has fewer than T + 1 tokens.
    """

    def __init__(self, tokens: TokenSet, length: int):
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        if tokens.num_tokens < length + 1:
            raise ValueError(
                f"length={length} needs {length + 1} tokens, but {tokens.folder} has {tokens.num_tokens} for "
                f"{tokens.split}: shorten the windows, or prepare more text or a larger share for this split"
            )
        self.tokens, self.length = tokens, length
        self.dropped_tokens = tokens.num_tokens - (len(self) * length + 1)

    def __len__(self) -> int:
        return (self.tokens.num_tokens - 1) // self.length

    def __getitem__(self, i: int) -> np.ndarray:
        """Window i: [T + 1] token ids in the set's dtype."""
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} is not one of {len(self)}")
        return self.tokens.tokens(i * self.length, (i + 1) * self.length + 1)

    def batch(self, ids: np.ndarray) -> Batch:
        """input_ids and labels, int64 [len(ids), T]; labels[:, t] is the token after input_ids[:, t]."""
        rows = torch.from_numpy(np.stack([self[i] for i in ids], dtype=np.int64))
        return {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def batches(
    windows: Windows, *, seed: int, batch_size: int, start_step: int = 0, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Batch]]:
    """Training batches without end, from `start_step` on: (step, {"input_ids", "labels"}), int64 [n, T].

    batch_size: windows of one optimiser step over all ranks, of which this one gets n = batch_size / world. Labels
    are shifted already: the loss compares logits[:, t] with labels[:, t]. To resume, start at the next step; there
    is no other state. Raises ValueError if batch_size is not a multiple of world.
    """
    rank_slice(window_ids(seed, start_step, batch_size, len(windows)), rank, world)  # raises here, not at next()

    def read() -> Iterator[tuple[int, Batch]]:
        for step in itertools.count(start_step):
            yield step, windows.batch(rank_slice(window_ids(seed, step, batch_size, len(windows)), rank, world))

    return read_ahead(read())


def sequential(
    windows: Windows, batch_size: int, *, rank: int = 0, world: int = 1, limit: int | None = None
) -> Iterator[Batch]:
    """All windows once, in order, or `limit` of them, evenly spaced: for validation.

    batch_size: windows of one batch of one rank; the ranks share batch_size * world neighbours at a time.
    All ranks get the same number of batches, of the same shapes. The last batch may be smaller. Where it does
    not divide among the ranks, the rows that are short repeat a window with all labels IGNORED: weigh each
    loss by its number of other labels, which on the last ranks may be none.
    """
    count = len(windows) if limit is None else min(limit, len(windows))
    if batch_size < 1 or count < 1:
        raise ValueError(f"batch_size={batch_size} and limit={limit} must be at least 1")
    rank_slice(np.arange(world), rank, world)

    def read() -> Iterator[Batch]:
        for start in range(0, count, batch_size * world):
            left = min(batch_size * world, count - start)
            places = rank_slice(start + np.arange(-(-left // world) * world), rank, world)
            batch = windows.batch(places.clip(max=count - 1) * len(windows) // count)
            batch["labels"][torch.from_numpy(places >= count)] = IGNORED
            yield batch

    return read_ahead(read())


def read_ahead(items: Iterator[Item], depth: int = READ_AHEAD) -> Iterator[Item]:
    """The same items, produced by a thread that is at most `depth` ahead and ends with this generator.

    What `items` raises is raised here, after the items that came before it.
    """
    ready: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                ready.put(("item", item))
                if closed.is_set():
                    return
            ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))

    thread = threading.Thread(target=produce, name="glalm-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        closed.set()
        while thread.is_alive():  # it may be waiting for room
            while not ready.empty():
                ready.get_nowait()
            thread.join(timeout=0.01)
