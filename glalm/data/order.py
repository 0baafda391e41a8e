"""Which windows a step trains on: a pure function of (seed, step), the same for any number of ranks.

Nothing is stored and nothing is consumed, so a checkpoint needs no more than the seed and the step.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ROUNDS = 8
CYCLE = 1024  # places in which a mixture has its shares exactly: weights count to a thousandth
AT_ONCE = 2**18  # ids that are counted at once


@dataclass(frozen=True)
class Order:
    """The order of a run over the windows of several sources.

    windows: {source: how many it has}; global ids count through them in this order. weights: {source: its share of
    the training windows, up to a common factor}; None reads all sources as one, in proportion to their sizes, each
    epoch having every window once, in a permutation of its own; a batch that reaches the end of an epoch goes on in the
    next. With weights, each source has epochs of its own.
    Raises ValueError if the weights do not name each source, once, or leave no windows.
    """

    seed: int
    batch_size: int
    windows: Mapping[str, int]
    weights: Mapping[str, float] | None = None

    def __post_init__(self):
        if self.batch_size < 1 or sum(self.windows.values()) < 1:
            raise ValueError(f"batch_size={self.batch_size} and windows={dict(self.windows)} must be at least 1")
        if self.weights is not None:
            check_weights(self.weights, self.windows)

    def window_ids(self, step: int) -> np.ndarray:
        """Global window ids of one optimiser step: int64 [batch_size]."""
        if step < 0:
            raise ValueError(f"step={step} must be at least 0")
        return self._at(np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64))

    def count_windows(self, start: int, stop: int) -> dict[str, int]:
        """How many windows of each source the steps [start, stop) read.

        With weights in O(1); without, in the time of listing what is read of the first epoch and of the last.
        """
        first, last = start * self.batch_size, stop * self.batch_size
        if self.weights is None:
            epoch = sum(self.windows.values())
            begin = min(last, -(-first // epoch) * epoch)  # whole epochs, if any, are from here
            end = max(begin, last // epoch * epoch)  # to here
            whole = (end - begin) // epoch * np.array(list(self.windows.values()))
            total = whole + self._listed(first, begin) + self._listed(end, last)
        else:
            total = self._dealt(last) - self._dealt(first)
        return dict(zip(self.windows, total.tolist(), strict=True))

    def _listed(self, first: int, last: int) -> np.ndarray:
        """How many of the places [first, last) each source has, by their ids."""
        total, ends = np.zeros(len(self.windows), dtype=np.int64), np.cumsum(list(self.windows.values()))
        for place in range(first, last, AT_ONCE):
            ids = self._at(np.arange(place, min(place + AT_ONCE, last), dtype=np.int64))
            total += np.bincount(np.searchsorted(ends, ids, side="right"), minlength=len(ends))
        return total

    def _dealt(self, places: int) -> np.ndarray:
        """How many of the first `places` of a mixture each source has: every cycle deals out the same counts."""
        counts = self._cycle_counts()
        cycles, rest = divmod(places, CYCLE)
        sources, _ = assign_sources(self.seed, cycles, counts)
        return cycles * np.array(counts) + np.bincount(sources[:rest], minlength=len(counts))

    def _cycle_counts(self) -> tuple[int, ...]:
        return cycle_counts([self.weights[name] for name in self.windows])

    def _at(self, places: np.ndarray) -> np.ndarray:
        if self.weights is None:
            return shuffled_ids(places, sum(self.windows.values()), self.seed)
        sources, numbers = mix_sources(places, self.seed, self._cycle_counts())
        ids, first = np.empty_like(places), 0
        for i, (name, size) in enumerate(self.windows.items()):
            here = sources == i
            ids[here] = first + shuffled_ids(numbers[here], size, f"{self.seed}/{name}") if here.any() else 0
            first += size
        return ids


def shuffled_ids(places: np.ndarray, n: int, seed: int | str) -> np.ndarray:
    """What stands at each of `places` (int64, rising) of an endless row of permutations of range(n), one an epoch."""
    epochs, places = np.divmod(places, n)
    ids = np.empty(len(places), dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        ids[here] = permute_indices(places[here], n, round_keys(seed, epoch))
    return ids


def mix_sources(places: np.ndarray, seed: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which source has each of the neighbouring `places`, and the how-manieth of that source it is (from 0 on).

    counts: how many of each cycle's CYCLE places every source has; each cycle deals them out in an order of its own.
    """
    sources, numbers = np.empty_like(places), np.empty_like(places)
    cycles, within = np.divmod(places, CYCLE)
    for cycle in range(int(cycles[0]), int(cycles[-1]) + 1):
        here = cycles == cycle
        dealt, ranks = assign_sources(seed, cycle, counts)
        sources[here], numbers[here] = dealt[within[here]], ranks[within[here]]
    numbers += cycles * np.array(counts)[sources]
    return sources, numbers


