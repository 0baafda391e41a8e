import pytest
import torch

from glalm.kernels import chunk_delta_rule, fused_recurrent_delta_rule
from glalm.kernels.common import l2_normalize
from glalm.kernels.recurrent import states_in_place
from glalm.kernels.reference import recurrent_delta_rule

GATES = ["none", "head", "channel"]


def with_gates(args, kind, factor=8):
    """Return the arguments of the delta rule, made of those of GLA: normalized keys, beta, and the kind of gates."""
    g = args["g"] * factor
    gates = {"none": None, "head": g[..., 1], "channel": g}[kind]
    keys = torch.nn.functional.normalize(args["k"], dim=-1)
    return args | {"k": keys, "beta": args["g"][..., 0].exp(), "g": gates}


def recurrence(q, k, v, beta, g=None, initial_state=None, cu_seqlens=None):
    """Compute the recurrence as published, by a matrix product with I - beta k^T k for each token."""
    (B, T, H, K), V = q.shape, v.shape[3]
    rows = [(b, 0, T) for b in range(B)]
    if cu_seqlens is not None:
        rows = [(0, a, b) for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    outputs, states = [q.new_zeros(0, H, V)], []
    for n, (row, start, end) in enumerate(rows):
        S = q.new_zeros(H, K, V) if initial_state is None else initial_state[n]
        for t in range(start, end):
            kt, b = k[row, t], beta[row, t][:, None, None]
            S = S if g is None else S * g[row, t].view(H, -1, 1).exp()
            S = (torch.eye(K) - b * kt[:, :, None] * kt[:, None, :]) @ S + b * kt[:, :, None] * v[row, t][:, None, :]
            outputs.append((q[row, t][:, None, :] @ S)[None, :, 0] / K**0.5)
        states.append(S)
    return torch.cat(outputs).view(B, T, H, V), torch.stack(states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_normalizing_rounds_once(dtype):
    """Also the gradient, of which the part along x cancels."""
    torch.manual_seed(0)
    x = torch.randn(50, 8, dtype=torch.float64).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    dy = (torch.nn.functional.normalize(exact.detach(), dim=-1) + 0.01 * torch.randn(50, 8)).to(dtype)
    y, expected = l2_normalize(x), l2_normalize(exact)
    y.backward(dy)
    expected.backward(dy.double())
    half_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), expected, rtol=half_unit, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=half_unit, atol=1e-5)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("bounds", [None, [0, 1, 70, 70, 150]], ids=["batch", "packed"])
