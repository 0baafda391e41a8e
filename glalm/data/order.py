"""The order in which a run reads windows: a pure function of the seed and the step, for any number of ranks.

Nothing is stored and nothing is consumed, so a checkpoint needs only the seed, the step and what batches there were.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

ROUNDS = 8
# After each CYCLE windows a mixture has its exact shares, so a weight is rounded to 1 / CYCLE.
CYCLE = 1024
COUNT_BLOCK = 2**18  # Window ids are counted in blocks of this size, which bounds memory.


@dataclass(frozen=True)
class Order:
    """The order of a run over the windows of several sources.

    Without weights, the windows of all sources are one pool. Each epoch reads every window once, in a permutation of
    its own, and a batch that reaches the end of an epoch continues in the next one. With weights, each source has
    epochs of its own.

    Args:
        batch_size: Windows of one optimizer step over all ranks.
        windows: {source: its number of windows}. Window ids count through the sources in this order.
        weights: {source: its share of the training windows, up to a common factor}, or None.
        start_step: The first step. Another order has the steps before it.
        start_position: The windows that are read before that step, counted from the last change of the weights.
        windows_read: {source: its windows that are read before position 0 of a mixture}, if the weights were others.

    Raises:
        ValueError: The weights do not name each source once, or leave no windows.
    """

    seed: int
    batch_size: int
    windows: Mapping[str, int]
    weights: Mapping[str, float] | None = None
    start_step: int = 0
    start_position: int = 0
    windows_read: Mapping[str, int] | None = None

    def __post_init__(self):
        if self.batch_size < 1 or sum(self.windows.values()) < 1:
            raise ValueError(f"batch_size={self.batch_size} and windows={dict(self.windows)} must be at least 1.")
        if self.weights is not None:
            check_weights(self.weights, self.windows)

    def window_ids(self, step: int) -> np.ndarray:
        """Return the ids of the windows of one optimizer step: int64 [batch_size]."""
        if step < self.start_step:
            raise ValueError(f"step={step} must be at least {self.start_step}.")
        return self._ids_at(np.arange(self.position(step), self.position(step + 1), dtype=np.int64))

    def position(self, step: int) -> int:
        """Return the number of windows before `step`, counted from the last change of the weights."""
        return self.start_position + (step - self.start_step) * self.batch_size

    def continue_at(self, step: int, batch_size: int, weights: Mapping[str, float] | None) -> "Order":
        """Return the order of the same windows, from `step` on, with another batch or other weights.

        It begins where this order is at the end of the step before: with the same weights at the next window, with
        others at the next window of each source.

        Raises:
            ValueError: Only one of the two orders has weights, so that their epochs are not the same.
        """
        if weights == self.weights:
            return replace(self, batch_size=batch_size, start_step=step, start_position=self.position(step))
        if weights is None or self.weights is None:
            raise ValueError("An order without weights cannot continue one with weights, nor the reverse.")
        counts = dict(zip(self.windows, self._count_mixed(self.position(step)).tolist(), strict=True))
        before = self.windows_read or {}
        windows_read = {name: before.get(name, 0) + count for name, count in counts.items()}
        return Order(self.seed, batch_size, self.windows, weights, step, 0, windows_read)

    def count_windows(self, start: int, stop: int) -> dict[str, int]:
        """Return how many windows of each source the steps [start, stop) read.

        This takes constant time with weights or of one source. Else it takes the time to list the windows of the first
        and the last epoch that are read in part.
        """
        if len(self.windows) == 1:
            return dict.fromkeys(self.windows, (stop - start) * self.batch_size)
        begin = self.position(start)
        end = self.position(stop)
        if self.weights is None:
            epoch = sum(self.windows.values())
            epochs_begin = min(end, -(-begin // epoch) * epoch)
            epochs_end = max(epochs_begin, end // epoch * epoch)
            complete = (epochs_end - epochs_begin) // epoch * np.array(list(self.windows.values()))
            total = complete + self._count_listed(begin, epochs_begin) + self._count_listed(epochs_end, end)
        else:
            total = self._count_mixed(end) - self._count_mixed(begin)
        return dict(zip(self.windows, total.tolist(), strict=True))

    def _count_listed(self, begin: int, end: int) -> np.ndarray:
        """Count the windows of each source at positions [begin, end) of the run by their ids: int64 [sources]."""
        ends = np.cumsum(list(self.windows.values()))
        total = np.zeros(len(ends), dtype=np.int64)
        for block in range(begin, end, COUNT_BLOCK):
            ids = self._ids_at(np.arange(block, min(block + COUNT_BLOCK, end), dtype=np.int64))
            total += np.bincount(np.searchsorted(ends, ids, side="right"), minlength=len(ends))
        return total

    def _count_mixed(self, windows: int) -> np.ndarray:
        """Count the windows of each source among the first `windows` of a mixture: int64 [sources].

        All cycles have the same counts, so only the last, incomplete cycle is counted window by window.
        """
        counts = self._cycle_counts()
        cycles, rest = divmod(windows, CYCLE)
        sources, _ = assign_sources(self.seed, cycles, counts)
        return cycles * np.array(counts) + np.bincount(sources[:rest], minlength=len(counts))

    def _cycle_counts(self) -> tuple[int, ...]:
        """Return the windows of each source in a cycle of the mixture, in the order of `windows`."""
        assert self.weights is not None  # Only a mixture has cycles.
        return cycle_counts([self.weights[name] for name in self.windows])

    def _ids_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the window ids at consecutive positions: int64 [positions].

        A position is the number of windows that are read before it, counted from the last change of the weights.
        """
        if self.weights is None:
            return shuffled_ids(positions, sum(self.windows.values()), self.seed)
        sources, numbers = mix_sources(positions, self.seed, self._cycle_counts())
        ids = np.empty_like(positions)
        first = 0
        for i, (name, size) in enumerate(self.windows.items()):
            mask = sources == i
            if mask.any():
                read = (self.windows_read or {}).get(name, 0)
                ids[mask] = first + shuffled_ids(read + numbers[mask], size, f"{self.seed}/{name}")
            first += size
        return ids


