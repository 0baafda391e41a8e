import pytest
import torch

from glalm.kernels import selective_scan
from glalm.kernels.reference import recurrent_selective_scan


@pytest.mark.parametrize(
    "T, bounds", [(1, None), (2, None), (37, None), (37, [0, 0, 1, 18, 18, 37, 37])], ids=["1", "2", "batch", "packed"]
)
def test_matches_the_recurrence(T, bounds, differentiate):
    torch.manual_seed(0)
    rows, D, N = 2 if bounds is None else 1, 3, 4
    args = {
        "x": torch.randn(rows, T, D),
        "dt": torch.rand(rows, T, D),
        "A": -torch.rand(D, N) * 4,
        "B": torch.randn(rows, T, N),
        "C": torch.randn(rows, T, N),
        "D": torch.randn(D),
        "z": torch.randn(rows, T, D),
        "dt_bias": torch.randn(D),
        "initial_state": torch.randn(rows if bounds is None else len(bounds) - 1, D, N),
    }
    args = {n: x.double() for n, x in args.items()} | {"cu_seqlens": bounds and torch.tensor(bounds)}
    found, expected = differentiate(selective_scan, args), differentiate(recurrent_selective_scan, args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10)
    zero_state = {**args, "initial_state": torch.zeros_like(args["initial_state"])}
    without = selective_scan(**{**args, "initial_state": None})
    torch.testing.assert_close(without, recurrent_selective_scan(**zero_state))


@pytest.mark.parametrize("carried", [False, True])
def test_chunks_match_the_recurrence(carried):
    """The path of a GPU is taken by tensors that claim to be on another device."""
    from glalm.kernels.selective_scan import scan_states

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    torch.manual_seed(0)
    decay, update, h = torch.rand(2, 38, 3, 4), torch.randn(2, 38, 3, 4), torch.randn(2, 3, 4) if carried else None
    found = scan_states(decay.as_subclass(Elsewhere), update, h)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), scan_states(decay, update, h))


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 2, 5]])
def test_wrong_bounds_are_refused(bounds):
    x, dt, A, B = torch.ones(1, 5, 2), torch.ones(1, 5, 2), -torch.ones(2, 3), torch.ones(1, 5, 3)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected non-decreasing bounds from 0 to T = 5"):
        selective_scan(x, dt, A, B, B, cu_seqlens=torch.tensor(bounds))


WRONG = {
    "x": {"x": torch.ones(5, 2)},
    "A": {"A": torch.ones(2)},
    "dt": {"dt": torch.ones(1, 5, 3)},
    "B": {"B": torch.ones(1, 4, 3)},
    "C": {"C": torch.ones(1, 5, 2)},
    "D": {"D": torch.ones(3)},
    "z": {"z": torch.ones(1, 5, 2).long()},
    "dt_bias": {"dt_bias": torch.ones(2, device="meta")},
    "initial_state": {"initial_state": torch.ones(1, 2, 3).double()},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    args = {"x": torch.ones(1, 5, 2), "dt": torch.ones(1, 5, 2), "A": -torch.ones(2, 3)}
    args |= {"B": torch.ones(1, 5, 3), "C": torch.ones(1, 5, 3)}
    selective_scan(**args)
    with pytest.raises(ValueError, match=f"^{name}: "):
        selective_scan(**{**args, **WRONG[name]})
