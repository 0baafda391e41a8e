"""The first call of an operator in a process, inside torch.compile's CUDA graphs."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# The warm-up of the graph is the operator's first call, then come the capture and a replay. Nothing may have called the
# operator before, so each case is a process.
PROGRAM = """
import sys

import torch
from torch._dynamo.utils import counters

from glalm import kernels

torch.manual_seed(0)


def rows(*sizes):
    return torch.randn(2, 256, *sizes, device="cuda", dtype=torch.bfloat16)


def channels(n):
    return torch.randn(n, 4, device="cuda")


q, k, v, x, y = (rows(4, 64) for _ in range(5))
g, head_gate = -rows(4, 64).abs() / 16, -rows(4).abs() / 16
beta, dt = rows(4).sigmoid(), rows(4).abs()
OPERATORS = {
    "gla": (kernels.chunk_gla, q, k, v, g),
    "simple_gla": (kernels.chunk_simple_gla, q, k, v, head_gate),
    "linear_attn": (kernels.chunk_linear_attn, q, k, v),
    "value_gla": (kernels.chunk_value_gla, q, k, v, g),
    "kda": (kernels.chunk_delta_rule, q, k / 8, v, beta, g),
    "delta_rule": (kernels.chunk_delta_rule, q, k / 8, v, beta, head_gate),
    "ssd": (kernels.chunk_ssd, x, dt, -torch.rand(4, device="cuda"), q, k),
    "selective_scan": (kernels.selective_scan, rows(64), rows(64).abs(), -channels(64).abs(), rows(4), rows(4)),
    "short_conv": (kernels.short_conv, rows(64), channels(64)),
}
operator, *inputs = OPERATORS[sys.argv[1]]
inputs = [x.detach().requires_grad_() for x in inputs]


def run(function):
    o = function(*inputs)
    # The next replay overwrites the graph's tensors.
    return [x.float().clone() for x in (o, *torch.autograd.grad(o.float().square().sum(), inputs))]


def call(*inputs):
    return operator(*inputs)[0]


compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
results = [run(compiled) for _ in range(4)]
expected = run(call)
results.append(run(compiled))
assert counters["inductor"]["cudagraph_skips"] == 0
for i, result in enumerate(results):
    for name, x, y in zip(["o", *range(len(inputs))], result, expected, strict=True):
        assert (x - y).norm() <= 2e-2 * y.norm(), (i, name, float((x - y).norm()), float(y.norm()))
"""
OPERATORS = [
    "gla", "simple_gla", "linear_attn", "value_gla", "kda", "delta_rule", "ssd", "selective_scan", "short_conv",
]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_first_call_is_the_warm_up_of_a_graph(operator):
    command = [sys.executable, "-c", PROGRAM, operator]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
