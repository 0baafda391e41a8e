"""One decoding step of a GLA layer for a single sequence: the gate's up-projection, the state update and the output.

A program starts loading its part of the state before the kernel that computes q, k and v has ended (programmatic
dependent launch). Only this kernel writes the state, one token earlier, and between two tokens lies a kernel that waits
for all before it: the lookup of the embedding. Launched like these, that one would have to wait here, too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from glalm.kernels.triton.launch import launch, padded_head_size
from glalm.kernels.triton.matvec import supports_dependent_launch
from glalm.kernels.triton.recurrent import columns_per_program
from glalm.kernels.triton.tiles import compute_log_gates


def gla_decode_step(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, weight: Tensor, bias: Tensor, normalizer: float, state: Tensor
) -> Tensor:
    """Update the state in place and return the output of one token, o [H * V], in v's dtype.

    For each head: S = diag(exp(g)) S + k^T v and o = K^-1/2 q S, with g = logsigmoid(weight low + bias) / normalizer.

    Args:
        q, k: [H * K]
        v: [H * V]
        low: [R], the gate's down-projection of the token
        weight, bias: [H * K, R] and [H * K], the gate's up-projection
        state: float32 [1, H, K, V], contiguous, overwritten
    """
    assert state.is_contiguous()
    _, H, K, V = state.shape
    R = len(low)
    KP = padded_head_size(K)
    BV = columns_per_program(KP, V)
    o = torch.empty_like(v)
    pdl = supports_dependent_launch(v.device)
    constants = dict(K=K, KP=KP, V=V, BV=BV, R=R, RP=triton.next_power_of_2(R), PDL=pdl)
    options = {"num_warps": 4} | ({"launch_pdl": True} if pdl else {})
    args = q, k, v, low, weight, bias, state, o, 1 / normalizer, K**-0.5
    launch(gla_decode_step_kernel, H * triton.cdiv(V, BV), args, constants, options)
    return o


@triton.jit
def gla_decode_step_kernel(
    q, k, v, low, weight, bias, state, o, inv_normalizer, scale,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Update BV columns of one head's state in each program."""
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
    gate = tl.exp(compute_log_gates(x, inv_normalizer, True))
    q_t = tl.load(q + h * K + kk, mask=kk < K, other=0).to(tl.float32) * scale
    k_t = tl.load(k + h * K + kk, mask=kk < K, other=0).to(tl.float32)
    v_t = tl.load(v + h * V + vv, mask=vv < V, other=0).to(tl.float32)
    S = S * gate[:, None] + k_t[:, None] * v_t[None, :]
    tl.store(o + h * V + vv, tl.sum(S * q_t[:, None], axis=0).to(o.dtype.element_ty), mask=vv < V)
    tl.store(at, S, mask=inside)
