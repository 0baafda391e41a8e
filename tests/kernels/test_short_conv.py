import pytest
import torch

from glalm.kernels import short_conv
from glalm.kernels.reference import recurrent_short_conv


@pytest.mark.parametrize(
    "T, bounds", [(1, None), (2, None), (9, None), (9, [0, 0, 1, 5, 5, 9, 9])], ids=["1", "2", "batch", "packed"]
)
@pytest.mark.parametrize("taps", [1, 4])
def test_matches_the_definition(T, bounds, taps, differentiate):
    torch.manual_seed(0)
    rows = 2 if bounds is None else 1
    args = {
        "x": torch.randn(rows, T, 3),
        "weight": torch.randn(3, taps),
        "bias": torch.randn(3),
        "initial_state": torch.randn(rows if bounds is None else len(bounds) - 1, taps - 1, 3),
    }
    args = {n: x.double() for n, x in args.items()} | {"cu_seqlens": bounds and torch.tensor(bounds)}
    found, expected = differentiate(short_conv, args), differentiate(recurrent_short_conv, args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    alone = {"x": args["x"], "weight": args["weight"], "cu_seqlens": args["cu_seqlens"]}
    torch.testing.assert_close(short_conv(**alone), recurrent_short_conv(**alone))


WRONG = {
    "x": {"x": torch.ones(5, 2)},
    "weight": {"weight": torch.ones(3, 4)},
    "bias": {"bias": torch.ones(3)},
    "initial_state": {"initial_state": torch.ones(1, 4, 2)},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 3])},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    args = {"x": torch.ones(1, 5, 2), "weight": torch.ones(2, 4)}
    short_conv(**args)
    with pytest.raises(ValueError, match=f"^{name}: "):
        short_conv(**{**args, **WRONG[name]})
