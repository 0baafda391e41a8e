import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.kernels import long_convolution


def convolve_by_definition(x, h, cu_seqlens=None):
    """Sum the definition term by term."""
    T = x.shape[1]
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    y = []
    for t in range(T):
        start = max(bound for bound in bounds if bound <= t)
        terms = [h[t - s] * x[:, s] for s in range(max(start, t - len(h) + 1), t + 1)]
        y.append(sum(terms))
    return torch.stack(y, 1) if y else x


@settings(max_examples=30)
@given(
    T=st.integers(1, 40),
    taps=st.integers(1, 45),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    layout=st.sampled_from(["batch", "packed", "last"]),
    seed=st.integers(0, 99),
)
def test_is_the_sum_of_the_definition(T, taps, cuts, layout, seed):
    """Bounds lie anywhere and repeat. Taps are fewer or more than tokens, and shared by channels."""
    torch.manual_seed(seed)
    x = torch.randn(1 if layout == "packed" else 2, T, 2, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(taps, 2, 1, dtype=torch.float64, requires_grad=True)
    if layout == "packed":
        bounds = torch.tensor([0, *sorted(round(cut * T) for cut in cuts), T])
        found, expected = long_convolution(x, h, cu_seqlens=bounds), convolve_by_definition(x, h, bounds)
    else:
        outputs = 1 + seed % T if layout == "last" else None
        found, expected = long_convolution(x, h, outputs=outputs), convolve_by_definition(x, h)
        expected = expected[:, T - (outputs or T) :]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(expected)
    found_gradients = torch.autograd.grad(found, (x, h), dy)
    torch.testing.assert_close(found_gradients, torch.autograd.grad(expected, (x, h), dy), rtol=1e-10, atol=1e-10)


def test_half_precision_is_convolved_in_float32():
    """Also under autocast; one bfloat16 rounding of 4,096 sums would show."""
    torch.manual_seed(0)
    x, h = torch.randn(1, 4096, 2).bfloat16(), torch.randn(4096, 2).bfloat16()
    exact = long_convolution(x.double(), h.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = long_convolution(x, h)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("T", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_short_inputs(T, dtype, packed):
    torch.manual_seed(0)
    x = torch.randn(1, T, 2).to(dtype).requires_grad_()
    h = torch.randn(3, 2).to(dtype).requires_grad_()
    bounds = torch.tensor([0, T // 2, T]) if packed else None
    found = long_convolution(x, h, cu_seqlens=bounds)
    expected = convolve_by_definition(x.double(), h.double(), bounds)
    dy = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(found, (x, h), dy.to(found.dtype))
    exact = torch.autograd.grad(expected, (x, h), dy, materialize_grads=True)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for value, truth in zip((found, *gradients), (expected, *exact), strict=True):
        torch.testing.assert_close(value.double(), truth.double(), rtol=tolerance, atol=tolerance)


def test_nothing_crosses_a_bound_not_even_nan():
    x = torch.ones(1, 20, 1)
    x[:, 7:9] = torch.nan
    y = long_convolution(x, torch.ones(20, 1), cu_seqlens=torch.tensor([0, 7, 9, 20]))[0, :, 0]
    assert y[:7].isfinite().all() and y[9:].isfinite().all() and y[7:9].isnan().all()


def test_more_outputs_than_tokens_or_of_packed_sequences_are_refused():
    x = torch.ones(1, 3, 1)
    for options in ({"outputs": 5}, {"outputs": -1}, {"outputs": 1, "cu_seqlens": torch.tensor([0, 3])}):
        with pytest.raises(ValueError, match="expected 0 to T = 3 without cu_seqlens"):
            long_convolution(x, torch.ones(3, 1), **options)


def test_decreasing_bounds_are_refused():
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing bounds"):
        long_convolution(torch.ones(1, 4, 1), torch.ones(2, 1), cu_seqlens=torch.tensor([0, 3, 2, 4]))


@pytest.mark.parametrize("outputs", [None, 1, 3])
def test_an_empty_batch_has_empty_outputs_and_gradients(outputs):
    x = torch.empty(0, 5, 2, requires_grad=True)
    h = torch.ones(4, 2, requires_grad=True)
    y = long_convolution(x, h, outputs=outputs)
    y.sum().backward()
    assert y.shape == (0, outputs or 5, 2) and x.grad.shape == x.shape and not h.grad.any()
