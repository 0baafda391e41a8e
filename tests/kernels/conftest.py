import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.reference import recurrent_gla


@pytest.fixture
def draw():
    """draw(B, T, H, K, V, ...): random arguments of an operator, by name.

    `gates` is the typical size of a log gate, and `group` the heads of q for each head of k.
    """

    def draw_arguments(
        B=2, T=70, H=2, K=12, V=20, *, gates=1 / 16, dtype=torch.float32, gate_dtype=None, bounds=None, seed=0,
        group=1,
    ):  # fmt: skip
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        N = B if bounds is None else len(bounds) - 1
        return {
            "q": normal(B, T, H * group, K).to(dtype),
            "k": normal(B, T, H, K).to(dtype),
            "v": normal(B, T, H, V).to(dtype),
            "g": (F.logsigmoid(normal(B, T, H, K)) * gates).to(gate_dtype or dtype),
            "initial_state": normal(N, H, K, V).to(torch.float64 if dtype == torch.float64 else torch.float32),
            "cu_seqlens": None if bounds is None else torch.tensor(bounds),
        }

    return draw_arguments


@pytest.fixture
def differentiate():
    """differentiate(operator, args): the results, and the gradients of their product with fixed random weights."""

    def run_and_differentiate(operator, args: dict) -> dict[str, Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in args.items() if x is not None and n != "cu_seqlens"}
        results = operator(**{**args, **leaves})
        random = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype) for x in results]
        grads = torch.autograd.grad(results, list(leaves.values()), weights)
        names = ["o", "final_state", *("d" + name for name in leaves)]
        return dict(zip(names, (x.detach() for x in (*results, *grads)), strict=True))

    return run_and_differentiate


@pytest.fixture
def assert_matches_reference(differentiate):
    """assert_matches_reference(operator, args, tolerance): results and gradients agree with the float64 recurrence.

    The tolerance bounds the RMS error of each tensor, relative to the RMS of the reference. Returns the results.
    """

    def relative_error(x: Tensor, expected: Tensor) -> float:
        size = expected.square().mean().sqrt()
        error = (x.double() - expected).square().mean().sqrt()
        return float(error / size if size > 0 else error)

    def check(operator, args: dict, tolerance: float) -> dict[str, Tensor]:
        found = differentiate(lambda **a: operator(**a, output_final_state=True), args)
        exact = {n: x.double() if x is not None and n != "cu_seqlens" else x for n, x in args.items()}
        expected = differentiate(recurrent_gla, exact)
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert all(error <= tolerance for error in errors.values()), errors  # A NaN fails, too.
        return found

    return check