@lru_cache(maxsize=4)
def assign_sources(seed: int, cycle: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each place of a cycle, and how many places of the cycle that source had before it."""
    cells = permute_indices(np.arange(CYCLE), CYCLE, round_keys(f"{seed}/mixture", cycle))
    sources = np.searchsorted(np.cumsum(counts), cells, side="right")
    ranks = np.empty(CYCLE, dtype=np.int64)
    for i, count in enumerate(counts):
        ranks[sources == i] = np.arange(count)
    return sources, ranks


def cycle_counts(weights: list[float]) -> tuple[int, ...]:
    """CYCLE places shared out by weight: largest remainders first, and one at least for a weight above 0."""
    shares, wanted = np.array(weights) / sum(weights) * CYCLE, np.array(weights) > 0
    counts = np.where(wanted, np.maximum(np.floor(shares), 1), 0).astype(np.int64)
    while counts.sum() != CYCLE:
        step = 1 if counts.sum() < CYCLE else -1
        may = counts > 1 if step < 0 else wanted
        counts[np.argmax(np.where(may, (shares - counts) * step, -np.inf))] += step
    return tuple(counts.tolist())


def check_weights(weights: Mapping[str, float], windows: Mapping[str, int]) -> None:
    if weights.keys() != windows.keys():
        raise ValueError(
            f"weights={dict(weights)} must name each source of the set, with 0 to leave it out: {', '.join(windows)}"
        )
    if min(weights.values()) < 0 or not sum(weights.values()) > 0 or not math.isfinite(sum(weights.values())):
        raise ValueError(f"weights={dict(weights)} must be 0 or more, and one above 0")
    if empty := [name for name, weight in weights.items() if weight and not windows[name]]:
        raise ValueError(f"weights.{empty[0]}={weights[empty[0]]}: this source has too few tokens for one window")


def rank_slice(ids: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous share of `ids` that belongs to `rank` of `world_size`; ValueError if it is not 1 / world_size."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of world_size={world_size} ranks")
    if len(ids) % world_size:
        raise ValueError(f"batch_size={len(ids)} is not a multiple of world_size={world_size}: change one of them")
    share = len(ids) // world_size
    return ids[rank * share : (rank + 1) * share]


def round_keys(seed: int | str, epoch: int) -> np.ndarray:
    """uint64 [ROUNDS], from a hash, so that neighbouring seeds and epochs have nothing in common."""
    return np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")


def permute_indices(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of range(n) sends each of `places`: int64, same shape, in O(1) memory.

    A Feistel network on a x b cells, a * b >= n, with addition modulo a and b in place of xor, and cycle
    walking: what lands beyond n is sent on until it is below n, which keeps the map one to one (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    x = places.astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = np.divmod(x[outside], np.uint64(b))
        for key in keys.reshape(-1, 2):
            left = (left + _mix(right ^ key[0])) % np.uint64(a)
            right = (right + _mix(left ^ key[1])) % np.uint64(b)
        x[outside] = left * np.uint64(b) + right
        outside = x >= n
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64 (Steele, Lea and Flood, 2014), cut to 63 bits: the sum above must not wrap.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)
