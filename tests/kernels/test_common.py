"""The precision of float32 products, whichever of torch's settings was written last."""

import pytest
import torch
from hypothesis import given, settings, strategies

from glalm.kernels.common import multiplies_exactly

NARROWEST, WIDEST = torch.backends.cuda.matmul, torch.backends  # The wider setting holds where the narrower is "none".
LEGACY = {"highest": "ieee", "high": "tf32", "medium": "tf32"}


@pytest.mark.parametrize("times", [1, 2])
def test_every_test_begins_with_exact_products(times):
    assert multiplies_exactly(torch.zeros(1))
    torch.set_float32_matmul_precision("high")


@settings(max_examples=20, deadline=None)
@given(
    strategies.lists(
        strategies.tuples(strategies.just("legacy"), strategies.sampled_from(["highest", "high", "medium"]))
        | strategies.tuples(strategies.sampled_from(["matmul", "all"]), strategies.sampled_from(["ieee", "tf32"])),
        min_size=1,
        max_size=5,
    )
)
def test_precision_is_the_one_written_last(writes):
    NARROWEST.fp32_precision = WIDEST.fp32_precision = "none"
    narrow, wide = "none", "none"
    for setting, value in writes:
        if setting == "legacy":
            torch.set_float32_matmul_precision(value)
            narrow = LEGACY[value]
        elif setting == "matmul":
            NARROWEST.fp32_precision = narrow = value
        else:
            WIDEST.fp32_precision = wide = value
    expected = narrow if narrow != "none" else wide
    assert multiplies_exactly(torch.zeros(1)) == (expected != "tf32")
    assert not multiplies_exactly(torch.zeros(1, dtype=torch.bfloat16))
