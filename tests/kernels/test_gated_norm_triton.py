"""The kernels of the gated RMSNorm at small shapes in Triton's interpreter, which needs a process of its own."""

import pytest
import torch
from gated_norm_cases import EPS, differentiate, random_arguments, relative_errors
from interpreter import INTERPRETED, interpreted, run_interpreted

BF16 = 1e-2  # The interpreter truncates to bfloat16; the GPU rounds.


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Let CPU tensors take the kernels, with several tiles of rows in a program."""
    from glalm.kernels import common
    from glalm.kernels.triton import gated_norm

    monkeypatch.setattr(common, "has_kernel", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(gated_norm, "TILE", 32)
    monkeypatch.setattr(gated_norm, "PROGRAMS", 1)


@interpreted
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (3, 2, 41, 8), (9, 33), (2, 0, 16)])
def test_every_shape(shape, activation):
    errors = relative_errors(*shape, activation=activation)
    assert 0 in shape or max(errors.values()) < 2e-6, errors


@interpreted
@pytest.mark.parametrize("gate_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, gate_dtype):
    errors = relative_errors(50, 16, dtype=dtype, gate_dtype=gate_dtype)
    assert max(errors.values()) < BF16, errors


@interpreted
def test_wider_rows_than_the_kernels_hold_are_pytorchs(monkeypatch):
    from glalm.kernels import gated_norm

    monkeypatch.setattr(gated_norm, "forward_operator", None)
    monkeypatch.setattr(gated_norm, "MAX_WIDTH", 8)
    assert max(relative_errors(3, 9).values()) < 2e-6


@interpreted
def test_wild_gates_and_rows_of_zeros_are_finite():
    from glalm.kernels import gated_rms_norm

    args = random_arguments(4, 8)
    args["x"][0] = 0
    args["gate"][1] = -1e4
    args["gate"][2] = 1e4
    found = differentiate(args, torch.ones(4, 8), lambda **a: gated_rms_norm(**a, eps=EPS))
    assert all(x.isfinite().all() for x in found.values())
    assert not found["y"][:2].any()


@interpreted
def test_a_compiled_backward_pass_recomputes_the_result(monkeypatch):
    """Of a norm before a matrix product, as train.activation_checkpointing=elementwise compiles it."""
    from glalm.config.run import TrainConfig
    from glalm.kernels.triton import gated_norm
    from glalm.model.layers import GatedRMSNorm
    from glalm.train.compile import choose_forward

    calls = []
    forward = gated_norm.forward
    monkeypatch.setattr(gated_norm, "forward", lambda *args: calls.append(args) or forward(*args))
    choose_forward(TrainConfig(activation_checkpointing="elementwise"), compiled=True)
    norm = GatedRMSNorm(3, eps=EPS)
    args = random_arguments(5, 7, 3) | {"weight": torch.randn(4, 21)}

    def project(x, gate, weight):
        return norm(x, gate).flatten(-2) @ weight.T

    expected = differentiate(args, torch.ones(5, 4), project)
    assert len(calls) == 1
    found = differentiate(args, torch.ones(5, 4), torch.compile(project, backend="aot_eager_decomp_partition"))
    assert len(calls) == 3
    torch.testing.assert_close(found, expected)