def test_matches_the_recurrence(bounds, gates, draw, differentiate):
    args = with_gates(draw(B=1 if bounds else 2, T=150, K=6, V=4, dtype=torch.float64, bounds=bounds), gates)
    found = differentiate(lambda **a: chunk_delta_rule(**a, output_final_state=True), args)
    expected = differentiate(recurrence, args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gates", GATES)
def test_packed_sequences_without_states_match_the_recurrence(gates, draw, differentiate):
    args = draw(B=1, T=300, K=6, V=4, dtype=torch.float64, bounds=[0, 1, 70, 70, 128, 140, 300])
    args = with_gates(args, gates) | {"initial_state": None}
    found = differentiate(lambda **a: (chunk_delta_rule(**a)[0], a["q"].sum()), args)
    expected = differentiate(lambda **a: (recurrence(**a)[0], a["q"].sum()), args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gates", ["head", "channel"])
@pytest.mark.parametrize("gate", [-torch.inf, -1e5])
def test_digits_survive_after_a_gate_that_forgets_everything(gate, gates, draw, differentiate):
    args = with_gates(draw(T=100, K=6, V=4), gates, factor=1)
    args["g"] = args["g"].index_fill(1, torch.tensor([0, 18, 70]), gate)
    found = differentiate(lambda **a: chunk_delta_rule(**a, output_final_state=True), args)
    doubles = {n: x if x is None else x.double() for n, x in args.items()}
    expected = differentiate(lambda **a: tuple(y.float() for y in recurrence(**a)), doubles)
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=1e-5, atol=1e-5)


def test_the_reference_matches_the_recurrence(draw):
    """recurrent_delta_rule, against which the kernels are tested, is written without the matrix I - beta k^T k."""
    for gates in GATES:
        args = with_gates(draw(B=1, T=20, K=6, V=4, dtype=torch.float64, bounds=[0, 9, 9, 20]), gates)
        for found, expected in zip(recurrent_delta_rule(**args), recurrence(**args), strict=True):
            torch.testing.assert_close(found, expected)


def test_keys_and_queries_are_normalized(draw, differentiate):
    args = with_gates(draw(T=20, K=6, V=4, dtype=torch.float64), "channel") | {"k": draw(T=20, K=6)["k"].double()}

    def normalize_before(q, k, **others):
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        return chunk_delta_rule(q, k, **others, output_final_state=True)

    found = differentiate(lambda **a: chunk_delta_rule(**a, normalize=True, output_final_state=True), args)
    expected = differentiate(normalize_before, args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("bounds", [None, [0, 1, 9, 9, 20]], ids=["batch", "packed"])
def test_the_recurrent_form_matches_the_recurrence(bounds, gates, draw, differentiate):
    args = with_gates(draw(B=1 if bounds else 2, T=20, K=6, V=4, dtype=torch.float64, bounds=bounds), gates)
    found = differentiate(lambda **a: fused_recurrent_delta_rule(**a, output_final_state=True), args)
    expected = differentiate(recurrence, args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    with torch.no_grad():
        o, S = fused_recurrent_delta_rule(**args, output_final_state=True)
    torch.testing.assert_close([o, S], [expected["o"], expected["final_state"]])


def test_decoding_in_place(draw):
    args = with_gates(draw(T=1, K=6, V=4, dtype=torch.float64), "channel")
    expected = chunk_delta_rule(**args, normalize=True, output_final_state=True)
    with states_in_place():
        o, S = fused_recurrent_delta_rule(**args, normalize=True, output_final_state=True)
    assert S is args["initial_state"]
    torch.testing.assert_close((o, S), expected)


def test_an_explicit_scale(draw):
    args = draw(K=6, V=4, dtype=torch.float64)
    args["beta"] = args.pop("g")[..., 0].exp()
    half, _ = chunk_delta_rule(**args, scale=0.5 * 6**-0.5)
    torch.testing.assert_close(half, 0.5 * chunk_delta_rule(**args)[0])


def test_float32_keeps_six_digits(draw, differentiate):
    args = draw(B=1, T=200, K=16, V=16)
    args["k"] = torch.nn.functional.normalize(args["k"], dim=-1)
    args["beta"] = args.pop("g")[..., 0].exp()
    found, _ = chunk_delta_rule(**args)
    exact, _ = chunk_delta_rule(**{n: x if x is None else x.double() for n, x in args.items()})
    assert (found - exact).norm() / exact.norm() < 3e-6


def test_half_precision_is_rounded_once(draw):
    args = draw(K=12, dtype=torch.bfloat16)
    args["beta"] = args.pop("g")[..., 0].exp()
    o, _ = chunk_delta_rule(**args)
    exact, _ = chunk_delta_rule(**{n: x if x is None else x.float() for n, x in args.items()})
    assert torch.equal(o, exact.bfloat16())


def test_double_backward_is_refused(draw):
    args = draw(T=5)
    args["beta"], v = args.pop("g")[..., 0].exp(), args["v"].requires_grad_()
    (dv,) = torch.autograd.grad(chunk_delta_rule(**args)[0].square().sum(), v, create_graph=True)
    with pytest.raises(NotImplementedError, match="chunk_delta_rule does not support double backward"):
        dv.sum().backward()


def test_opcheck():
    k, new, read = (torch.randn(1, 2, 3, 4, n) for n in (5, 6, 5))
    through, S = torch.rand(1, 2, 3, 1, 1), torch.rand(1, 2, 5, 6)
    carry, carry_backward = torch.ops.glalm.delta_carry.default, torch.ops.glalm.delta_carry_backward.default
    torch.library.opcheck(carry, (k, new, read, through, S))
    u, starts, S = carry(k, new, read, through, S)
    torch.library.opcheck(carry_backward, (k, read, through, u, starts, u, starts, S))


def test_wrong_arguments_are_named(draw):
    args = draw()
    with pytest.raises(ValueError, match="beta: expected the shape"):
        chunk_delta_rule(args["q"], args["k"], args["v"], args["g"])
    with pytest.raises(ValueError, match="cu_seqlens: expected all sequences packed into one row"):
        chunk_delta_rule(*(args[n] for n in "qkv"), args["g"][..., 0].exp(), cu_seqlens=torch.tensor([0, 70]))
    row = [args[n][:1] for n in "qkv"]
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing bounds from 0 to T = 70"):
        chunk_delta_rule(*row, args["g"][:1, :, :, 0].exp(), cu_seqlens=torch.tensor([0, 40, 10, 70]))
    with pytest.raises(ValueError, match="g: expected log forget gates <= 0"):
        chunk_delta_rule(*row, args["g"][:1, :, :, 0].exp(), torch.ones(1, 70, 2))
