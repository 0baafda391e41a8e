import pytest
import torch
from gated_norm_cases import EPS, random_arguments, relative_errors

from glalm.kernels import gated_rms_norm


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 16), (0, 8)])
def test_equals_its_formula(shape):
    errors = relative_errors(*shape)
    assert shape[0] == 0 or max(errors.values()) < 1e-6, errors


def test_float64():
    assert max(relative_errors(4, 9, dtype=torch.float64).values()) < 1e-6  # The cases' weight is a float32 tensor.


def test_refused_arguments():
    args = random_arguments(3, 8)
    with pytest.raises(
        ValueError, match=r"gate: expected x's \[3, 8\] in torch.float32, got \[3, 8\] in torch.float16"
    ):
        gated_rms_norm(**{**args, "gate": args["gate"].half()}, eps=EPS)
    with pytest.raises(ValueError, match=r"weight: expected \[8\], as many numbers as x has channels, got \[7\]"):
        gated_rms_norm(**{**args, "weight": args["weight"][:7]}, eps=EPS)
    with pytest.raises(ValueError, match="weight: expected a tensor on the device of x, cpu, got one on meta"):
        gated_rms_norm(**{**args, "weight": args["weight"].to("meta")}, eps=EPS)
