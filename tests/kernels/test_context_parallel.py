"""What processes that share sequences exchange, as one process can check it; see tests/train/test_context_parallel.py."""

import pytest
import torch

from glalm.kernels import context_parallel
from glalm.kernels.context_parallel import ContextShard, exchange_states


@pytest.fixture
def alone(monkeypatch) -> ContextShard:
    """Return the shard of the only process of a group."""
    monkeypatch.setattr(context_parallel, "all_gather", lambda x, group, size: x[None])
    return ContextShard("alone", 0, 1)


def test_gradients_of_matrices_are_not_rounded_under_autocast(alone):
    local, initial = torch.randn(2, 1, 2, 5, 4)
    decay = torch.randn(1, 2, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, final = exchange_states(local, decay, initial, alone, is_matrix=True)
        final.sum().backward()
    expected = torch.ones(1, 2, 5, 4) @ initial.mT
    torch.testing.assert_close(decay.grad, expected)
