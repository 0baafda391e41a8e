"""Which windows a step trains on: a pure function of (seed, step), the same for any number of ranks.

Nothing is stored and nothing is consumed, so a checkpoint needs no more than the seed and the step.
"""

import hashlib
import math

import numpy as np

ROUNDS = 8


def window_ids(seed: int, step: int, batch_size: int, num_windows: int) -> np.ndarray:
    """Global sample ids of one optimiser step: int64 [batch_size], each in [0, num_windows).

    The steps walk through epoch after epoch of `num_windows` windows; each epoch is a permutation of its own.
    A batch that reaches the end of an epoch goes on in the next.
    """
    for name, value, least in (
        ("step", step, 0),
        ("batch_size", batch_size, 1),
        ("num_windows", num_windows, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), num_windows)
    ids = np.empty(batch_size, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        ids[here] = permute(places[here], num_windows, round_keys(seed, epoch))
    return ids


def rank_slice(ids: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The contiguous share of `ids` that belongs to `rank` of `world`; ValueError if it is not 1 / world."""
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} is not one of world={world} ranks")
    if len(ids) % world:
        raise ValueError(f"batch_size={len(ids)} is not a multiple of world={world}: change one of them")
    share = len(ids) // world
    return ids[rank * share : (rank + 1) * share]


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """uint64 [ROUNDS], from a hash, so that neighbouring seeds and epochs have nothing in common."""
    return np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")


def permute(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
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
