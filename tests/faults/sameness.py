"""Compare two runs by their last checkpoints and their metrics."""

from pathlib import Path

import torch

from glalm.data.files import read_jsonl
from glalm.train import staging
from glalm.train.checkpoint import latest_checkpoint

TIMES = {"tokens_per_second", "tokens_per_second_per_gpu", "mfu", "peak_memory_gib", "data_wait_seconds"}


def rows(folder: Path) -> list[dict]:
    """Return a run's metrics without those that depend on the clock."""
    found = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the full tensors of a checkpoint, without random states, however many processes wrote it."""
    stored = staging.index_safetensors(path.glob("*.safetensors"))
    names = [name for name in stored if not name.startswith("rng.")]
    tensors = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype) for name in names}
    staging.read_tensors(stored, tensors)
    return tensors


def assert_same(one: Path, other: Path) -> None:
    """Assert that two runs' last checkpoints and their metrics are equal bit for bit."""
    a, b = (weights(latest_checkpoint(folder / "checkpoints")) for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert rows(one) == rows(other)
