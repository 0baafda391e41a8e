"""A vector through matrices, and what is around it: decoding one sequence, where weights are all the traffic.

One program computes a few rows of one of up to five matrices. It asks for their weights first, then waits for the
kernel that makes the vector (programmatic dependent launch): the memory is never idle between two launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from glalm.kernels.triton.launch import launch
from glalm.kernels.triton.launch_configs import architecture
from glalm.kernels.triton.saved import padded

TILE = 8192  # weights of one matrix a program holds


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
    """y_i = W_i f(x) for x [K] and W_i [N_i, K] of the same dtype, in which the results are, from float32 sums.

    f: with norm [G], an RMSNorm over each G channels of x (all of them, or G and K powers of two); with gate [K], times
    silu(gate). Of one matrix: + residual. swiglu: silu(W_0 f(x)) * (W_1 f(x)), one result.
    """
    K = len(x)
    KP = padded(K)
    rows = max(1, min(64, TILE // KP))
    sizes = [len(w) for w in weights[: 1 if swiglu else 5]]
    results = [torch.empty(N, device=x.device, dtype=x.dtype) for N in sizes]
    none = [None] * (5 - len(weights))
    args = x, norm, gate, *weights, *none, *results, *([None] * (5 - len(results))), residual, eps
    sizes += [0] * (5 - len(sizes))
    pdl = dependent_launch(x.device)
    constants = dict(
        K=K, KP=KP, G=KP if norm is None or len(norm) == K else len(norm), BN=rows, N0=sizes[0], N1=sizes[1],
        N2=sizes[2], N3=sizes[3], N4=sizes[4], SWIGLU=swiglu, PDL=pdl,
    )  # fmt: skip
    programs = sum(triton.cdiv(N, rows) for N in sizes)
    options = {"num_warps": 8, "num_stages": 1} | ({"launch_pdl": True} if pdl else {})
    launch(matvec_kernel, programs, args, constants, options)
    return results


def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may begin before the one it waits for has ended."""
    return device.type == "cuda" and architecture(device) >= 9


@triton.jit
def load_rows(w, n, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    kk = tl.arange(0, KP)
    return tl.load(w + n.to(tl.int64)[:, None] * K + kk[None, :], mask=(n < N)[:, None] & (kk < K)[None, :], other=0)


@triton.jit
def store_rows(out, n, y, N: tl.constexpr):
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def matvec_kernel(
    x, norm, gate, w0, w1, w2, w3, w4, y0, y1, y2, y3, y4, residual, eps,
    K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BN rows of the matrix that its number falls to."""
    E0: tl.constexpr = (N0 + BN - 1) // BN  # the first program beyond each matrix
    E1: tl.constexpr = E0 + (N1 + BN - 1) // BN
    E2: tl.constexpr = E1 + (N2 + BN - 1) // BN
    E3: tl.constexpr = E2 + (N3 + BN - 1) // BN
    pid = tl.program_id(0)
    each = tl.arange(0, BN)
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
        z = normalised(z, eps, K, KP, G) * tl.load(norm + kk % G, mask=kk < K, other=0).to(tl.float32)
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
def normalised(z, eps, K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr):
    """z over its root mean square, in groups of G channels, or all K of them."""
    if G == KP:
        z = z * tl.rsqrt(tl.sum(z * z, axis=0) / K + eps)
    else:
        groups = tl.reshape(z, [KP // G, G])
        z = tl.reshape(groups * tl.rsqrt(tl.sum(groups * groups, axis=1) / G + eps)[:, None], [KP])
    return z
