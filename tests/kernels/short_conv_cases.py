"""Compare the kernels of the short convolution with a float64 one, compiled on a GPU or interpreted on a CPU."""

import torch
from selective_scan_cases import differentiate
from triton_cases import relative_error

from glalm.kernels import short_conv
from glalm.kernels.reference import recurrent_short_conv


def random_arguments(
    B, T, D, taps, *, dtype=torch.float32, bias=True, states=True, bounds=None, device="cpu", seed=0
) -> dict:
    """Draw the arguments of short_conv."""
    r = torch.Generator().manual_seed(seed)
    N = B if bounds is None else len(bounds) - 1
    args = {
        "x": torch.randn(B, T, D, generator=r).to(dtype),
        "weight": torch.randn(D, taps, generator=r),
        "bias": torch.randn(D, generator=r) if bias else None,
        "initial_state": torch.randn(N, taps - 1, D, generator=r).to(dtype) if states else None,
    }
    args = {name: x if x is None else x.to(device) for name, x in args.items()}
    args["cu_seqlens"] = None if bounds is None else torch.tensor(bounds, device=device)
    return args


def relative_errors(*shape, **options) -> dict[str, float]:
    """Return the relative RMS errors of the results and of all gradients, which must be finite and as their inputs."""
    args = random_arguments(*shape, **options)
    found = differentiate(short_conv, args)
    expected = differentiate(recurrent_short_conv, args, exact=True)
    for name, x in args.items():
        if x is not None and name != "cu_seqlens":
            assert found[f"d{name}"].dtype == x.dtype and found[f"d{name}"].shape == x.shape
    assert all(x.isfinite().all() for x in found.values())
    return {name: relative_error(found[name], x) for name, x in expected.items() if x.numel()}
