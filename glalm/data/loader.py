"""Cut token streams into windows, and read batches of windows ahead of training in threads."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from glalm import IGNORE_INDEX
from glalm.data.order import Order, rank_slice
from glalm.data.shards import TokenSet, count_leftover_tokens

Batch = dict[str, torch.Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")

READ_AHEAD = 4  # batches


class Windows:
    """The windows of T = `length` positions into which the stream of each source is cut.

    Documents are packed: a window continues in the next document where one ends.

    Window i of a source holds the T + 1 tokens from i * T on. Its last token is the first one of the next window, so
    every token of the windows but the first of a source is a target exactly once. With `reset_state`, tokens that begin
    a document are no targets.

    Args:
        tokens: The split of a set.
        length: T.
        reset_state: Mark in batches where documents start, so that each document begins from an empty state, and
            ignore labels that belong to another document than their input.

    Attributes:
        source_windows: {source: its number of windows}. Window ids count through the sources in this order.
        dropped_tokens: The tokens at the ends of the sources that fill no window.

    Raises:
        ValueError: No source has T + 1 tokens.
    """

    def __init__(self, tokens: TokenSet, length: int, reset_state: bool = False):
        if length < 1:
            raise ValueError(f"length={length} must be at least 1.")
        self.tokens = tokens
        self.length = length
        self.reset_state = reset_state
        counts = tokens.source_tokens
        self.source_windows = {source: max(count - 1, 0) // length for source, count in counts.items()}
        self.dropped_tokens = sum(count_leftover_tokens(count, length) for count in counts.values())
        # The first window and the first token of each source, and then the total.
        self._first_window = np.cumsum([0, *self.source_windows.values()])
        self._first_token = np.cumsum([0, *counts.values()])
        if not len(self):
            unfinished = "" if tokens.is_complete else " so far, because it is still being prepared"
            longest = max(counts.values(), default=0)
            found = f"{tokens.folder} has at most {longest} for {tokens.split}{unfinished}"
            problem = f"Windows of length={length} need {length + 1} tokens of a source, but {found}."
            advice = "Choose shorter windows or prepare more text."
            if not longest and tokens.is_complete and tokens.split != "train":
                advice = f"No document is in that split. Prepare the text again with a larger --{tokens.split} SHARE."
            raise ValueError(f"{problem} {advice}")

    def __len__(self) -> int:
        return int(self._first_window[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """Return the token ids of window i, in the dtype of the set: [T + 1]."""
        start = self._find_start(i)
        return self.tokens.read_tokens(start, start + self.length + 1)

    def load_batch(self, ids: np.ndarray) -> Batch:
        """Return the windows `ids` as a batch of B = len(ids) rows.

        Returns:
            input_ids, labels: int64 [B, T]. labels[:, t] is the token after input_ids[:, t].
            starts: bool [B, T], with `reset_state` only: where a document or a window begins. Labels are IGNORE_INDEX
                where the next token belongs to another document.
        """
        rows = np.empty((len(ids), self.length + 1), dtype=np.int64)
        for row, i in zip(rows, ids, strict=True):
            row[:] = self[i]
        batch = {"input_ids": rows[:, :-1], "labels": rows[:, 1:].copy()}
        if self.reset_state:
            starts = np.zeros(rows.shape, dtype=bool)
            for row, i in zip(starts, ids, strict=True):
                start = self._find_start(i)
                row[self.tokens.document_starts(start, start + self.length + 1) - start] = True
            batch["labels"][starts[:, 1:]] = IGNORE_INDEX
            starts[:, 0] = True
            batch["starts"] = starts[:, :-1]
        return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in batch.items()}

    def _find_start(self, i: int) -> int:
        """Return the position in the stream at which window i begins."""
        if not 0 <= i < len(self):
            raise IndexError(f"There is no window {i}: there are {len(self)}.")
        source = int(np.searchsorted(self._first_window, i, side="right")) - 1
        return int(self._first_token[source] + (i - self._first_window[source]) * self.length)


def flatten_batch(batch: Batch) -> Batch:
    """Return the batch as one row, [1, B * T], for kernels that take sequences of different lengths.

    `cu_seqlens`, int64 [segments + 1], replaces `starts`: the boundaries of the segments, each of which is a document
    or the part of one that lies in a window. The batch must be one of `Windows` with `reset_state`.

    For a batch of shard_batch, `rows`, int64 [3, B], replaces `offsets`: the indices of the first and of the last
    segment of each row, and the number of tokens of the first that other processes hold.
    """
    # `starts` may still be on the CPU, where counting the segments does not wait for the GPU.
    starts = batch["starts"].flatten()
    cu_seqlens = torch.cat([starts.nonzero().flatten(), torch.tensor([len(starts)], device=starts.device)])
    row = {name: x.flatten()[None] for name, x in batch.items() if name not in ("starts", "offsets")}
    device = row["input_ids"].device
    row["cu_seqlens"] = cu_seqlens.to(device, non_blocking=True)
    if "offsets" in batch:
        last = batch["starts"].sum(1).cumsum(0) - 1
        first = torch.cat([last.new_zeros(1), last[:-1] + 1])
        row["rows"] = torch.stack([first, last, batch["offsets"].flatten()]).to(device, non_blocking=True)
    return row


def shard_batch(batch: Batch, segment_length: int, rank: int, size: int) -> Batch:
    """Return the tokens of process `rank` of the `size` that share the sequences of a batch.

    Each segment of `segment_length` tokens is cut into `size` equal parts, of which the process has number `rank`. Its
    rows begin with a start. `offsets`, int64 [B, 1], counts the tokens of a row's first document that precede it.
    """
    length = segment_length // size

    def select(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, size, length)[:, :, rank].flatten(1)

    if "starts" not in batch:
        return {name: select(x) for name, x in batch.items()}
    tokens = torch.arange(batch["starts"].shape[1])
    newest_start = torch.where(batch["starts"], tokens, 0).cummax(1).values
    shard = {name: select(x) for name, x in batch.items()}
    shard["offsets"] = select(tokens - newest_start)[:, :1].clone()
    shard["starts"] = shard["starts"].clone()
    shard["starts"][:, 0] = True
    return shard


def pad_batch(batch: Batch, multiple: int) -> Batch:
    """Pad each row to a multiple of `multiple` tokens, by tokens of id 0 without a target."""
    surplus = -batch["input_ids"].shape[1] % multiple
    return {name: F.pad(x, (0, surplus), value=IGNORE_INDEX if name == "labels" else 0) for name, x in batch.items()}


def training_batches(
    windows: Windows,
    order: Order,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
    pin: bool = False,
) -> Iterator[tuple[int, Batch]]:
    """Yield (step, batch) from `start_step` to the one before `stop_step`. Batches are those of `Windows.load_batch`.

    Labels are shifted already: the loss compares logits[:, t] with labels[:, t]. There is no state but the step, so to
    resume, start at the next step.

    Args:
        order: The order of `windows`. This rank gets order.batch_size / world_size windows of each step.
        stop_step: None for batches without end.
        workers: Threads that read ahead. Their number does not change what is read.
        pin: Return batches in page-locked memory, from which a GPU copies while it computes.

    Raises:
        ValueError: The batch size is not a multiple of `world_size`.
    """
    # Check the arguments now, not when the first batch is read.
    rank_slice(order.window_ids(start_step), rank, world_size)

    def read_step(step: int) -> tuple[int, Batch]:
        batch = windows.load_batch(rank_slice(order.window_ids(step), rank, world_size))
        if pin:
            batch = {name: x.pin_memory() for name, x in batch.items()}
        return step, batch

    steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
    return read_ahead(read_step, steps, workers)


def spaced_windows(windows: Windows, limit: int | None) -> np.ndarray:
    """Return the ids of all windows in order, or of `limit` of them, evenly spaced: int64."""
    count = len(windows) if limit is None else min(limit, len(windows))
    return np.arange(count) * len(windows) // count


def sequential_batches(
    windows: Windows, batch_size: int, *, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[Batch]:
    """Yield all windows once, in order, or `limit` of them, evenly spaced: for validation.

    All ranks get the same number of batches, of the same shapes; the last batch may be smaller. If the ranks cannot
    share it evenly, it is padded with copies of the last window whose labels are all IGNORE_INDEX. Weight the loss of
    each batch by its number of other labels, which may be 0.

    Args:
        batch_size: Windows of one batch of one rank. The ranks share batch_size * world_size neighbours at a time.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size={batch_size} and limit={limit} must be at least 1.")
    ids = spaced_windows(windows, limit)
    count = len(ids)
    rank_slice(np.arange(world_size), rank, world_size)  # Check the arguments now.

    def read_batch(start: int) -> Batch:
        size = min(batch_size * world_size, count - start)
        padded_size = -(-size // world_size) * world_size
        positions = rank_slice(start + np.arange(padded_size), rank, world_size)
        batch = windows.load_batch(ids[positions.clip(max=count - 1)])
        batch["labels"][torch.from_numpy(positions >= count)] = IGNORE_INDEX
        return batch

    return read_ahead(read_batch, range(0, count, batch_size * world_size))


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], workers: int = 1, depth: int = READ_AHEAD
) -> Iterator[Result]:
    """Yield read(item) for each item, in order, computed by threads at most max(depth, workers) results ahead.

    The iterator raises an exception of `read` after the results that precede it. The threads stop when the iterator is
    exhausted or closed.
    """
    # A generator's body runs at its first `next`. The inner one lets this check run at the call.
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")

    def yield_results() -> Iterator[Result]:
        """Submit the first items, then one more for each result that is taken."""
        pool = ThreadPoolExecutor(workers, "glalm-read-ahead")
        try:
            remaining = iter(items)
            pending = deque(pool.submit(read, item) for item in itertools.islice(remaining, max(depth, workers)))
            while pending:
                result = pending.popleft().result()
                for item in itertools.islice(remaining, 1):
                    pending.append(pool.submit(read, item))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return yield_results()
