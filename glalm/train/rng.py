"""The state of every random number generator of a process, as tensors: no pickle holds it."""

import json
import random

import numpy as np
import torch
from torch import Tensor


def states() -> dict[str, Tensor]:
    """uint8 tensors by the generator's name: torch's, CUDA's (of the current device), Python's, numpy's."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"] = {name: np.asarray(value).tolist() for name, value in numpy["state"].items()}
    found = {"torch": torch.get_rng_state(), "python": _text(random.getstate()), "numpy": _text(numpy)}
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore(saved: dict[str, Tensor]) -> None:
    """Sets the generators to `saved`, what `states` returned. One that is not there now, or was not then, is left."""
    torch.set_rng_state(saved["torch"])
    version, numbers, gauss = json.loads(bytes(saved["python"].tolist()))
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(json.loads(bytes(saved["numpy"].tolist())))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def reseed(seed: int, step: int, rank: int) -> None:
    """Sets every generator from these three alone: what a process does that has no state of its own to go on from."""
    [mixed] = np.random.SeedSequence([seed, step, rank]).generate_state(1).tolist()
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def _text(value) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
