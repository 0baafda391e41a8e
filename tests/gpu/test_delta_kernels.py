"""The delta rule's Triton kernels compiled, at real shapes, on random data of a new seed every run."""

import secrets

import pytest
import torch

from glalm.kernels import chunk_delta_rule

pytestmark = pytest.mark.gpu
SEED = secrets.randbits(31)
FP32 = 1e-5  # a few roundings of float32
GATES = ["nothing", "head", "channel"]
every_gate = pytest.mark.parametrize("per", GATES)


def check(*shape, **options):
    """Compare errors with twice those of the same formula, with operands rounded to q's dtype and float32 sums."""
    from delta_cases import errors_beside_rounding

    errors = errors_beside_rounding(*shape, device="cuda", seed=SEED, **options)
    assert all(found <= 2 * rounded for found, rounded in errors.values()), (SEED, errors)


@pytest.mark.parametrize("per", ["head", "channel"])
@pytest.mark.parametrize("gate", ["slow", "usual", "fast", "wild", "resets", "none"])
@pytest.mark.parametrize("K, V", [(64, 64), (128, 256)])
def test_every_kind_of_gates(K, V, gate, per):
    check(1, 320, 2, K, V, dtype=torch.bfloat16, gate=gate, per=per, gate_dtype=torch.float32, states=True)


@every_gate
@pytest.mark.parametrize("K, V", [(16, 16), (96, 40), (128, 128), (256, 512)])
def test_head_sizes(K, V, per):
    check(1, 200, 2, K, V, dtype=torch.bfloat16, per=per, normalize=True)


@every_gate
@pytest.mark.parametrize("T", [1, 63, 65, 1000])
def test_every_length(T, per):
    B = 2 + 1000 // T  # The errors of a few numbers would be a matter of luck.
    check(B, T, 2, 128, 128, dtype=torch.bfloat16, per=per, states=True)


@every_gate
def test_packed_sequences(per):
    bounds = [0, 0, 15, 16, 300, 300, *range(310, 400, 7), 700]
    check(1, 700, 2, 64, 64, dtype=torch.bfloat16, per=per, cu_seqlens=bounds, states=True)


@every_gate
def test_other_dtypes(per):
    from delta_cases import relative_errors

    check(1, 300, 2, 64, 64, dtype=torch.float16, per=per, states=True)
    errors = relative_errors(1, 300, 2, 64, 64, dtype=torch.float32, per=per, states=True, device="cuda", seed=SEED)
    assert max(errors.values()) < FP32, (SEED, errors)


@every_gate
def test_repeated_runs_are_equal(per):
    q, k, v = (torch.randn(4, 1000, 4, n, device="cuda", dtype=torch.bfloat16) for n in (128, 128, 256))
    beta = torch.rand(4, 1000, 4, device="cuda")
    g = {"nothing": None, "head": -beta, "channel": -k.float().abs() / 16}[per]
    leaves = [x for x in (q, k, v, beta, g) if x is not None]

    def run():
        inputs = [x.detach().requires_grad_() for x in leaves]
        o, S = chunk_delta_rule(*inputs, normalize=True, output_final_state=True)
        return [o, S, *torch.autograd.grad([o, S], inputs, [torch.ones_like(o), torch.ones_like(S)])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@every_gate
def test_compiles_to_one_graph(per):
    q, k, v = (torch.randn(2, 100, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    beta = torch.rand(2, 100, 2, device="cuda")
    g = {"nothing": None, "head": -beta, "channel": -k.float().abs()}[per]
    leaves = [x.requires_grad_() for x in (q, k, v, beta, g) if x is not None]
    compiled = torch.compile(chunk_delta_rule, fullgraph=True)
    grads = []
    for operator in (compiled, chunk_delta_rule):
        o, _ = operator(*leaves, normalize=True)
        grads.append([o, *torch.autograd.grad(o.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_larger_heads_are_refused():
    q, v = (torch.randn(1, 5, 1, n, device="cuda") for n in (257, 16))
    with pytest.raises(ValueError, match="q: heads of K = 257 channels are wider than 256"):
        chunk_delta_rule(q, q, v, v[..., 0])
    with pytest.raises(ValueError, match="v: heads of V = 513 channels are wider than 512"):
        chunk_delta_rule(v, v, torch.randn(1, 5, 1, 513, device="cuda"), v[..., 0])
