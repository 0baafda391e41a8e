"""Random numbers of one's own: what is drawn in here changes no random state outside."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch


def forked(device: torch.device) -> AbstractContextManager:
    """torch's states, of the CPU and of `device`, are afterwards as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch draws from `seed`."""
    with forked(device):
        torch.manual_seed(seed)
        yield


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """torch, NumPy and Python go on from the states they are in."""
    states = random.getstate(), np.random.get_state()
    with forked(device):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
