import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.reference import recurrent_gla


@pytest.fixture
def draw():
    """draw(B, T, H, K, V, ...): random arguments of an operator, by name. `gates` is the usual size of a log gate."""

    def drawn(B=2, T=70, H=2, K=12, V=20, *, gates=1 / 16, dtype=torch.float32, gate_dtype=None, bounds=None, seed=0):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        N = B if bounds is None else len(bounds) - 1
        return {
            "q": normal(B, T, H, K).to(dtype),
            "k": normal(B, T, H, K).to(dtype),
            "v": normal(B, T, H, V).to(dtype),
            "g": (F.logsigmoid(normal(B, T, H, K)) * gates).to(gate_dtype or dtype),
            "initial_state": normal(N, H, K, V).to(torch.float64 if dtype == torch.float64 else torch.float32),
            "cu_seqlens": None if bounds is None else torch.tensor(bounds),
        }

    return drawn


@pytest.fixture
def differentiate():
    """differentiate(operator, args): its results, and the gradients of a fixed random function of these, by name."""

    def differentiated(operator, args: dict) -> dict[str, Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in args.items() if x is not None and n != "cu_seqlens"}
        results = operator(**{**args, **leaves})
        random = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype) for x in results]
        grads = torch.autograd.grad(results, list(leaves.values()), weights)
        names = ["o", "final_state", *("d" + name for name in leaves)]
        return dict(zip(names, (x.detach() for x in (*results, *grads)), strict=True))

    return differentiated


@pytest.fixture
def assert_true(differentiate):
    """assert_true(operator, args, tolerance): results and gradients agree with the float64 recurrence.

    The tolerance is on the RMS of the error relative to the RMS of the truth, for each tensor by itself.
    """

    def relative_error(x: Tensor, truth: Tensor) -> float:
        size = truth.square().mean().sqrt()
        error = (x.double() - truth).square().mean().sqrt()
        return float(error / size if size > 0 else error)

    def check(operator, args: dict, tolerance: float) -> dict[str, Tensor]:
        found = differentiate(lambda **a: operator(**a, output_final_state=True), args)
        exact = {n: x.double() if x is not None and n != "cu_seqlens" else x for n, x in args.items()}
        truth = differentiate(recurrent_gla, exact)
        errors = {name: relative_error(found[name], truth[name]) for name in truth}
        assert all(error <= tolerance for error in errors.values()), errors  # NaN fails too
        return found

    return check
