import itertools
import math

import pytest
import torch

from glalm.config import OptimConfig
from glalm.model import GLALMConfig, GLALMForCausalLM
from glalm.train.optim import adamw, learning_rate


def test_schedule():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.1 + 0.9 / 10)
    assert rates[9] == 1.0 == max(rates)
    assert rates[59] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine
    assert rates[34] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))


def test_schedule_without_warmup_and_all_warmup():
    assert learning_rate(1, 1, OptimConfig(warmup_steps=0)) == pytest.approx(3e-5)
    assert learning_rate(5, 5, OptimConfig(warmup_steps=5)) == pytest.approx(3e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_decay_is_for_the_matrices_of_linear_layers(tied):
    config = GLALMConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_heads=2, intermediate_size=8, tie_word_embeddings=tied
    )
    model = GLALMForCausalLM(config)
    optimizer = adamw(model, OptimConfig(weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and "embeddings" not in name
        assert decay[id(p)] == (0.5 if matrix else 0.0), name
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied
    assert len(decay) == len(list(model.parameters()))


def test_one_step_is_adamws(monkeypatch):
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = adamw(model, OptimConfig(weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, lr=0.01, min_lr=0.01))
    model.weight.grad = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -0.1]])
    optimizer.step()
    expected = before * (1 - 0.01 * 0.1) - 0.01 * model.weight.grad.sign()
    torch.testing.assert_close(model.weight.detach(), expected)
