"""The order in which a run reads windows: a pure function of the seed and the step, for any number of ranks.

Nothing is stored and nothing is consumed, so a checkpoint needs only the seed and the step.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ROUNDS = 8
CYCLE = 1024  # windows in which a mixture has its shares exactly, so a weight counts to a thousandth
COUNT_BLOCK = 2**18  # windows that are listed at once to be counted


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

    Raises:
        ValueError: The weights do not name each source once, or leave no windows.
    """

    seed: int
    batch_size: int
    windows: Mapping[str, int]
    weights: Mapping[str, float] | None = None

    def __post_init__(self):
        if self.batch_size < 1 or sum(self.windows.values()) < 1:
            raise ValueError(f"batch_size={self.batch_size} and windows={dict(self.windows)} must be at least 1.")
        if self.weights is not None:
            check_weights(self.weights, self.windows)

    def window_ids(self, step: int) -> np.ndarray:
        """Return the ids of the windows of one optimizer step: int64 [batch_size]."""
        if step < 0:
            raise ValueError(f"step={step} must be at least 0.")
        return self._ids_at(np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64))

    def count_windows(self, start: int, stop: int) -> dict[str, int]:
        """Return how many windows of each source the steps [start, stop) read.

        This takes constant time with weights. Without, it takes the time to list the windows of the first and the last
        epoch that are read in part.
        """
        first = start * self.batch_size
        last = stop * self.batch_size
        if self.weights is None:
            epoch = sum(self.windows.values())
            # Complete epochs, if any, lie between `begin` and `end`.
            begin = min(last, -(-first // epoch) * epoch)
            end = max(begin, last // epoch * epoch)
            complete = (end - begin) // epoch * np.array(list(self.windows.values()))
            total = complete + self._count_listed(first, begin) + self._count_listed(end, last)
        else:
            total = self._count_mixed(last) - self._count_mixed(first)
        return dict(zip(self.windows, total.tolist(), strict=True))

    def _count_listed(self, first: int, last: int) -> np.ndarray:
        """Count the windows of each source at the places [first, last) by their ids."""
        ends = np.cumsum(list(self.windows.values()))
        total = np.zeros(len(ends), dtype=np.int64)
        for place in range(first, last, COUNT_BLOCK):
            ids = self._ids_at(np.arange(place, min(place + COUNT_BLOCK, last), dtype=np.int64))
            total += np.bincount(np.searchsorted(ends, ids, side="right"), minlength=len(ends))
        return total

    def _count_mixed(self, places: int) -> np.ndarray:
        """Count the windows of each source among the first `places` of a mixture. All cycles have the same counts."""
        counts = self._cycle_counts()
        cycles, rest = divmod(places, CYCLE)
        sources, _ = assign_sources(self.seed, cycles, counts)
        return cycles * np.array(counts) + np.bincount(sources[:rest], minlength=len(counts))

    def _cycle_counts(self) -> tuple[int, ...]:
        return cycle_counts([self.weights[name] for name in self.windows])

    def _ids_at(self, places: np.ndarray) -> np.ndarray:
        """Return the window ids at neighbouring places of the run, which count the windows that precede them."""
        if self.weights is None:
            return shuffled_ids(places, sum(self.windows.values()), self.seed)
        sources, numbers = mix_sources(places, self.seed, self._cycle_counts())
        ids = np.empty_like(places)
        first = 0
        for i, (name, size) in enumerate(self.windows.items()):
            mask = sources == i
            if mask.any():
                ids[mask] = first + shuffled_ids(numbers[mask], size, f"{self.seed}/{name}")
            first += size
        return ids


def shuffled_ids(places: np.ndarray, n: int, seed: int | str) -> np.ndarray:
    """Return what stands at `places` (int64, rising) of an endless sequence of permutations of range(n)."""
    epochs, places = np.divmod(places, n)
    ids = np.empty(len(places), dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        mask = epochs == epoch
        ids[mask] = permute_indices(places[mask], n, round_keys(seed, epoch))
    return ids


def mix_sources(places: np.ndarray, seed: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source at each of the neighbouring `places` of a mixture, and its index within that source.

    Args:
        counts: How many of the CYCLE places of each cycle every source has. The order differs between cycles.
    """
    sources = np.empty_like(places)
    numbers = np.empty_like(places)
    cycles, within = np.divmod(places, CYCLE)
    for cycle in range(int(cycles[0]), int(cycles[-1]) + 1):
        mask = cycles == cycle
        cycle_sources, cycle_numbers = assign_sources(seed, cycle, counts)
        sources[mask] = cycle_sources[within[mask]]
        numbers[mask] = cycle_numbers[within[mask]]
    numbers += cycles * np.array(counts)[sources]
    return sources, numbers


@lru_cache(maxsize=4)
def assign_sources(seed: int, cycle: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source at each place of a cycle, and its index among that source's places in the cycle."""
    cells = permute_indices(np.arange(CYCLE), CYCLE, round_keys(f"{seed}/mixture", cycle))
    sources = np.searchsorted(np.cumsum(counts), cells, side="right")
    numbers = np.empty(CYCLE, dtype=np.int64)
    for i, count in enumerate(counts):
        numbers[sources == i] = np.arange(count)
    return sources, numbers


def cycle_counts(weights: list[float]) -> tuple[int, ...]:
    """Share CYCLE places out by weight: by the largest remainders, and at least one place for a weight above 0."""
    shares = np.array(weights) / sum(weights) * CYCLE
    positive = np.array(weights) > 0
    counts = np.where(positive, np.maximum(np.floor(shares), 1), 0).astype(np.int64)
    while counts.sum() != CYCLE:
        change = 1 if counts.sum() < CYCLE else -1
        candidates = positive if change > 0 else counts > 1
        counts[np.argmax(np.where(candidates, (shares - counts) * change, -np.inf))] += change
    return tuple(counts.tolist())


def check_weights(weights: Mapping[str, float], windows: Mapping[str, int]) -> None:
    """Raise ValueError unless the weights name each source, are 0 or more, and are 0 for sources without windows."""
    if weights.keys() != windows.keys():
        sources = ", ".join(windows)
        raise ValueError(f"weights={dict(weights)} must name each source of the set, with 0 to exclude it: {sources}.")
    total = sum(weights.values())
    if min(weights.values()) < 0 or not 0 < total < math.inf:
        raise ValueError(f"weights={dict(weights)} must be 0 or more, and one above 0.")
    for name, weight in weights.items():
        if weight and not windows[name]:
            raise ValueError(f"weights.{name}={weight}: this source has too few tokens for one window.")


def rank_slice(ids: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return the contiguous share of `ids` of one rank. Raises ValueError if `world_size` does not divide them."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of world_size={world_size} ranks.")
    if len(ids) % world_size:
        raise ValueError(f"batch_size={len(ids)} is not a multiple of world_size={world_size}. Change one of them.")
    share = len(ids) // world_size
    return ids[rank * share : (rank + 1) * share]


def round_keys(seed: int | str, epoch: int) -> np.ndarray:
    """Return the keys of a permutation: uint64 [ROUNDS]. They are hashed, so neighbouring seeds are unrelated."""
    return np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")


def permute_indices(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return where a keyed permutation of range(n) sends each of `indices`: int64, same shape, in O(1) memory.

    This is a Feistel network on a x b cells, a * b >= n, with addition modulo a and b in place of xor, and cycle
    walking: a result beyond n is permuted again until it is below n, which keeps the map one to one (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    x = indices.astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = np.divmod(x[outside], np.uint64(b))
        for key in keys.reshape(-1, 2):
            left = (left + _mix_bits(right ^ key[0])) % np.uint64(a)
            right = (right + _mix_bits(left ^ key[1])) % np.uint64(b)
        x[outside] = left * np.uint64(b) + right
        outside = x >= n
    return x.astype(np.int64)


def _mix_bits(x: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64 (Steele, Lea and Flood, 2014), cut to 63 bits so that the sum above does not wrap.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)
