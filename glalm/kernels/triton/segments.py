"""Chain the segments of a sequence, which were scanned in parallel, each from a state of zeros."""

import triton
import triton.language as tl
from torch import Tensor

from glalm.kernels.triton.launch import launch, padded_head_size

STAGES = 4  # of the pipelined loop: the states of the next segments are loaded before they are needed


def join_segments(
    ends: Tensor,
    segment_decay: Tensor,
    segments: int,
    initial: Tensor | None,
    final: Tensor | None,
    decay: Tensor | None = None,
    reverse: bool = False,
    write_starts: bool = True,
) -> None:
    """Replace the end states of segments that were scanned from zeros by the states that the segments begin with.

    Args:
        ends: float32 [N, segments, H, K, V] or [N * segments, H, K, V].
        segment_decay: float32 [N, segments, H, KP] or [N * segments, H, KP], the factors by which each segment
            multiplies the state that it begins with. KP is K, padded to a power of two.
        segments: the number of segments of each sequence.
        initial: float32 [N, H, K, V], the states before the first segments of the chains, or None for zeros.
        final: float32 [N, H, K, V] or None; receives the states after the last segments of the chains.
        decay: float32 [N, H, K] or None; receives the products of the factors of all segments.
        reverse: the chain begins with the last segment and ends with the first.
        write_starts: overwrite `ends`. If False, only `final` and `decay` are computed.
    """
    H, K, V = ends.shape[-3:]
    KP = segment_decay.shape[-1]
    VP = padded_head_size(V)
    BK = min(KP, 32)
    BV = min(VP, 64)
    constants = dict(
        H=H, K=K, KP=KP, V=V, VP=VP, BK=BK, BV=BV, REVERSE=reverse, WRITE_STARTS=write_starts, STAGES=STAGES
    )
    sequences = ends.shape[:-3].numel() // segments
    programs = sequences * H * (KP // BK) * (VP // BV)
    launch(join_segments_kernel, programs, (ends, segment_decay, initial, final, decay, segments), constants, {})


@triton.jit(do_not_specialize=["segments"])
def join_segments_kernel(
    ends, segment_decay, initial, final, decay, segments,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, WRITE_STARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Chain BK x BV numbers of one head's state in each program; see join_segments for the arguments."""
    pid = tl.program_id(0)
    block = pid % (VP // BV)
    vv = block * BV + tl.arange(0, BV)
    pid = pid // (VP // BV)
    kk = pid % (KP // BK) * BK + tl.arange(0, BK)
    head = (pid // (KP // BK)).to(tl.int64)
    n = head // H
    h = head % H
    p = kk[:, None] * V + vv[None, :]
    mask = (kk < K)[:, None] & (vv < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    total_decay = tl.full([BK], 1.0, tl.float32)
    if initial is not None:
        S = tl.load(initial + head * K * V + p, mask=mask, other=0)
    # The loads of the next segments do not wait for this one's sums.
    for i in tl.range(0, segments, num_stages=STAGES):
        s = (n * segments + (segments - 1 - i if REVERSE else i)) * H + h
        end = tl.load(ends + s * K * V + p, mask=mask, other=0)
        factor = tl.load(segment_decay + s * KP + kk, mask=kk < K, other=0)
        if WRITE_STARTS:
            tl.store(ends + s * K * V + p, S, mask=mask)
        S = S * factor[:, None] + end
        total_decay *= factor
    if final is not None:
        tl.store(final + head * K * V + p, S, mask=mask)
    if decay is not None:
        writes = tl.where(block == 0, K, 0)  # Only the first block of columns writes the decay.
        tl.store(decay + head * K + kk, total_decay, mask=kk < writes)
