"""Save, restore and seed the random number generators of PyTorch, CUDA, Python and NumPy."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def get_random_states() -> dict[str, Tensor]:
    """Return the state of every generator of this process as uint8 tensors, so that no pickle holds it.

    Returns:
        The states of "torch", "python" and "numpy", and of "cuda" for the current device if there is one.
    """
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"] = {name: np.asarray(value).tolist() for name, value in numpy_state["state"].items()}
    states = {"torch": torch.get_rng_state()}
    for name, state in (("python", random.getstate()), ("numpy", numpy_state)):
        states[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(saved: dict[str, Tensor]) -> None:
    """Set the generators to states that `get_random_states` returned.

    The CUDA generator keeps its state if `saved` has none, which is so when it was saved without a GPU.
    """
    torch.set_rng_state(saved["torch"])
    version, numbers, gauss = json.loads(bytes(saved["python"].tolist()))
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(json.loads(bytes(saved["numpy"].tolist())))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def seed_generators(seed: int) -> None:
    """Seed every generator of this process, as Accelerate's `set_seed` does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # It takes no larger numbers.
    torch.manual_seed(seed)


def seed_random_states(seed: int, step: int, rank: int) -> None:
    """Seed every generator from these three numbers alone, for a process that has no saved states."""
    [combined] = np.random.SeedSequence([seed, step, rank]).generate_state(1).tolist()
    seed_generators(combined)


@contextmanager
def preserve_random_states(device: torch.device) -> Iterator[None]:
    """Restore the generators of PyTorch, `device`, Python and NumPy on exit."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of PyTorch on the CPU and on `device`, and restore them on exit."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
