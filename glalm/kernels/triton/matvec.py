"""Products of matrices with one vector, for decoding a single sequence, where reading the weights takes all the time.

A program computes a few rows of one of up to five matrices. It starts loading their weights before the preceding kernel
has finished the vector (programmatic dependent launch), so that the memory is never idle between two launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from glalm.kernels.triton.launch import architecture, launch, padded_head_size

WEIGHTS_PER_PROGRAM = 8192  # of one matrix


def matvec(
    x: Tensor,
    weights: list[Tensor],
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> list[Tensor]:
    """Return y_i = W_i f(x) for each of up to five matrices, summed in float32, in x's dtype.

    Args:
        x: [K]
        weights: W_i [N_i, K], of x's dtype
        norm: [G] weights of an RMSNorm over each G channels of x, the first part of f; G is K, or G and K are powers of
            two
        eps: of the RMSNorm
        gate: [K]; f then multiplies by silu(gate)
        residual: [N_0], added to the result of a single matrix
        swiglu: return the one result silu(W_0 f(x)) * (W_1 f(x)) instead
    """
    assert len(weights) == 2 if swiglu else len(weights) <= 5
    K = len(x)
    KP = padded_head_size(K)
    rows = max(1, min(64, WEIGHTS_PER_PROGRAM // KP))
    sizes = [len(w) for w in weights[: 1 if swiglu else 5]]
    results = [torch.empty(N, device=x.device, dtype=x.dtype) for N in sizes]
    none = [None] * (5 - len(weights))
    args = x, norm, gate, *weights, *none, *results, *([None] * (5 - len(results))), residual, eps
    sizes += [0] * (5 - len(sizes))
    pdl = supports_dependent_launch(x.device)
    constants = dict(
        K=K, KP=KP, G=KP if norm is None or len(norm) == K else len(norm), BN=rows, N0=sizes[0], N1=sizes[1],
        N2=sizes[2], N3=sizes[3], N4=sizes[4], SWIGLU=swiglu, PDL=pdl,
    )  # fmt: skip
    programs = sum(triton.cdiv(N, rows) for N in sizes)
    options = {"num_warps": 8, "num_stages": 1} | ({"launch_pdl": True} if pdl else {})
    launch(matvec_kernel, programs, args, constants, options)
    return results


def supports_dependent_launch(device: torch.device) -> bool:
    """Return whether the device can start a kernel before the preceding one has ended."""
    return device.type == "cuda" and architecture(device) >= 9


@triton.jit
def load_rows(w, n, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Return the rows n of the matrix w [N, K] as a tile [len(n), KP], with zeros outside of it."""
    kk = tl.arange(0, KP)
    return tl.load(w + n.to(tl.int64)[:, None] * K + kk[None, :], mask=(n < N)[:, None] & (kk < K)[None, :], other=0)


@triton.jit
def store_rows(out, n, y, N: tl.constexpr):
    """Store y at the places n of the vector out [N]."""
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def matvec_kernel(
    x, norm, gate, w0, w1, w2, w3, w4, y0, y1, y2, y3, y4, residual, eps,
    K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute BN rows of one matrix in each program. Programs are numbered through all matrices in order."""
    E0: tl.constexpr = (N0 + BN - 1) // BN  # E_i is the first program beyond matrix i.
    E1: tl.constexpr = E0 + (N1 + BN - 1) // BN
    E2: tl.constexpr = E1 + (N2 + BN - 1) // BN
    E3: tl.constexpr = E2 + (N3 + BN - 1) // BN
    pid = tl.program_id(0)
    each = tl.arange(0, BN)
    # Triton compiles all branches. That of a missing matrix is given another one to read, and no program takes it.
    if pid < E0:
        tile = load_rows(w0, pid * BN + each, N0, K, KP)
    elif pid < E1:
        tile = load_rows(w1 if N1 > 0 else w0, (pid - E0) * BN + each, N1, K, KP)
    elif pid < E2:
        tile = load_rows(w2 if N2 > 0 else w0, (pid - E1) * BN + each, N2, K, KP)
    elif pid < E3:
        tile = load_rows(w3 if N3 > 0 else w0, (pid - E2) * BN + each, N3, K, KP)
    else:
        tile = load_rows(w4 if N4 > 0 else w0, (pid - E3) * BN + each, N4, K, KP)
    if SWIGLU:
        up = load_rows(w1, pid * BN + each, N0, K, KP)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()

    kk = tl.arange(0, KP)
    z = tl.load(x + kk, mask=kk < K, other=0).to(tl.float32)
    if norm is not None:
        z = normalize_groups(z, eps, K, KP, G) * tl.load(norm + kk % G, mask=kk < K, other=0).to(tl.float32)
    if gate is not None:
        r = tl.load(gate + kk, mask=kk < K, other=0).to(tl.float32)
        z *= r * tl.sigmoid(r)
    y = tl.sum(tile.to(tl.float32) * z[None, :], axis=1)
    if SWIGLU:
        y = y * tl.sigmoid(y) * tl.sum(up.to(tl.float32) * z[None, :], axis=1)
    if pid < E0:
        n = pid * BN + each
        if residual is not None:
            y += tl.load(residual + n, mask=n < N0, other=0).to(tl.float32)
        store_rows(y0, n, y, N0)
    elif pid < E1:
        store_rows(y1 if N1 > 0 else y0, (pid - E0) * BN + each, y, N1)
    elif pid < E2:
        store_rows(y2 if N2 > 0 else y0, (pid - E1) * BN + each, y, N2)
    elif pid < E3:
        store_rows(y3 if N3 > 0 else y0, (pid - E2) * BN + each, y, N3)
    else:
        store_rows(y4 if N4 > 0 else y0, (pid - E3) * BN + each, y, N4)


@triton.jit
def normalize_groups(z, eps, K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr):
    """Divide z by its root mean square, over each group of G channels or over all K of them (G == KP)."""
    if G == KP:
        z = z * tl.rsqrt(tl.sum(z * z, axis=0) / K + eps)
    else:
        groups = tl.reshape(z, [KP // G, G])
        z = tl.reshape(groups * tl.rsqrt(tl.sum(groups * groups, axis=1) / G + eps)[:, None], [KP])
    return z