def shuffled_ids(positions: np.ndarray, n: int, seed: int | str) -> np.ndarray:
    """Return the elements at `positions` of the infinite sequence of epochs, each a permutation of range(n): int64."""
    epochs, within = np.divmod(positions, n)
    ids = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        mask = epochs == epoch
        ids[mask] = permute_indices(within[mask], n, round_keys(seed, epoch))
    return ids


def mix_sources(positions: np.ndarray, seed: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source at each of the consecutive `positions` of a mixture, and its position within that source.

    Args:
        counts: The number of windows that each source has in every cycle. The order differs between cycles.
    """
    sources = np.empty_like(positions)
    numbers = np.empty_like(positions)
    cycles, within = np.divmod(positions, CYCLE)
    for cycle in range(int(cycles[0]), int(cycles[-1]) + 1):
        mask = cycles == cycle
        cycle_sources, cycle_numbers = assign_sources(seed, cycle, counts)
        sources[mask] = cycle_sources[within[mask]]
        numbers[mask] = cycle_numbers[within[mask]]
    numbers += cycles * np.array(counts)[sources]
    return sources, numbers


@lru_cache(maxsize=4)
def assign_sources(seed: int, cycle: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source at each position of a cycle, and the number of its windows that precede it in the cycle."""
    cells = permute_indices(np.arange(CYCLE), CYCLE, round_keys(f"{seed}/mixture", cycle))
    sources = np.searchsorted(np.cumsum(counts), cells, side="right")
    numbers = np.empty(CYCLE, dtype=np.int64)
    for i, count in enumerate(counts):
        numbers[sources == i] = np.arange(count)
    return sources, numbers


def cycle_counts(weights: list[float]) -> tuple[int, ...]:
    """Return the windows of each source in a cycle, by largest remainders; at least 1 for a weight above 0."""
    shares = np.array(weights) / sum(weights) * CYCLE
    positive = np.array(weights) > 0
    counts = np.where(positive, np.maximum(np.floor(shares), 1), 0).astype(np.int64)
    while counts.sum() != CYCLE:
        change = 1 if counts.sum() < CYCLE else -1
        candidates = positive if change > 0 else counts > 1
        counts[np.argmax(np.where(candidates, (shares - counts) * change, -np.inf))] += change
    return tuple(counts.tolist())


def check_weights(weights: Mapping[str, float], windows: Mapping[str, int]) -> None:
    """Raise ValueError unless the weights name each source, are 0 or more, and are 0 for sources without windows.

    A cycle also must have a place for each source with a weight above 0.
    """
    if weights.keys() != windows.keys():
        sources = ", ".join(windows)
        advice = "In a YAML file, quote a name that could be a number."
        required = f"must name each source of the set, with 0 to exclude it: {sources}"
        raise ValueError(f"weights={dict(weights)} {required}. {advice}")
    total = sum(weights.values())
    if min(weights.values()) < 0 or not 0 < total < math.inf:
        raise ValueError(f"weights={dict(weights)} must be 0 or more, and one above 0.")
    for name, weight in weights.items():
        if weight and not windows[name]:
            problem = f"weights.{name}={weight}: this source has too few tokens for one window."
            raise ValueError(f"{problem} Set its weight to 0, or choose a smaller seq_len.")
    used = sum(weight > 0 for weight in weights.values())
    if used > CYCLE:
        problem = f"weights: {used} sources have one above 0, but a mixture has places for {CYCLE}."
        raise ValueError(f"{problem} Set those of the smallest sources to 0, or prepare several sources as one.")


def rank_slice(ids: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return the contiguous share of `ids` of one rank. Raises ValueError if `world_size` does not divide them."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of world_size={world_size} ranks.")
    if len(ids) % world_size:
        raise ValueError(f"batch_size={len(ids)} is not a multiple of world_size={world_size}. Change one of them.")
    share = len(ids) // world_size
    return ids[rank * share : (rank + 1) * share]


def round_keys(seed: int | str, epoch: int) -> np.ndarray:
    """Return the keys of a permutation: uint64 [ROUNDS].

    They are a hash of the seed and the epoch, so neighbouring seeds give unrelated permutations.
    """
    return np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")


def permute_indices(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return where a keyed permutation of range(n) maps each of `indices`: int64, same shape.

    The permutation is never stored. It is a Feistel network on rows x columns >= n cells, with addition modulo rows
    and columns in place of xor, and cycle walking: a result of n or more is permuted again until it is below n, which
    keeps the map one to one (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    x = indices.astype(np.uint64)
    pending = np.ones(x.shape, dtype=bool)
    while pending.any():
        row, column = np.divmod(x[pending], np.uint64(columns))
        for row_key, column_key in keys.reshape(-1, 2):  # two rounds for each pair of keys
            row = (row + _mix_bits(column ^ row_key)) % np.uint64(rows)
            column = (column + _mix_bits(row ^ column_key)) % np.uint64(columns)
        x[pending] = row * np.uint64(columns) + column
        pending = x >= n
    return x.astype(np.int64)


def _mix_bits(x: np.ndarray) -> np.ndarray:
    """Hash each uint64 to 63 bits by the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    # The products overflow on purpose. 63 bits are returned so that the sums in permute_indices do not.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)
