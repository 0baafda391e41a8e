"""The pass over the chunks of a sequence that carries the state on chip.

Forward in time (W = v, X = q_hat, Y = k_hat) it makes o and the states; backward in time (W = do, X = k_hat,
Y = q_hat, A transposed) the same lines make dv and the gradients of the states:

    S_hat = half * S;  out = X S_hat + A W;  S = half * (S_hat + Y^T W)

That is for one gate a key channel. One gate a head needs no reference half way (see head_gate.py); then it is

    out = X S + A W;  S = exp(total) S + Y^T W

One program holds S^T [BV, K] of one head in float32 registers, so that S^T is the left operand of a matmul as it is.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.tiles import chunk_rows, dot, prefetch_tile, sequence_chunks


@triton.jit(do_not_specialize=["N", "T", "segments"])
def scan_kernel(
    x, y, w, scores, shrink, out, states, initial, final, decay, cu_seqlens, offsets, owners, N, T, segments,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PARTS: tl.constexpr, A_PARTS: tl.constexpr, HEAD: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One program: BV columns of one head's state, through one segment (a run of chunks) of one sequence.

    shrink: half [tiles, K], or with HEAD exp(total) [tiles], None where nothing is forgotten. A_PARTS: scores has A in
    so many parts; the second is used backward in time, where the accuracy of dv hangs on it. x, y, scores and states
    are tensor descriptors: the copy engine needs no registers for addresses, S takes them all.
    out, states, initial, final and decay may be None. initial and final: float32 [N, segments, H, K, V];
    decay: float32 [N, segments, H, KP], the factor by which the segment shrinks the state it starts from;
    states: [chunks * H * VP, KP], S_hat^T of every chunk, all VP rows of it: gradients.py reads what pads V too.
    """
    BLOCKS: tl.constexpr = ((V if states is None else VP) + BV - 1) // BV
    pid = tl.program_id(0)
    block, head = pid % BLOCKS, (pid // BLOCKS).to(tl.int64)
    h, segment, n = head % H, (head // H) % segments, head // H // segments
    first, count = sequence_chunks(n, T, offsets, C)
    each = tl.cdiv(count, segments)
    begin = tl.minimum((segment * each).to(tl.int32), count)
    end = tl.minimum(begin + each, count)

    t = tl.arange(0, C)
    kk = tl.arange(0, KP)
    vv = block * BV + tl.arange(0, BV)
    state = ((n * segments + segment) * H + h) * K * V + kk[None, :] * V + vv[:, None]
    inside = (kk < K)[None, :] & (vv < V)[:, None]
    S = tl.zeros([BV, KP], tl.float32)
    if initial is not None:
        S = tl.load(initial + state, mask=inside, other=0)
    product = tl.full([KP], 1.0, tl.float32)

    for i in range(begin, end):
        at = (begin + end - 1 - i) if REVERSE else i
        chunk = (first + at).to(tl.int64)
        tile = chunk * H + h
        row, rows = chunk_rows(chunk, N, T, cu_seqlens, offsets, owners, C)
        rc = (tile * C).to(tl.int32)
        if HEAD:
            factor = 1.0 if shrink is None else tl.load(shrink + tile)
        else:
            factor = tl.load(shrink + tile * KP + kk)
            last = tile + (H if REVERSE else -H)
            owed = tl.load(shrink + last * KP + kk, mask=kk < (KP if i > begin else 0), other=1.0)
        p = (row + t)[:, None] * H * V + h * V + vv[None, :]
        mask = (t < rows)[:, None] & (vv < V)[None, :]
        if PREFETCH:  # noqa: SIM102 (known when compiling)
            if i + 1 < end:
                ahead, there = chunk_rows(chunk + (-1 if REVERSE else 1), N, T, cu_seqlens, offsets, owners, C)
                prefetch_tile(w + ahead * H * V + h * V + block * BV, H * V, there, V - block * BV, C, BV)
        w_tile = tl.trans(tl.load(w + p, mask=mask, other=0).to(y.dtype))
        y_tile = y.load([rc, 0])
        if not HEAD:
            S *= (owed * factor)[None, :]
        if decay is not None:
            product *= factor if HEAD else factor * factor
        S_hat = S.to(y.dtype)
        if states is not None:
            store_rows(states, (tile * VP + block * BV).to(tl.int32), 0, S_hat, PARTS)
        if out is not None:
            x_tile = x.load([rc, 0])
            ra = rc * A_PARTS
            a = scores.load([ra, 0])
            o = dot(S_hat, tl.trans(x_tile), tl.zeros([BV, C], tl.float32), PRECISION)
            o = dot(w_tile, a if REVERSE else tl.trans(a), o, PRECISION)
            if REVERSE and A_PARTS == 2:
                a = scores.load([ra + C, 0])
                o = dot(w_tile, a, o, PRECISION)
            tl.store(out + p, tl.trans(o.to(out.dtype.element_ty)), mask=mask)
        if HEAD:
            S *= factor
        S = dot(w_tile, y_tile, S, PRECISION)

    if final is not None:
        if not HEAD:
            last = (first + (begin if REVERSE else end - 1)).to(tl.int64) * H + h
            S *= tl.load(shrink + last * KP + kk, mask=kk < (KP if end > begin else 0), other=1.0)[None, :]
        tl.store(final + state, S, mask=inside)
    if decay is not None:  # noqa: SIM102 (None is known when compiling, block is not)
        if block == 0:
            tl.store(decay + ((n * segments + segment) * H + h) * KP + kk, product)


@triton.jit
def store_rows(descriptor, row, column, x, PARTS: tl.constexpr):
    """Store x in PARTS bands of columns, so that one band's worth of shared memory is enough on the way."""
    if PARTS == 1:
        descriptor.store([row, column], x)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))
        store_rows(descriptor, row, column, left, PARTS // 2)
        store_rows(descriptor, row, column + x.shape[1] // 2, right, PARTS // 2)


@triton.jit(do_not_specialize=["segments"])
def join_kernel(
    local, decay, initial, final, segments,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From each segment's end state when started from zero, in place: the state that it really starts from."""
    pid = tl.program_id(0)
    vv = pid % (VP // BV) * BV + tl.arange(0, BV)
    pid = pid // (VP // BV)
    kk = pid % (KP // BK) * BK + tl.arange(0, BK)
    head = (pid // (KP // BK)).to(tl.int64)
    n, h = head // H, head % H
    p = kk[:, None] * V + vv[None, :]
    mask = (kk < K)[:, None] & (vv < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        S = tl.load(initial + head * K * V + p, mask=mask, other=0)
    for i in range(segments):
        s = (n * segments + (segments - 1 - i if REVERSE else i)) * H + h
        ends = tl.load(local + s * K * V + p, mask=mask, other=0)
        tl.store(local + s * K * V + p, S, mask=mask)
        S = S * tl.load(decay + s * KP + kk, mask=kk < K, other=0)[:, None] + ends
    if final is not None:
        tl.store(final + head * K * V + p, S, mask=mask)
