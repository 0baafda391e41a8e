"""Softmax attention of processes that share sequences, by the variable-length kernel, which only CUDA has."""

import pytest
import torch
from test_context_exchange import run_in_turns

from glalm.kernels.context_parallel import ContextShard
from glalm.model.config import ModelConfig
from glalm.model.mixers.attention import Attention

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SIZE, T = 3, 64  # processes, and the tokens of each


@pytest.mark.parametrize("window", [None, 50])
def test_shards_equal_whole_sequences(window, monkeypatch):
    """The last query of a shard sees the last key of its own shard, and all keys before it."""
    torch.manual_seed(0)
    config = ModelConfig(mixer="attention", hidden_size=128, num_heads=2, vocab_size=8)
    config.attention.window = window
    mixer = Attention(config).to(DEVICE, torch.bfloat16)
    x = torch.randn(2, SIZE * T, 128, device=DEVICE, dtype=torch.bfloat16)

    def compute(rank: int | None) -> list[torch.Tensor]:
        cut = (lambda y: y) if rank is None else (lambda y: y.chunk(SIZE, 1)[rank])
        context = None if rank is None else ContextShard("turns", rank, SIZE)
        with torch.no_grad():
            return [mixer(cut(x), context=context)[0]]

    shards = [output for (output,) in run_in_turns(compute, SIZE, monkeypatch)]
    [whole] = compute(None)
    error = (torch.cat(shards, 1).float() - whole.float()).norm() / whole.float().norm()
    assert error < 1e-2
