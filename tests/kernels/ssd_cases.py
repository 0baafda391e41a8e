"""Compare Mamba-2's kernels with the float64 recurrence, compiled on a GPU or interpreted on a CPU."""

import torch
from selective_scan_cases import differentiate
from triton_cases import relative_error

from glalm.kernels import chunk_ssd
from glalm.kernels.reference import recurrent_ssd

SUMS = "dA", "dD", "ddt_bias"  # gradients of a few numbers, each the sum of terms of all tokens


def random_arguments(
    batch, T, H, G, N, P, *, dtype=torch.float32, fused=True, states=True, bounds=None, strong=False, device="cpu",
    seed=0,
) -> dict:  # fmt: skip
    """Draw the arguments of chunk_ssd. With `fused`, they include D and dt_bias. `strong` gates forget a lot."""
    r = torch.Generator().manual_seed(seed)
    n = batch if bounds is None else len(bounds) - 1
    args = {
        "x": torch.randn(batch, T, H, P, generator=r).to(dtype),
        "dt": torch.randn(batch, T, H, generator=r).to(dtype),
        "A": -torch.rand(H, generator=r) * 2,
        "B": torch.randn(batch, T, G, N, generator=r).to(dtype),
        "C": torch.randn(batch, T, G, N, generator=r).to(dtype),
        "initial_state": torch.randn(n, H, N, P, generator=r) if states else None,
    }
    if fused:
        args["D"] = torch.randn(H, generator=r)
        args["dt_bias"] = torch.randn(H, generator=r) - 2
    else:
        args["dt"] = torch.nn.functional.softplus(args["dt"] - 2)
    if strong:
        args["dt"][:, 5::7] = 60.0
    args = {name: x if x is None else x.to(device) for name, x in args.items()}
    args["cu_seqlens"] = None if bounds is None else torch.tensor(bounds, device=device)
    return args


def relative_errors(*shape, **options) -> dict[str, float]:
    """Return the relative RMS errors of the results and of all gradients, which must be finite and as their inputs."""
    args = random_arguments(*shape, **options)
    found = differentiate(lambda **a: chunk_ssd(**a, output_final_state=True), args)
    expected = differentiate(recurrent_ssd, args, exact=True)
    for name, x in args.items():
        if x is not None and name != "cu_seqlens":
            assert found[f"d{name}"].dtype == x.dtype and found[f"d{name}"].shape == x.shape
    assert all(x.isfinite().all() for x in found.values())
    others = [differentiate(recurrent_ssd, args, exact=True, seed=seed) for seed in (2, 3, 4)]
    alike = {name: [other[name] for other in others] if name in SUMS else [] for name in expected}
    return {name: relative_error(found[name], x, *alike[name]) for name, x in expected.items()}
