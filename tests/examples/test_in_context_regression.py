"""The linear transformer of examples/in_context_regression, against its definition and against gradient descent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "in_context_regression"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return pytest.importorskip("linear_transformer")


@pytest.fixture
def regressions():
    """Return x [tasks, N, d], y [tasks, N] and the query's x [tasks, d], in float64."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 5, generator=random, dtype=torch.float64)
    y = (x @ torch.randn(3, 5, 1, generator=random, dtype=torch.float64))[..., 0]
    return x, y, torch.randn(3, 5, generator=random, dtype=torch.float64)


def as_tasks(example, x, y, query):
    """Return the regressions as the tasks of one model."""
    N = x.shape[1]
    return example.Tasks((x.mT @ x / N)[None], (x.mT @ y[..., None] / N)[None], query[None, :, None], y[None, :, 0])


def attend(weights, Z):
    """The definition: Z + 1/N Z Q' Z^T A Z P' with the matrix of all tokens, layer by layer."""
    N = Z.shape[1] - 1
    A = torch.diag(torch.tensor([1.0] * N + [0.0], dtype=Z.dtype))
    for P, Q in weights:
        P = torch.block_diag(P, torch.ones(1, 1, dtype=Z.dtype))
        Q = torch.block_diag(Q, torch.zeros(1, 1, dtype=Z.dtype))
        Z = Z + Z @ Q @ Z.mT @ A @ Z @ P / N
    return -Z[:, -1, -1]


def test_the_recurrent_form_is_attention(example, regressions):
    x, y, query = regressions
    weights = 0.3 * torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    examples = torch.cat([x, y[..., None]], -1)
    Z = torch.cat([examples, torch.nn.functional.pad(query, (0, 1))[:, None]], 1)
    found = example.predict(weights[None], as_tasks(example, x, y, query))[0]
    torch.testing.assert_close(found, attend(weights, Z))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_layer_with_p_0_and_q_minus_eta_is_a_step_of_gradient_descent(layers, example, regressions):
    """From w = 0, on half of the mean squared error of the examples, whose gradient is autograd's."""
    x, y, query = regressions
    eta = 0.3
    w = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(layers):
        loss = 0.5 * ((x @ w[..., None])[..., 0] - y).square().mean(1).sum()
        w = (w - eta * torch.autograd.grad(loss, w)[0]).detach().requires_grad_()
    weights = example.gradient_descent_weights(eta, layers, 5).double()
    found = example.predict(weights, as_tasks(example, x, y, query))[0]
    torch.testing.assert_close(found, (query * w).sum(1), rtol=1e-6, atol=1e-7)


def test_tasks_are_those_of_the_paper(example):
    normal = example.draw_tasks(1, 4000, np.random.default_rng(0), examples=200)
    torch.testing.assert_close(normal.xx.mean((0, 1)), torch.eye(5), rtol=0, atol=0.02)
    assert normal.label.square().mean().item() == pytest.approx(5, rel=0.1)  # of w and x, both from N(0, I)
    heavy = example.draw_tasks(1, 4000, np.random.default_rng(0), examples=200, heavy_tails=True)
    squared_length = heavy.query.square().sum(-1)
    assert squared_length.mean().item() == pytest.approx(1, rel=0.2)  # of Gamma(0.1, 10), whose variance is 10
    assert squared_length.var().item() == pytest.approx(10, rel=0.5)


@pytest.mark.slow
def test_the_study_measures_and_draws_every_claim(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, FOLDER / "study.py", "--out", tmp_path, "--seeds", "2", "--steps", "20"]
    command += ["--points", "5", "--batch", "20", "--draws", "40", "--curvature-points", "2", "--curvature-tasks", "20"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    subprocess.run(list(map(str, command)), check=True, env=environment)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["claims"].keys() == {"normal", "heavy-tailed"}
    for claims in found["claims"].values():
        intervals = [value for value in claims.values() if isinstance(value, dict) and "mean" in value]
        assert len(intervals) >= 7
        assert all(value["low"] <= value["mean"] <= value["high"] for value in intervals)
    assert len(list(tmp_path.glob("in_context_*.png"))) == 4
