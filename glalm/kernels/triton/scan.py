"""The pass over the chunks of a sequence, which carries the state in registers.

Forward in time (W = v, X = q_hat, Y = k_hat) it computes o and the states. Backward in time (W = do, X = k_hat, Y =
q_hat, A transposed) the same lines compute dv and the gradients of the states. With one gate per key channel:

    S_hat = half_decay * S;  out = X S_hat + A W;  S = half_decay * (S_hat + Y^T W)

With one gate per head (see head_gate.py):

    out = X S + A W;  S = exp(total) S + Y^T W

A program holds S^T [BV, KP] of one head in float32 registers, the layout in which S^T is the left operand of a matmul.

A head of keys and values has one state, which GROUP heads of queries read. Forward in time each of them has its X, A
and out. Backward in time each has its Y, A and W, and their products are summed in the order of the heads.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.tiles import chunks_of_sequence, dot_add, locate_chunk, prefetch_tile


@triton.jit(do_not_specialize=["N", "T", "segments"])
def scan_kernel(
    x, y, w, scores, decay, out, states, initial, final, segment_decay, cu_seqlens, offsets, owners, N, T, segments,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, STORE_BANDS: tl.constexpr, SCORE_PARTS: tl.constexpr, SCALAR_DECAY: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Carry BV columns of one head's state through one segment (a run of chunks) of one sequence in each program.

    Inputs:
        x: [tiles * READS, C, KP], where READS is GROUP forward in time, else 1
        y: [tiles * WRITES, C, KP]; w: v or do, [B, T, H * WRITES, V], where WRITES is GROUP backward in time, else 1
        scores: A of tiles * GROUP in SCORE_PARTS parts; the second part is used backward in time, where dv's accuracy
            depends on it
        decay: half_decay [tiles, KP]; with SCALAR_DECAY exp(total) [tiles]; None without a gate
        initial: float32 [N, segments, H, K, V] or None for zeros
    Outputs, each of which may be None:
        out: [B, T, H * READS, V]
        states: [tiles * VP, KP], S_hat^T of every tile including its padding, which gradients.py reads too
        final: float32 [N, segments, H, K, V]
        segment_decay: float32 [N, segments, H, KP], the factor by which the segment multiplies its initial state

    x, y, scores and states are tensor descriptors, whose addresses the copy engine computes: the state needs all
    registers.

    The forward pass asks for `out`, the backward pass for `states` alone and then, in reverse, for `out` and `states`;
    finding the segments' initial states asks for `final` and `segment_decay` alone.
    """
    BLOCKS: tl.constexpr = ((V if states is None else VP) + BV - 1) // BV
    READS: tl.constexpr = 1 if REVERSE else GROUP
    WRITES: tl.constexpr = GROUP if REVERSE else 1
    pid = tl.program_id(0)
    block = pid % BLOCKS
    head = (pid // BLOCKS).to(tl.int64)
    h = head % H
    segment = (head // H) % segments
    n = head // H // segments
    first, count = chunks_of_sequence(n, T, offsets, C)
    chunks_per_segment = tl.cdiv(count, segments)
    begin = tl.minimum((segment * chunks_per_segment).to(tl.int32), count)
    end = tl.minimum(begin + chunks_per_segment, count)

    t = tl.arange(0, C)
    kk = tl.arange(0, KP)
    vv = block * BV + tl.arange(0, BV)
    state = ((n * segments + segment) * H + h) * K * V + kk[None, :] * V + vv[:, None]
    inside = (kk < K)[None, :] & (vv < V)[:, None]
    S = tl.zeros([BV, KP], tl.float32)
    if initial is not None:
        S = tl.load(initial + state, mask=inside, other=0)
    segment_factor = tl.full([KP], 1.0, tl.float32)

    for i in range(begin, end):
        position = (begin + end - 1 - i) if REVERSE else i
        chunk = (first + position).to(tl.int64)
        tile = chunk * H + h
        row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
        xy_row = (tile * C).to(tl.int32)
        if SCALAR_DECAY:
            chunk_decay = 1.0 if decay is None else tl.load(decay + tile)
        else:
            chunk_decay = tl.load(decay + tile * KP + kk)
            # The second factor half_decay of the preceding chunk is applied together with the first one of this chunk.
            previous_tile = tile + (H if REVERSE else -H)
            pending_decay = tl.load(decay + previous_tile * KP + kk, mask=kk < (KP if i > begin else 0), other=1.0)
        p = (row + t)[:, None] * H * V + h * V + vv[None, :]
        mask = (t < rows)[:, None] & (vv < V)[None, :]
        if PREFETCH:  # noqa: SIM102 (a compile-time condition)
            if i + 1 < end:
                next_row, next_rows = locate_chunk(chunk + (-1 if REVERSE else 1), N, T, cu_seqlens, offsets, owners, C)
                for j in range(WRITES):
                    next_w = w + (next_row * H * WRITES + h * WRITES + j) * V + block * BV
                    prefetch_tile(next_w, H * WRITES * V, next_rows, V - block * BV, C, BV)
        if WRITES == 1:
            w_tile = tl.trans(tl.load(w + p, mask=mask, other=0).to(y.dtype))
            y_tile = y.load([xy_row, 0])
        if not SCALAR_DECAY:
            S *= (pending_decay * chunk_decay)[None, :]
        if segment_decay is not None:
            segment_factor *= chunk_decay if SCALAR_DECAY else chunk_decay * chunk_decay
        S_hat = S.to(y.dtype)
        if states is not None:
            store_in_bands(states, (tile * VP + block * BV).to(tl.int32), 0, S_hat, STORE_BANDS)
        if WRITES == 1:
            if out is not None:
                for j in range(READS):
                    x_row = xy_row * READS + j * C
                    x_tile = x.load([x_row, 0])
                    a = scores.load([x_row * SCORE_PARTS, 0])
                    o = dot_add(S_hat, tl.trans(x_tile), tl.zeros([BV, C], tl.float32), PRECISION)
                    o = add_within_chunk(o, w_tile, a, scores, x_row, C, SCORE_PARTS, REVERSE, PRECISION)
                    p_out = (row + t)[:, None] * H * READS * V + (h * READS + j) * V + vv[None, :]
                    tl.store(out + p_out, tl.trans(o.to(out.dtype.element_ty)), mask=mask)
            if SCALAR_DECAY:
                S *= chunk_decay
            S = dot_add(w_tile, y_tile, S, PRECISION)
        else:
            if out is not None:
                x_tile = x.load([xy_row, 0])
                o = dot_add(S_hat, tl.trans(x_tile), tl.zeros([BV, C], tl.float32), PRECISION)
            if SCALAR_DECAY:
                S *= chunk_decay
            for j in range(WRITES):
                p_w = (row + t)[:, None] * H * WRITES * V + (h * WRITES + j) * V + vv[None, :]
                w_tile = tl.trans(tl.load(w + p_w, mask=mask, other=0).to(y.dtype))
                y_row = xy_row * WRITES + j * C
                y_tile = y.load([y_row, 0])
                if out is not None:
                    a = scores.load([y_row * SCORE_PARTS, 0])
                    o = add_within_chunk(o, w_tile, a, scores, y_row, C, SCORE_PARTS, REVERSE, PRECISION)
                S = dot_add(w_tile, y_tile, S, PRECISION)
            if out is not None:
                tl.store(out + p, tl.trans(o.to(out.dtype.element_ty)), mask=mask)

    if final is not None:
        if not SCALAR_DECAY:
            # The second factor half_decay of the last chunk.
            final_tile = (first + (begin if REVERSE else end - 1)).to(tl.int64) * H + h
            S *= tl.load(decay + final_tile * KP + kk, mask=kk < (KP if end > begin else 0), other=1.0)[None, :]
        tl.store(final + state, S, mask=inside)
    if segment_decay is not None:  # noqa: SIM102 (a compile-time condition, unlike the next one)
        if block == 0:
            tl.store(segment_decay + ((n * segments + segment) * H + h) * KP + kk, segment_factor)


@triton.jit
def add_within_chunk(
    o, w_tile, a, scores, q_row, C: tl.constexpr, SCORE_PARTS: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return o + (A W)^T, [BV, C], with A transposed backward in time.

    a: the first part of A; q_row: the first row of its tile of q_hat.
    """
    o = dot_add(w_tile, a if REVERSE else tl.trans(a), o, PRECISION)
    if REVERSE and SCORE_PARTS == 2:
        a = scores.load([q_row * SCORE_PARTS + C, 0])
        o = dot_add(w_tile, a, o, PRECISION)
    return o


@triton.jit
def store_in_bands(descriptor, row, column, x, STORE_BANDS: tl.constexpr):
    """Store x in STORE_BANDS bands of columns, so that shared memory holds one band at a time."""
    if STORE_BANDS == 1:
        descriptor.store([row, column], x)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))
        store_in_bands(descriptor, row, column, left, STORE_BANDS // 2)
        store_in_bands(descriptor, row, column + x.shape[1] // 2, right, STORE_BANDS // 2)
