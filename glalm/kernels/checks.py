"""What the operators accept. Every error is a ValueError that begins with the argument's name."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from glalm.kernels.precision import wide_dtype


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Shapes, dtypes and devices: all that is known without reading a value, so while tracing too."""
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"q: expected the shape [B, T, H, K] with K > 0, got {list(q.shape)}")
    B, T, H, K = q.shape
    for name, x in (("k", k), ("g", g)):
        if x.shape != q.shape:
            raise ValueError(f"{name}: expected the shape of q, {list(q.shape)}, got {list(x.shape)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: expected the shape [{B}, {T}, {H}, V], as q is {list(q.shape)}, got {list(v.shape)}")

    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating-point dtype, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}; only g may differ")
    if not g.is_floating_point():
        raise ValueError(f"g: expected a floating-point dtype, got {g.dtype}")
    tensors = {"k": k, "v": v, "g": g, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, got a {type(x).__name__}")
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: expected on the device of q, {q.device}, got {x.device}")

    sequences = B
    if cu_seqlens is not None:
        check_packing(cu_seqlens, B)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_state(initial_state, (sequences, H, K, v.shape[3]), q)


def check_normalizer(gate_logit_normalizer: float | None) -> None:
    if gate_logit_normalizer is not None and not gate_logit_normalizer > 0:
        raise ValueError(f"gate_logit_normalizer: expected a number above 0, got {gate_logit_normalizer}")


def check_packing(cu_seqlens: Tensor, B: int) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: expected a tensor, got a {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens: expected the bounds [0, ..., T] of at least one sequence, one-dimensional, "
            f"got the shape {list(cu_seqlens.shape)}"
        )
    if B != 1:
        raise ValueError(f"cu_seqlens: packed sequences go in one row, so B must be 1, got B = {B}")


def check_state(initial_state: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if initial_state.shape != shape:
        raise ValueError(
            f"initial_state: expected the shape [N, H, K, V] = {list(shape)}, got {list(initial_state.shape)}"
        )
    if initial_state.dtype != wide_dtype(q):
        raise ValueError(f"initial_state: expected {wide_dtype(q)} for q of {q.dtype}, got {initial_state.dtype}")


def check_values(g: Tensor | None, q: Tensor, cu_seqlens: Tensor | None) -> None:
    """Log gates (if any) and sequence bounds, where there are values and they are cheap to read: not while tracing,
    and not on an accelerator, which the host would have to wait for. NaN gates pass, as through any arithmetic.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(q, FakeTensor):
        return
    if g is not None and g.numel() and g.max() > 0:
        raise ValueError(f"g: expected log forget gates <= 0, got a maximum of {g.max():.3g}; take logsigmoid first")
    if cu_seqlens is not None:
        bounds, T = cu_seqlens.tolist(), q.shape[1]
        if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens: expected to rise from 0 to T = {T} without a step down, got {bounds}")
