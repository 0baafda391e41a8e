"""The recurrence token by token, for decoding. Each state is read once and written once."""

import triton
import triton.language as tl
from torch import Tensor

from glalm.kernels.common import heads_per_group
from glalm.kernels.triton.launch import launch, padded_head_size

# 32 for each of a program's threads. More would leave a batch of one too few programs to fill the GPU.
STATE_NUMBERS_PER_PROGRAM = 4096


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    final_state: Tensor | None,
    cu_seqlens: Tensor | None,
    beta: Tensor | None = None,
) -> Tensor:
    """Return o, [B, T, H * group, V], and write the final states to `final_state` where it is not None.

    Args:
        q: [B, T, H * group, K]; head h of the others serves the heads h * group, ..., (h + 1) * group - 1
        k: [B, T, H, K]
        v: [B, T, H, V]
        g: log gates [B, T, H, K], [B, T, H], [H], or None
        beta: [B, T, H] for the delta rule, or None
        initial_state, final_state: float32 [N, H, K, V]; final_state is contiguous and may be initial_state itself
    """
    inputs = q, k, v, g, beta, initial_state, cu_seqlens
    q, k, v, g, beta, initial_state, cu_seqlens = (x if x is None else x.contiguous() for x in inputs)
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    KP = padded_head_size(K)
    BV = columns_per_program(KP, V)
    o = v.new_empty(*q.shape[:3], V)
    gate = "none" if g is None else {4: "channel", 3: "head", 1: "fixed"}[g.dim()]
    # Triton would compile another kernel for the integer 1.
    args = q, k, v, g, beta, o, initial_state, final_state, cu_seqlens, float(scale), T
    constants = dict(H=H, K=K, KP=KP, V=V, BV=BV, GATE=gate, GROUP=heads_per_group(q, k))
    launch(recurrent_kernel, N * H * triton.cdiv(V, BV), args, constants, {"num_warps": 4})
    return o


def columns_per_program(KP: int, V: int) -> int:
    """Return how many columns of a state a program holds."""
    return max(4, min(64, STATE_NUMBERS_PER_PROGRAM // KP, triton.next_power_of_2(V)))


@triton.jit(do_not_specialize=["T"])
def recurrent_kernel(
    q, k, v, g, beta, o, initial, final, cu_seqlens, scale, T,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Update BV columns of one head's state through one sequence in each program.

    initial and final may be None, or the same buffer. GROUP heads of q and o read the state.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    head = (tl.program_id(0) // BLOCKS).to(tl.int64)
    n = head // H
    h = head % H
    kk = tl.arange(0, KP)
    vv = tl.program_id(0) % BLOCKS * BV + tl.arange(0, BV)
    state = head * K * V + kk[:, None] * V + vv[None, :]
    inside = (kk < K)[:, None] & (vv < V)[None, :]
    S = tl.zeros([KP, BV], tl.float32)
    if initial is not None:
        S = tl.load(initial + state, mask=inside, other=0)
    if cu_seqlens is None:
        first = n * T
        count = T
    else:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        count = (tl.load(cu_seqlens + n + 1) - first).to(tl.int32)
    if GATE == "fixed":
        decay = tl.exp(tl.load(g + h).to(tl.float32))
    for t in range(count):
        row = (first + t) * H + h
        q_row = row * GROUP
        q_t = tl.load(q + q_row * K + kk, mask=kk < K, other=0).to(tl.float32) * scale
        k_t = tl.load(k + row * K + kk, mask=kk < K, other=0).to(tl.float32)
        v_t = tl.load(v + row * V + vv, mask=vv < V, other=0).to(tl.float32)
        if GATE == "channel":
            S *= tl.exp(tl.load(g + row * K + kk, mask=kk < K, other=0).to(tl.float32))[:, None]
        elif GATE == "head":
            S *= tl.exp(tl.load(g + row).to(tl.float32))
        elif GATE == "fixed":
            S *= decay
        if beta is not None:
            v_t = (v_t - tl.sum(S * k_t[:, None], axis=0)) * tl.load(beta + row).to(tl.float32)
        S += k_t[:, None] * v_t[None, :]
        tl.store(o + q_row * V + vv, tl.sum(S * q_t[:, None], axis=0).to(o.dtype.element_ty), mask=vv < V)
        for j in range(1, GROUP):
            q_j = tl.load(q + (q_row + j) * K + kk, mask=kk < K, other=0).to(tl.float32) * scale
            tl.store(o + (q_row + j) * V + vv, tl.sum(S * q_j[:, None], axis=0).to(o.dtype.element_ty), mask=vv < V)
    if final is not None:
        tl.store(final + state, S, mask=inside)
