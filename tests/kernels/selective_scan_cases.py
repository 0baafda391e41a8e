"""Compare the kernels of the selective scan with the float64 recurrence, compiled on a GPU or interpreted on a CPU."""

import torch
from triton_cases import relative_error

from glalm.kernels import selective_scan
from glalm.kernels.reference import recurrent_selective_scan


def random_arguments(
    batch, T, d, N, *, dtype=torch.float32, fused=True, states=True, bounds=None, step_dtype=None, device="cpu", seed=0
) -> dict:
    """Draw the arguments of selective_scan. With `fused`, they include D, z and dt_bias."""
    r = torch.Generator().manual_seed(seed)
    n = batch if bounds is None else len(bounds) - 1
    args = {
        "x": torch.randn(batch, T, d, generator=r).to(dtype),
        "dt": torch.randn(batch, T, d, generator=r).to(step_dtype or dtype),
        "A": -torch.rand(d, N, generator=r) * N,
        "B": torch.randn(batch, T, N, generator=r).to(dtype),
        "C": torch.randn(batch, T, N, generator=r).to(dtype),
        "initial_state": torch.randn(n, d, N, generator=r) if states else None,
    }
    if fused:
        args["D"] = torch.randn(d, generator=r)
        args["z"] = torch.randn(batch, T, d, generator=r).to(dtype)
        args["dt_bias"] = torch.randn(d, generator=r) - 2
    else:
        args["dt"] = torch.nn.functional.softplus(args["dt"] - 2)
    args = {name: x if x is None else x.to(device) for name, x in args.items()}
    args["cu_seqlens"] = None if bounds is None else torch.tensor(bounds, device=device)
    return args


def differentiate(function, args: dict, exact: bool = False, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return the results, and the gradients of their product with random weights; in float64 if `exact`."""
    leaves = {n: x.detach() for n, x in args.items() if x is not None and n != "cu_seqlens"}
    leaves = {n: (x.double() if exact else x).requires_grad_() for n, x in leaves.items()}
    y, state = function(**{**args, **leaves})
    r = torch.Generator().manual_seed(seed)
    # The gradients of the results are numbers of the dtypes that the operator's results have.
    state_dtype = args["x"].dtype if args["initial_state"] is None else args["initial_state"].dtype
    dtypes = args["x"].dtype, state_dtype
    weights = [
        torch.randn(x.shape, generator=r).to(x.device, dtype) for x, dtype in zip((y, state), dtypes, strict=True)
    ]
    weights = [weight.to(x.dtype) for weight, x in zip(weights, (y, state), strict=True)]
    grads = torch.autograd.grad((y, state), list(leaves.values()), weights)
    return {"y": y, "state": state, **{f"d{n}": grad for n, grad in zip(leaves, grads, strict=True)}}


def relative_errors(*shape, **options) -> dict[str, float]:
    """Return the relative RMS errors of the results and of all gradients, which must be finite and as their inputs."""
    args = random_arguments(*shape, **options)
    found = differentiate(selective_scan, args)
    expected = differentiate(recurrent_selective_scan, args, exact=True)
    for name, x in args.items():
        if x is not None and name != "cu_seqlens":
            assert found[f"d{name}"].dtype == x.dtype and found[f"d{name}"].shape == x.shape
    assert all(x.isfinite().all() for x in found.values())
    return {name: relative_error(found[name], x) for name, x in expected.items()}
