"""Every operator on sequences of 0 to 3 tokens: results and all gradients, in every dtype, against float64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glalm import kernels
from glalm.kernels.reference import recurrent_selective_scan, recurrent_short_conv, recurrent_ssd

# The relative error of each result and gradient. Half precision may round once, by half a unit in the last place.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8 + 1e-5, torch.float16: 2**-11 + 1e-5}
WITHOUT_STATE = ("long_convolution", "gated_rms_norm")  # They have tests of their own.
RECURRENT = [name for name in kernels.__all__ if name not in WITHOUT_STATE]
every_operator = pytest.mark.parametrize("name", RECURRENT)


def draw_arguments(name: str, lengths: list[int], packed: bool, state: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random arguments for sequences of these lengths, packed, or in a batch if the lengths are equal."""
    N, H, K, V = len(lengths), 2, 3, 4
    B, T = (1, sum(lengths)) if packed else (N, lengths[0])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    if name == "selective_scan":
        H, V = 5, 1  # Its channels are heads with one value each, and have K numbers each as their state.
        args = {"x": normal(B, T, H), "dt": torch.rand(B, T, H), "A": -torch.rand(H, K)}
        args |= {"B": normal(B, T, K), "C": normal(B, T, K)}
    elif "ssd" in name:
        args = {"x": normal(B, T, H, V), "dt": torch.rand(B, T, H), "A": -torch.rand(H), "D": normal(H)}
        args |= {"B": normal(B, T, 1, K), "C": normal(B, T, 1, K)}
    elif name == "short_conv":
        args = {"x": normal(B, T, H), "weight": normal(H, K), "bias": normal(H)}
    else:
        args = {"q": normal(B, T, H, K), "k": F.normalize(normal(B, T, H, K), dim=-1), "v": normal(B, T, H, V)}
    if "delta_rule" in name:
        args |= {"beta": torch.rand(B, T, H), "g": F.logsigmoid(normal(B, T, H))}
    elif name == "chunk_value_gla":
        args["g"] = F.logsigmoid(normal(B, T, H, V))
    elif "simple" in name:
        args["g"] = F.logsigmoid(normal(B, T, H))
    elif "gla" in name:
        args["g"] = F.logsigmoid(normal(B, T, H, K))
    args = {name: x.to(dtype) for name, x in args.items()}
    if state:
        shape = {"selective_scan": (N, H, K), "short_conv": (N, K - 1, H)}.get(name, (N, H, K, V))
        state_dtype = dtype if name == "short_conv" else torch.promote_types(dtype, torch.float32)
        args["initial_state"] = normal(*shape).to(state_dtype)
    if packed:
        args["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    return args


def reference(name: str, **args: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the operator token by token.

    All are cases of S <- exp(key gate) S exp(value gate), S <- S + k^T (v - k S), and o = q S, where only the delta
    rule subtracts k S.
    """
    if name == "short_conv":
        return recurrent_short_conv(**args)
    if "ssd" in name:
        return recurrent_ssd(**args)
    cu_seqlens = args.get("cu_seqlens")
    S0 = args.get("initial_state")
    if name == "selective_scan":
        x, dt, A = args["x"], args["dt"], args["A"]
        q, k = (args[n][:, :, None].expand(*x.shape, A.shape[1]) for n in ("C", "B"))
        v = (dt * x)[..., None]
        key_gate, value_gate, beta = dt[..., None] * A, torch.zeros_like(v), None
        S0 = None if S0 is None else S0[..., None]
    else:
        q, k, v, g, beta = (args.get(n) for n in ("q", "k", "v", "g", "beta"))
        q = q * q.shape[3] ** -0.5
        if "retention" in name:
            g = torch.log1p(-torch.exp2(-5 - torch.arange(q.shape[2], dtype=torch.float64))).expand(q.shape[:3])
        on_values = name == "chunk_value_gla"
        g = torch.zeros_like(k) if g is None else g if g.dim() == 4 else g[..., None]
        key_gate, value_gate = (torch.zeros_like(k), g) if on_values else (g.expand(k.shape), torch.zeros_like(v))
    B, T, H, K = q.shape
    rows = [(b, range(T)) for b in range(B)]
    if cu_seqlens is not None:
        rows = [(0, range(a, b)) for a, b in pairwise(cu_seqlens.tolist())]
    outputs, states = [torch.zeros(0, H, v.shape[3], dtype=torch.float64)], []
    for n, (row, tokens) in enumerate(rows):
        S = torch.zeros(H, K, v.shape[3], dtype=torch.float64) if S0 is None else S0[n]
        for t in tokens:
            S = key_gate[row, t].exp()[:, :, None] * S * value_gate[row, t].exp()[:, None, :]
            new = v[row, t]
            if beta is not None:
                new = beta[row, t][:, None] * (new - torch.einsum("hk,hkv->hv", k[row, t], S))
            S = S + k[row, t][:, :, None] * new[:, None, :]
            outputs.append(torch.einsum("hk,hkv->hv", q[row, t], S)[None])
        states.append(S)
    o, S = torch.cat(outputs).view(B, T, H, -1), torch.stack(states)
    return (o.squeeze(3), S.squeeze(3)) if name == "selective_scan" else (o, S)


def results_and_gradients(operator, args: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the results, and the gradients of all arguments, which must not be None."""
    leaves = {name: x.detach().requires_grad_() for name, x in args.items() if name != "cu_seqlens"}
    o, state = operator(**{**args, **leaves})
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=random, dtype=torch.float64).bfloat16().to(x.dtype) for x in (o, state)]
    # Without tokens, the state may be a constant.
    loss = sum((y * w).sum() for y, w in zip((o, state), weights, strict=True))
    loss.backward()
    assert [name for name, x in leaves.items() if x.grad is None] == []
    return {"o": o.detach(), "state": state.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}


