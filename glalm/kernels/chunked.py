"""Chunkwise GLA in plain PyTorch: the path of CPU tensors, and the algorithm to read before the fused kernels.

GLA (arXiv 2312.06635) carries a state S of K x V numbers through time and forgets channel by channel:

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = q_t S_t

Token by token these are T small steps. In chunks of C tokens they are a few large matmuls: with G(a, b] the sum
of g over the tokens a < l <= b of a chunk, and S the state that enters it,

    o_i = sum_{j <= i} A_ij v_j + (q_i * exp G(start, i]) S      A_ij = sum_k q_ik k_jk exp G(j, i]_k
    S  <- diag(exp G(start, end]) S + sum_j (k_j * exp G(j, end])^T v_j

Every exponent here is <= 0. The difficulty is A: as a product of q * exp G(start, i] and k * exp -G(start, j] it would
be one matmul, but the second factor overflows once a chunk forgets much. The paper cuts the chunk into sub-chunks and
takes one exponent a pair inside them. Here a block whose gates are mild is one such matmul, measured from its middle
rather than its start; any other block is halved, down to single tokens if need be, and its halves meet in a matmul of
what they are known by anyway, q * exp G(start, i] of the second and k * exp G(j, end] of the first.

Only where gates are mild is a G the difference of two sums. A gate of -1e5 would leave such a difference no low bits,
and so spoil the tokens that follow it.

Gradients: where e scales q as q * exp(e), de = q * dq; where it scales k as k * exp(-e), de = -k * dk (the
paper's closed form for the gate); and where e is made of sums of g, the transposed sums take de to dg. All of
it stays within a chunk: what came before meets what comes after only in sum_v S * dS.

Inside this file the chunks of all heads are one batch, [n, C, K or V].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.common import CHUNK, wide_dtype

# The largest exponent that q or k is scaled by: in float32 a sum of gates near 20 is off by a few 1e-6, and so are the
# results. Larger ones would do before anything overflows, at that cost.
MILD = 20.0
# exp of this is 0 in every dtype and, unlike -inf, it survives being multiplied by the zeros of a matmul.
FORGET_ALL = -800.0


# 1. Tokens to chunks and back ------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where each token goes when the sequences are cut into chunks.

    Chunks are ordered by their number within their sequence, then by sequence, longest first. So the chunks
    number c of all sequences that have one are neighbours, steps[c], and belong to the first of the sorted states.
    """

    chunk: int
    steps: list[slice]
    order: Tensor  # [N] the sequence of each sorted state
    rank: Tensor  # [N] its inverse
    place: Tensor  # [tokens * H] position of each token and head in the chunks
    source: Tensor  # [chunks * H * chunk] its inverse; padding points one past the last token

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, D] to [n, chunk, D], zeros in the padding."""
        x = F.pad(x.reshape(-1, x.shape[-1]).to(dtype), (0, 0, 0, 1))
        return x.index_select(0, self.source).view(-1, self.chunk, x.shape[-1])

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of cut, in the shape and dtype of `like`."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.place).view(like.shape).to(like.dtype)


def lay_out(q: Tensor, cu_seqlens: Tensor | None) -> Layout:
    B, T, H, _ = q.shape
    lengths = torch.full((B,), T) if cu_seqlens is None else cu_seqlens.cpu().long().diff()
    N, tokens = len(lengths), B * T
    longest = max(lengths.tolist(), default=0)
    chunk = min(CHUNK, 1 << max(longest - 1, 0).bit_length())  # a power of two, to be halved

    counts = (lengths + chunk - 1) // chunk
    order = counts.argsort(descending=True, stable=True)
    rank = order.argsort()
    running = N - counts.bincount().cumsum(0)[:-1]  # how many sequences have a chunk number 0, 1, ...
    first = F.pad(running.cumsum(0), (1, 0))
    steps = [slice(a, b) for a, b in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)]

    sequence = torch.arange(N).repeat_interleave(lengths)
    t = torch.arange(tokens) - (lengths.cumsum(0) - lengths)[sequence]
    row = first[t // chunk] + rank[sequence]
    place = ((row[:, None] * H + torch.arange(H)) * chunk + (t % chunk)[:, None]).view(-1)
    source = torch.full((int(first[-1]) * H * chunk,), tokens * H)
    source[place] = torch.arange(tokens * H)
    return Layout(chunk, steps, *(x.to(q.device) for x in (order, rank, place, source)))


# 2. Within a chunk -----------------------------------------------------------------------------------------


class Block(NamedTuple):
    """All that the rest of the computation needs of n blocks of C tokens, and the way back through it."""

    A: Tensor  # [n, C, C] A_ij above for i >= j, else 0
    q: Tensor  # [n, C, K] q_i * exp G(start, i]
    k: Tensor  # [n, C, K] k_j * exp G(j, end]
    g: Tensor  # [n, K] G(start, end]
    # From the gradients of these four (dA may be overwritten) to those of the block's q, k and g.
    pullback: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def block(q: Tensor, k: Tensor, g: Tensor) -> Block:
    sums = from_middle(g)
    e = sums @ g
    wild = e.abs().amax((1, 2)) >= MILD
    if not wild.any():
        return mild_block(q, k, g, e, sums)
    if wild.all():
        return halved_block(q, k, g)

    groups = wild.nonzero().view(-1), (~wild).nonzero().view(-1)
    parts = [block(q[i], k[i], g[i]) for i in groups]
    back = torch.cat(groups).argsort()

    def pullback(*grads):
        parts_grads = [part.pullback(*(d[i] for d in grads)) for part, i in zip(parts, groups, strict=True)]
        return tuple(torch.cat(d)[back] for d in zip(*parts_grads, strict=True))

    return Block(*(torch.cat(x)[back] for x in zip(*(part[:4] for part in parts), strict=True)), pullback)


def from_middle(g: Tensor) -> Tensor:
    """[n, C, C], row i of which sums g from the middle of the block to token i; negated, where i comes first.

    With e = from_middle(g) @ g, G(j, i] = e_i - e_j for all i > j.
    """
    n, C, _ = g.shape
    middle = max(C // 2, 1)
    same_half = g.new_ones(C, C)
    same_half[middle:, :middle] = same_half[:middle, middle:] = 0
    sums = same_half.tril()
    sums[:middle] -= same_half[:middle]
    return sums.expand(n, C, C)


def mild_block(q: Tensor, k: Tensor, g: Tensor, e: Tensor, sums: Tensor) -> Block:
    """All pairs in one matmul of q * exp(e) and k * exp(-e). What may overflow are pairs i < j, dropped unread."""
    middle = max(g.shape[1] // 2, 1)
    before, after = g[:, :middle].sum(1), g[:, middle:].sum(1)
    enter, leave, decay = before.exp()[:, None], after.exp()[:, None], e.exp_()
    q, k = q * decay, k / decay
    q_start, k_end = q * enter, k * leave

    def pullback(dA, dq_start, dk_end, dtotal):
        dA = dA.tril_()
        dq = (dA @ k).addcmul_(dq_start, enter)
        dk = (dA.mT @ q).addcmul_(dk_end, leave)
        dg = sums.mT @ (q * dq).addcmul_(k, dk, value=-1)
        dg[:, :middle] += ((q_start * dq_start).sum(1) + dtotal)[:, None]
        dg[:, middle:] += ((k_end * dk_end).sum(1) + dtotal)[:, None]
        return dq.mul_(decay), dk.div_(decay), dg

    return Block((q @ k.mT).tril_(), q_start, k_end, before + after, pullback)


def halved_block(q: Tensor, k: Tensor, g: Tensor) -> Block:
    n, C, K = q.shape
    h = C // 2
    halves = block(*(x.reshape(2 * n, h, K) for x in (q, k, g)))
    (q1, q2), (k1, k2) = (x.view(n, 2, h, K).unbind(1) for x in (halves.q, halves.k))
    before, after = halves.g.view(n, 2, K).unbind(1)
    enter, leave = before.exp()[:, None], after.exp()[:, None]
    q_start, k_end = torch.cat([q1, q2 * enter], 1), torch.cat([k1 * leave, k2], 1)
    A = q.new_zeros(n, C, C)
    A[:, :h, :h], A[:, h:, h:] = halves.A.view(n, 2, h, h).unbind(1)
    A[:, h:, :h] = q2 @ k1.mT

    def pullback(dA, dq_start, dk_end, dtotal):
        dA1, dA2, dA = dA[:, :h, :h], dA[:, h:, h:], dA[:, h:, :h]
        (dq1, dq2), (dk1, dk2) = dq_start.split(h, 1), dk_end.split(h, 1)
        dbefore = (q_start[:, h:] * dq2).sum(1) + dtotal
        dafter = (k_end[:, :h] * dk1).sum(1) + dtotal
        dq2 = (dA @ k1).addcmul_(dq2, enter)
        dk1 = (dA.mT @ q2).addcmul_(dk1, leave)
        pairs = (dA1, dA2), (dq1, dq2), (dk1, dk2), (dbefore, dafter)
        grads = halves.pullback(*(torch.stack(pair, 1).flatten(0, 1) for pair in pairs))
        return tuple(x.view(n, C, K) for x in grads)

    return Block(A, q_start, k_end, before + after, pullback)


# 3. From chunk to chunk ------------------------------------------------------------------------------------


def scan(steps: list[slice], decay: Tensor, update: Tensor, S: Tensor) -> Tensor:
    """S <- decay * S + update through the chunks of each sequence: the only part that is sequential.

    decay: [chunks, H, K, 1]; update: [chunks, H, K, V], overwritten by the S that each chunk meets, and
    returned; S: [N, H, K, V], sorted, overwritten by the last ones.
    """
    for rows in steps:
        met = S[: rows.stop - rows.start]
        left = torch.addcmul(update[rows], decay[rows], met)
        update[rows] = met
        met.copy_(left)
    return update


# 4. The operator -------------------------------------------------------------------------------------------


def prepare(q, k, v, g, scale, initial_state, cu_seqlens):
    """The layout, the chunks and their values in the dtype to compute in, and the sorted initial states."""
    (_, _, H, K), V = q.shape, v.shape[3]
    dtype = wide_dtype(q)
    layout = lay_out(q, cu_seqlens)
    q, k, v, g = (layout.cut(x, dtype) for x in (q, k, v, g))
    chunks = block(q.mul_(scale), k, g.clamp_(min=FORGET_ALL))
    if initial_state is None:
        S = q.new_zeros(len(layout.order), H, K, V)
    else:
        S = initial_state.to(dtype)[layout.order]
    return layout, chunks, v, S


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """o: [B, T, H, V] and the final states [N, H, K, V], if asked for. Arguments as for `chunk_gla`."""
    (_, _, H, K), V = q.shape, v.shape[3]
    layout, chunks, vc, S = prepare(q, k, v, g, scale, initial_state, cu_seqlens)
    decay = chunks.g.exp().view(-1, H, K, 1)
    states = scan(layout.steps, decay, (chunks.k.mT @ vc).view(-1, H, K, V), S)
    o = (chunks.A @ vc).baddbmm_(chunks.q, states.view(-1, K, V))
    return layout.join(o, v), S[layout.rank] if output_final_state else None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dg and, if there was an initial state, its gradient. All but the inputs is computed again."""
    (_, _, H, K), V = q.shape, v.shape[3]
    layout, chunks, vc, S = prepare(q, k, v, g, scale, initial_state, cu_seqlens)
    doc = layout.cut(do, vc.dtype)
    dS = torch.zeros_like(S) if dfinal_state is None else dfinal_state.to(S.dtype)[layout.order]
    decay = chunks.g.exp().view(-1, H, K, 1)
    states = scan(layout.steps, decay, (chunks.k.mT @ vc).view(-1, H, K, V), S)
    dstates = scan(layout.steps[::-1], decay, (chunks.q.mT @ doc).view(-1, H, K, V), dS)

    dtotal = (decay * (states * dstates).sum(-1, keepdim=True)).view(-1, K)
    states, dstates = states.view(-1, K, V), dstates.view(-1, K, V)
    dv = (chunks.A.mT @ doc).baddbmm_(chunks.k, dstates)
    dq, dk, dg = chunks.pullback(doc @ vc.mT, doc @ states.mT, vc @ dstates.mT, dtotal)
    grads = (layout.join(d, x) for d, x in ((dq.mul_(scale), q), (dk, k), (dv, v), (dg, g)))
    return *grads, None if initial_state is None else dS[layout.rank]
