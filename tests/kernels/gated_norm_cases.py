"""Compare the kernels of the gated RMSNorm with a float64 one, compiled on a GPU or interpreted on a CPU."""

import torch
from torch import Tensor
from triton_cases import relative_error

from glalm.kernels import gated_rms_norm

EPS = 1e-5


def random_arguments(*shape: int, dtype=torch.float32, gate_dtype=None, device="cpu", seed=0) -> dict[str, Tensor]:
    """Draw x, gate (in gate_dtype, or else x's) and weight, x with rows of very different sizes."""
    r = torch.Generator().manual_seed(seed)
    sizes = torch.exp(3 * torch.randn(*shape[:-1], 1, generator=r)).clamp(max=1e3)  # Float16 ends at 65,504.
    args = {
        "x": (torch.randn(*shape, generator=r) * sizes).to(dtype),
        "gate": torch.randn(*shape, generator=r).mul(3).to(gate_dtype or dtype),
        "weight": torch.randn(shape[-1], generator=r),
    }
    return {name: x.to(device) for name, x in args.items()}


def write_out(x: Tensor, gate: Tensor, weight: Tensor, activation: str) -> Tensor:
    """Return y by its formula."""
    sigmoid = 1 / (1 + (-gate).exp())
    gates = {"silu": gate * sigmoid, "sigmoid": sigmoid}[activation]
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight * gates


def differentiate(args: dict[str, Tensor], dy: Tensor, operator) -> dict[str, Tensor]:
    """Return y, and the gradients of its product with dy."""
    leaves = {name: x.detach().requires_grad_() for name, x in args.items()}
    y = operator(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def relative_errors(*shape: int, activation="silu", **options) -> dict[str, float]:
    """Return the relative RMS errors of y and of all gradients, which must be finite and as their inputs."""
    args = random_arguments(*shape, **options)
    dtype = torch.promote_types(args["x"].dtype, args["gate"].dtype)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(args["x"].device, dtype)
    found = differentiate(args, dy, lambda **a: gated_rms_norm(**a, eps=EPS, activation=activation))
    wide = {name: x.double() for name, x in args.items()}
    expected = differentiate(wide, dy, lambda **a: write_out(**a, activation=activation))
    assert found["y"].dtype == dtype
    for name, x in args.items():
        assert found[f"d{name}"].dtype == x.dtype and found[f"d{name}"].shape == x.shape
    assert all(x.isfinite().all() for x in found.values())
    return {name: relative_error(found[name], x) for name, x in expected.items()}