def check(name: str, lengths: list[int], packed: bool, state: bool, dtype: torch.dtype) -> None:
    """Compare the operator with the reference."""
    args = draw_arguments(name, lengths, packed, state, dtype)
    options = {} if name in ("selective_scan", "short_conv") else {"output_final_state": True}
    found = results_and_gradients(lambda **a: getattr(kernels, name)(**a, **options), args)
    exact = {n: x if n == "cu_seqlens" else x.double() for n, x in args.items()}
    if sum(lengths) == 0:  # The reference then has no path from the outputs to the inputs.
        expected = {f"d{n}": torch.zeros_like(x) for n, x in exact.items() if n not in ("cu_seqlens", "initial_state")}
    else:
        expected = results_and_gradients(lambda **a: reference(name, **a), exact)
    for key, truth in expected.items():
        # What is summed is of the order of 1. Where the sum nearly cancels, its error is not in proportion to it.
        size = max(truth.norm(), 0.1 * truth.numel() ** 0.5)
        error = (found[key].double() - truth).norm()
        assert error <= TOLERANCES[dtype] * size, f"{key} is off by {error:.1e} of {size:.1e}"


@every_operator
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_short_batches_and_packed_sequences(name, dtype):
    torch.manual_seed(0)
    for T in range(4):
        for state in (False, True):
            check(name, [T, T], packed=False, state=state, dtype=dtype)
            check(name, [T], packed=True, state=state, dtype=dtype)


@settings(max_examples=20)
@given(
    name=st.sampled_from(RECURRENT),
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    state=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 2**31),
)
def test_packings_of_short_sequences(name, lengths, state, dtype, seed):
    torch.manual_seed(seed)
    check(name, lengths, packed=True, state=state, dtype=dtype)


@pytest.mark.parametrize(
    "name, recurrence, shape",
    [
        ("selective_scan", recurrent_selective_scan, (0, 5, 3)),
        ("short_conv", recurrent_short_conv, (0, 2, 2)),
        ("chunk_ssd", recurrent_ssd, (0, 2, 3, 4)),
    ],
)
def test_the_references_serve_no_sequences(name, recurrence, shape):
    args = draw_arguments(name, [], packed=True, state=False, dtype=torch.float32)
    o, state = recurrence(**args)
    assert state.shape == shape
    assert o.shape == args["x"].shape
