"""The delta rule's Triton kernels at small shapes, in Triton's interpreter. On a GPU they run compiled: tests/gpu."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import INTERPRETED, interpreted, run_interpreted

from glalm.kernels.triton.delta_prepare import invert_unit_lower

IEEE = 1e-5  # a few roundings of float32
BF16 = 2.5e-2  # the interpreter cuts bfloat16 off where the GPU rounds it
GATES = ["nothing", "head", "channel"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_in_the_interpreter():
    run_interpreted(__file__)


def check(limit, *shape, **options):
    from delta_cases import relative_errors

    errors = relative_errors(*shape, **options)
    assert max(errors.values()) < limit, errors


@interpreted
@pytest.mark.parametrize("per", ["head", "channel"])
@pytest.mark.parametrize("gate", ["slow", "usual", "fast", "wild", "resets", "none"])
def test_every_gate(gate, per):
    check(IEEE, 1, 70, 1, 16, 16, dtype=torch.float32, gate=gate, per=per, states=True)


@interpreted
@pytest.mark.parametrize("per", GATES)
def test_bfloat16_and_normalization(per):
    check(BF16, 1, 70, 1, 16, 16, dtype=torch.bfloat16, per=per, gate_dtype=torch.float32)
    check(IEEE, 1, 70, 2, 16, 16, dtype=torch.float32, per=per, normalize=True, gate="resets")


@interpreted
@pytest.mark.parametrize("per", GATES)
@pytest.mark.parametrize("beta", [0.0, 1e-7])
def test_gradient_of_a_small_beta_in_float16(beta, per):
    from delta_cases import compute_exactly, draw, run_kernels

    args, gradients = draw(1, 20, 1, 16, 16, dtype=torch.float16, per=per)
    args["beta"].fill_(beta)
    found = run_kernels(args, *gradients)["dbeta"].double()
    expected = compute_exactly(args, *gradients)["dbeta"]
    assert (found - expected).norm() < 5e-3 * expected.norm()


@interpreted
@pytest.mark.parametrize("per", GATES)
def test_packed_sequences(per):
    check(IEEE, 1, 100, 1, 16, 16, dtype=torch.float32, per=per, cu_seqlens=[0, 0, 1, 66, 66, 100], states=True)


@interpreted
@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_every_length(T):
    check(IEEE, 2, T, 1, 16, 16, dtype=torch.float32, states=True)


@interpreted
@pytest.mark.parametrize("per", GATES)
@pytest.mark.parametrize("K, V", [(20, 24), (40, 33)])
def test_head_sizes_that_are_not_powers_of_two(K, V, per):
    check(IEEE, 1, 66, 2, K, V, dtype=torch.float32, per=per, states=True)


@interpreted
@pytest.mark.parametrize("per", GATES)
def test_large_heads_of_the_table(per):
    check(BF16, 1, 66, 1, 128, 256, dtype=torch.bfloat16, per=per)


@interpreted
def test_float16_does_not_overflow():
    check(1e-3, 1, 70, 1, 16, 16, dtype=torch.float16, per="channel", gate="usual", normalize=True)


@interpreted
@pytest.mark.parametrize("per", ["head", "channel"])
def test_a_nan_gate_gives_nan(per):
    from glalm.kernels.triton import delta

    q, k, v, g = (-torch.rand(1, 100, 1, 16) for _ in range(4))
    g = g if per == "channel" else g[..., 0].contiguous()
    g[0, 70] = float("nan")
    o, S, _ = delta.forward(q, k, v, -v[..., 0], g, 1.0, True, None, True, None)
    assert o[0, :64].isfinite().all() and o[0, 70:].isnan().all() and S.isnan().all()


@interpreted
@pytest.mark.parametrize("per", GATES)
def test_beta_of_zero_has_a_gradient(per, draw, differentiate, monkeypatch):
    """The kernels derive dbeta from a quotient of beta."""
    args = operator_arguments(draw, per)
    args["beta"][:, 3] = 0
    check_operator(args, differentiate, monkeypatch)


@interpreted
@pytest.mark.parametrize("K", [16, 130])  # keys above 128 channels are normalized before the kernels
def test_the_operator_runs_the_kernels(K, draw, differentiate, monkeypatch):
    check_operator(operator_arguments(draw, "channel", K=K), differentiate, monkeypatch)


def operator_arguments(draw, per: str, K: int = 16) -> dict:
    args = draw(B=1, T=66, H=1, K=K, V=16)
    gates = {"nothing": None, "head": args["g"][..., 1], "channel": args["g"]}[per]
    return args | {"beta": args["g"][..., 0].exp(), "g": gates}


def check_operator(args, differentiate, monkeypatch):
    """Compare chunk_delta_rule on the kernels with its form in PyTorch."""
    from glalm.kernels import chunk_delta_rule, common

    def operator(**arguments):
        return chunk_delta_rule(**arguments, normalize=True, output_final_state=True)

    expected = differentiate(operator, args)
    monkeypatch.setattr(common, "has_kernel", lambda q: True)
    found = differentiate(operator, args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@interpreted
@pytest.mark.parametrize("per", GATES)
def test_opcheck(per, draw):
    args = operator_arguments(draw, per) | {"cu_seqlens": torch.tensor([0, 66])}
    inputs = [args[name] for name in ("q", "k", "v", "beta", "g")]
    forward = torch.ops.glalm.delta_rule.default
    state = args["initial_state"]
    torch.library.opcheck(forward, (*inputs, 0.3, True, state, True, args["cu_seqlens"]))
    _, _, *saved = forward(*inputs, 0.3, True, None, False, None)
    backward = (*inputs, 0.3, True, None, None, saved, torch.ones_like(args["v"]), state)
    torch.library.opcheck(torch.ops.glalm.delta_rule_backward.default, backward)


@interpreted
@pytest.mark.parametrize("per", GATES)
def test_results_do_not_depend_on_uninitialized_memory(per, monkeypatch):
    from glalm.kernels.triton import delta

    q, k, v, do = (torch.randn(1, 68, 1, n) for n in (17, 17, 20, 20))
    beta = torch.rand(1, 68, 1)
    g = {"nothing": None, "head": -beta, "channel": -k.abs()}[per]
    bounds = torch.tensor([0, 0, 1, 67, 68])

    def run():
        o, final, saved = delta.forward(q, k, v, beta, g, 0.25, True, None, True, bounds)
        return [o, final, *delta.backward(q, k, v, beta, g, 0.25, True, None, bounds, saved, do, None)[:-1]]

    def poisoned(empty):
        def made(*args, **options):
            x = empty(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-1)

        return made

    first = run()
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True) if a is not None)


@interpreted
def test_no_tokens_do_not_change_the_state():
    from glalm.kernels.triton import delta

    q, k, v = (torch.randn(1, 0, 2, 16) for _ in range(3))
    o, S, _ = delta.forward(q, k, v, q[..., 0], q, 1.0, True, torch.ones(1, 2, 16, 16), True, None)
    assert o.shape == v.shape and torch.equal(S, torch.ones(1, 2, 16, 16))


@triton.jit
def invert_kernel(x, out, SPLIT: tl.constexpr):
    i = tl.arange(0, 64)[:, None]
    j = tl.arange(0, 64)[None, :]
    L = tl.where(i > j, tl.load(x + i * 64 + j), 0)
    tl.store(out + i * 64 + j, invert_unit_lower(L, 64, SPLIT, "ieee"))


@interpreted
@pytest.mark.parametrize(("split", "error"), [(False, 1e-6), (True, 1e-4)])
def test_inverse_of_a_triangular_matrix(split, error):
    """Equal keys, which make the powers of L huge while its inverse stays small, are the hardest case."""
    random = torch.nn.functional.normalize(torch.randn(64, 16), dim=-1)
    for keys in (random, random[:1].expand(64, 16)):
        L = (keys @ keys.T).tril(-1).contiguous()
        out = torch.empty(64, 64)
        invert_kernel[(1,)](L, out, split)
        expected = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + L.double())
        assert (out - expected).abs().max() < error * expected.abs().max()
