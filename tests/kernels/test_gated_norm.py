import pytest
import torch
from gated_norm_cases import EPS, random_arguments, relative_errors, write_out

from glalm.kernels import gated_rms_norm


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 16), (0, 8)])
def test_equals_its_formula(shape, activation):
    errors = relative_errors(*shape, activation=activation)
    assert shape[0] == 0 or max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize(
    ("dtype", "gate_dtype"),
    [(torch.float64, None), (torch.float32, torch.float64), (torch.float64, torch.float32)],
)
def test_float64(dtype, gate_dtype):
    errors = relative_errors(4, 9, dtype=dtype, gate_dtype=gate_dtype)
    assert max(errors.values()) < 1e-6, errors  # The cases' weight is a float32 tensor.


def test_half_precision_is_rounded_once():
    args = random_arguments(64, 32, dtype=torch.bfloat16)
    expected = write_out(*(x.double() for x in args.values()), "silu")
    y = gated_rms_norm(**args, eps=EPS)
    assert y.dtype == torch.bfloat16
    assert ((y - expected).abs() <= 2**-8 * 1.001 * expected.abs()).all()


def test_refused_arguments():
    args = random_arguments(3, 8)

    def refuse(message: str, **changes):
        with pytest.raises(ValueError, match=message):
            gated_rms_norm(**{**args, "eps": EPS, **changes})

    refuse(r"gate: expected the shape of x, \[3, 8\], got \[8\]", gate=args["gate"][0])
    refuse("gate: expected a floating-point dtype, got torch.int64", gate=args["gate"].long())
    refuse(r"weight: expected \[8\], as many numbers as x has channels, got \[7\]", weight=args["weight"][:7])
    refuse("weight: expected a tensor on the device of x, cpu, got one on meta", weight=args["weight"].to("meta"))
    refuse("activation: expected one of silu, sigmoid, got relu", activation="relu")
