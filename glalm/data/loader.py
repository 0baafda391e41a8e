"""Windows of a token stream as batches for one rank, read ahead by threads."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from glalm.data.order import Order, rank_slice
from glalm.data.shards import TokenSet, count_leftover_tokens
from glalm.kernels.cross_entropy import IGNORE_INDEX

Batch = dict[str, torch.Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")

READ_AHEAD = 4  # batches


class Windows:
    """The stream of each source of `tokens` cut into windows of T = `length` positions, documents packed end to end.

    Window i of a source holds the T + 1 tokens from i * T on; its last is the next window's first, so that every
    token but the first of the stream is a target exactly once. The `dropped_tokens` at the ends fill no window.
    source_windows: {source: its number of windows}, in the order in which they are numbered.
    reset_state: batches say where documents start, to begin there from an empty state, and no label lies in another
    document than its input.
    Raises ValueError if no source has T + 1 tokens.
    """

    def __init__(self, tokens: TokenSet, length: int, reset_state: bool = False):
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        self.tokens, self.length, self.reset_state = tokens, length, reset_state
        counts = tokens.source_tokens
        self.source_windows = {source: max(count - 1, 0) // length for source, count in counts.items()}
        self.dropped_tokens = sum(count_leftover_tokens(count, length) for count in counts.values())
        self._ends = np.cumsum([0, *self.source_windows.values()])  # of each source, in windows
        self._begins = np.cumsum([0, *counts.values()])  # of each source, in tokens
        if not len(self):
            unfinished = "" if tokens.is_complete else " so far: it is still being prepared"
            raise ValueError(
                f"length={length} needs {length + 1} tokens of a source, but {tokens.folder} has {tokens.num_tokens} "
                f"for {tokens.split}{unfinished}: shorten the windows, or prepare more text or a larger share for this "
                "split"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """Window i: [T + 1] token ids in the set's dtype."""
        start = self._start(i)
        return self.tokens.read_tokens(start, start + self.length + 1)

    def load_batch(self, ids: np.ndarray) -> Batch:
        """input_ids and labels, int64 [len(ids), T]; labels[:, t] is the token after input_ids[:, t].

        With `reset_state` also starts, bool [len(ids), T]: where a document, or the window, begins; labels are
        IGNORE_INDEX where the next token is in another document.
        """
        rows = np.empty((len(ids), self.length + 1), dtype=np.int64)
        for row, i in zip(rows, ids, strict=True):
            row[:] = self[i]
        batch = {"input_ids": rows[:, :-1], "labels": rows[:, 1:].copy()}
        if self.reset_state:
            starts = np.zeros(rows.shape, dtype=bool)
            for row, start in zip(starts, map(self._start, ids), strict=True):
                row[self.tokens.document_starts(start, start + self.length + 1) - start] = True
            batch["labels"][starts[:, 1:]] = IGNORE_INDEX
            starts[:, 0] = True
            batch["starts"] = starts[:, :-1]
        return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in batch.items()}

    def _start(self, i: int) -> int:
        """Where window i begins in the stream."""
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} is not one of {len(self)}")
        source = int(np.searchsorted(self._ends, i, side="right")) - 1
        return int(self._begins[source] + (i - self._ends[source]) * self.length)


def pack_documents(batch: Batch) -> Batch:
    """A batch whose rows are one, [1, n * T], with cu_seqlens, int64 [documents + 1], in place of starts."""
    starts = batch["starts"].flatten()
    cu_seqlens = torch.cat([starts.nonzero().flatten(), torch.tensor([len(starts)], device=starts.device)])
    rows = {name: x.flatten()[None] for name, x in batch.items() if name != "starts"}
    return {**rows, "cu_seqlens": cu_seqlens.to(rows["input_ids"].device, non_blocking=True)}


def training_batches(
    windows: Windows,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    weights: Mapping[str, float] | None = None,
    workers: int = 1,
    pin: bool = False,
) -> Iterator[tuple[int, Batch]]:
    """Training batches without end, from `start_step` on: (step, what Windows.load_batch gives for n windows).

    batch_size: windows of one optimiser step over all ranks, of which this one gets n = batch_size / world_size. Labels
    are shifted already: the loss compares logits[:, t] with labels[:, t]. To resume, start at the next step; there
    is no other state. weights: of the sources, see Order. workers: threads that read ahead; what they read does not
    depend on their number. pin: into page-locked memory, from which a GPU copies while it computes.
    Raises ValueError if batch_size is not a multiple of world_size, or weights are not the sources'.
    """
    order = Order(seed, batch_size, windows.source_windows, weights)
    rank_slice(order.window_ids(start_step), rank, world_size)  # raises here, not at next()

    def read(step: int) -> tuple[int, Batch]:
        batch = windows.load_batch(rank_slice(order.window_ids(step), rank, world_size))
        return step, {name: x.pin_memory() for name, x in batch.items()} if pin else batch

    return read_ahead(read, itertools.count(start_step), workers)


def sequential_batches(
    windows: Windows, batch_size: int, *, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[Batch]:
    """All windows once, in order, or `limit` of them, evenly spaced: for validation.

    batch_size: windows of one batch of one rank; the ranks share batch_size * world_size neighbours at a time.
    All ranks get the same number of batches, of the same shapes. The last batch may be smaller. Where it does
    not divide among the ranks, the rows that are short repeat a window with all labels IGNORE_INDEX: weigh each
    loss by its number of other labels, which on the last ranks may be none.
    """
    count = len(windows) if limit is None else min(limit, len(windows))
    if batch_size < 1 or count < 1:
        raise ValueError(f"batch_size={batch_size} and limit={limit} must be at least 1")
    rank_slice(np.arange(world_size), rank, world_size)

    def read(start: int) -> Batch:
        left = min(batch_size * world_size, count - start)
        places = rank_slice(start + np.arange(-(-left // world_size) * world_size), rank, world_size)
        batch = windows.load_batch(places.clip(max=count - 1) * len(windows) // count)
        batch["labels"][torch.from_numpy(places >= count)] = IGNORE_INDEX
        return batch

    return read_ahead(read, range(0, count, batch_size * world_size))


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], workers: int = 1, depth: int = READ_AHEAD
) -> Iterator[Result]:
    """map(read, items) by `workers` threads, which are at most `depth` results ahead (or one each) and end with it.

    What `read` raises is raised here, after the results that came before it.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")

    def results() -> Iterator[Result]:
        pool = ThreadPoolExecutor(workers, "glalm-read-ahead")
        try:
            ahead = iter(items)
            waiting = deque(pool.submit(read, item) for item in itertools.islice(ahead, max(depth, workers)))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in itertools.islice(ahead, 1))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return results()
