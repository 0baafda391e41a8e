"""One token of one sequence through a layer's state, from the gates' low-rank projection on: decoding, as matvec.py.

The state is asked for before the kernel that makes q, k and v has ended (programmatic dependent launch): nothing but
this kernel, a token ago, has written it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from glalm.kernels.triton.launch import launch
from glalm.kernels.triton.matvec import dependent_launch
from glalm.kernels.triton.recurrent import columns
from glalm.kernels.triton.saved import padded
from glalm.kernels.triton.tiles import log_gates


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, weight: Tensor, bias: Tensor, normalizer: float, state: Tensor
) -> Tensor:
    """S = diag(exp(g)) S + k^T v and o = K^-1/2 q S for each head, with g = logsigmoid(weight low + bias) / normalizer.

    q, k: [H K]; v: [H V]; low: [R]; weight: [H K, R]; bias: [H K]; state: float32 [1, H, K, V], written over.
    Returns o [H V] as v.
    """
    _, H, K, V = state.shape
    KP = padded(K)
    BV = columns(KP, V)
    o, pdl = torch.empty_like(v), dependent_launch(v.device)
    R = len(low)
    constants = dict(K=K, KP=KP, V=V, BV=BV, R=R, RP=triton.next_power_of_2(R), PDL=pdl)
    options = {"num_warps": 4} | ({"launch_pdl": True} if pdl else {})
    args = q, k, v, low, weight, bias, state, o, 1 / normalizer, K**-0.5
    launch(step_kernel, H * triton.cdiv(V, BV), args, constants, options)
    return o


@triton.jit
def step_kernel(
    q, k, v, low, weight, bias, state, o, inverse, scale,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BV columns of one head's state."""
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    h = tl.program_id(0) // BLOCKS
    kk = tl.arange(0, KP)
    vv = tl.program_id(0) % BLOCKS * BV + tl.arange(0, BV)
    rr = tl.arange(0, RP)
    at = state + h * K * V + kk[:, None] * V + vv[None, :]
    inside = (kk < K)[:, None] & (vv < V)[None, :]
    S = tl.load(at, mask=inside, other=0)
    w = tl.load(weight + (h * K + kk)[:, None] * R + rr[None, :], mask=(kk < K)[:, None] & (rr < R)[None, :], other=0)
    b = tl.load(bias + h * K + kk, mask=kk < K, other=0).to(tl.float32)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    z = tl.load(low + rr, mask=rr < R, other=0).to(tl.float32)
    x = tl.sum(w.to(tl.float32) * z[None, :], axis=1) + b
    gate = tl.exp(log_gates(x, inverse, True))
    q_t = tl.load(q + h * K + kk, mask=kk < K, other=0).to(tl.float32) * scale
    k_t = tl.load(k + h * K + kk, mask=kk < K, other=0).to(tl.float32)
    v_t = tl.load(v + h * V + vv, mask=vv < V, other=0).to(tl.float32)
    S = S * gate[:, None] + k_t[:, None] * v_t[None, :]
    tl.store(o + h * V + vv, tl.sum(S * q_t[:, None], axis=0).to(o.dtype.element_ty), mask=vv < V)
    tl.store(at, S, mask=inside)
