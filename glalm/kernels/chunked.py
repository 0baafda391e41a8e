"""Chunkwise gated linear attention in PyTorch: the path of CPU tensors, and the algorithm to read before the kernels.

GLA (arXiv 2312.06635) carries a state S of K x V numbers through time, and a gate makes it forget channel by channel:

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = q_t S_t

Token by token, these are T small steps. In chunks of C tokens, they are a few large matmuls. Let G(a, b] be the sum of
g over the tokens a < l <= b of a chunk, and let S be the state that enters the chunk. Then

    o_i = sum_{j <= i} A_ij v_j + (q_i * exp G(start, i]) S      A_ij = sum_k q_ik k_jk exp G(j, i]_k
    S  <- diag(exp G(start, end]) S + sum_j (k_j * exp G(j, end])^T v_j

Every exponent here is <= 0. The difficulty is A. As the product of q * exp G(start, i] and k * exp -G(start, j], it is
one matmul, but the second factor overflows as soon as a chunk forgets much. The paper cuts the chunk into sub-chunks,
and computes one exponent per pair of tokens inside them. Here, a block of tokens whose exponents are small takes one
such matmul, with exponents measured from the middle of the block instead of its start (compute_direct_block). Any
other block is cut into halves, down to single tokens if necessary. Its halves meet in the matmul of q * exp G(start, i]
of the second half and k * exp G(j, end] of the first, which both halves need anyway (compute_halved_block).

G is computed as the difference of two sums only where the exponents are small. After a gate of -1e5, such a
difference would have no low bits left, which would spoil the tokens that follow.

Gradients: where an exponent e scales q as q * exp(e), de = q * dq. Where it scales k as k * exp(-e), de = -k * dk (the
paper's closed form for the gate). Where e is a sum of g, the transposed sum takes de to dg. All of this stays within a
chunk: what came before meets what comes after only in sum_v S * dS.

In this file, the chunks of all heads are one batch, [n, C, K or V]. Where a group of query heads shares a head of k, v
and g, the chunks of these three are repeated for each of them. The states are not, and the Triton kernels repeat
nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.common import CHUNK, empty_output, heads_per_group, sequence_masks, wide_dtype
from glalm.kernels.context_parallel import ContextShard, reverse_exchange

# The largest exponent that scales q or k. In float32, a sum of gates near 20 is off by a few 1e-6, and so are the
# results. Larger exponents would lose more digits long before anything overflows.
MAX_EXPONENT = 20.0
# The exponential of this gate is 0 in every dtype. Unlike -inf, it can be multiplied by the zeros of a matmul.
MIN_LOG_GATE = -800.0
# Chunks of the gate on the value axis are short, because they hold [C, C, V] numbers.
VALUE_GATE_CHUNK = 16


# 1. Tokens to chunks and back ------------------------------------------------------------------------------


class ChunkLayout(NamedTuple):
    """The position of each token once the sequences are cut into chunks.

    Chunks are sorted by their index within their sequence, and then by sequence, the longest first. So the chunks with
    index c of all sequences that have one are adjacent rows, steps[c], and belong to the first sequences of `order`.
    """

    chunk: int  # tokens
    steps: list[slice]
    order: Tensor  # [N], the sequences by length
    rank: Tensor  # [N], the inverse of `order`
    position: Tensor  # [tokens * H], the row of each token and head in the chunks
    source: Tensor  # [chunks * H * chunk], the inverse of `position`; tokens * H in the padding

    def to_chunks(self, x: Tensor, dtype: torch.dtype, group: int = 1) -> Tensor:
        """Cut [B, T, H / group, D], each head repeated `group` times, into [n, chunk, D], with zeros in the padding."""
        x = F.pad(x.reshape(-1, x.shape[-1]).to(dtype), (0, 0, 0, 1))
        source = self.source if group == 1 else self.source // group
        return x.index_select(0, source).view(-1, self.chunk, x.shape[-1])

    def to_tokens(self, x: Tensor, *shape: int, group: int = 1) -> Tensor:
        """Undo to_chunks: return [B, T, H, D], or the sum over each group's heads, in `shape`, [B, T, H / group, D]."""
        x = x.reshape(-1, x.shape[-1]).index_select(0, self.position)
        return (x if group == 1 else x.unflatten(0, (-1, group)).sum(1)).view(shape)


def lay_out_chunks(q: Tensor, cu_seqlens: Tensor | None) -> ChunkLayout:
    """Cut the sequences of q [B, T, H, K], or the packed ones of its single row, into chunks."""
    B, T, H, _ = q.shape
    lengths = torch.full((B,), T) if cu_seqlens is None else cu_seqlens.cpu().long().diff()
    N = len(lengths)
    tokens = B * T
    longest = max(lengths.tolist(), default=0)
    chunk = min(CHUNK, 1 << max(longest - 1, 0).bit_length())  # a power of two, which can be halved

    counts = (lengths + chunk - 1) // chunk
    order = counts.argsort(descending=True, stable=True)
    rank = order.argsort()
    sequences_per_step = N - counts.bincount().cumsum(0)[:-1]
    first = F.pad(sequences_per_step.cumsum(0), (1, 0))
    steps = [slice(a, b) for a, b in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)]

    sequence = torch.arange(N).repeat_interleave(lengths)
    t = torch.arange(tokens) - (lengths.cumsum(0) - lengths)[sequence]
    row = first[t // chunk] + rank[sequence]
    position = ((row[:, None] * H + torch.arange(H)) * chunk + (t % chunk)[:, None]).view(-1)
    source = torch.full((int(first[-1]) * H * chunk,), tokens * H)
    source[position] = torch.arange(tokens * H)
    return ChunkLayout(chunk, steps, *(x.to(q.device) for x in (order, rank, position, source)))


# 2. Within a chunk -----------------------------------------------------------------------------------------


class Block(NamedTuple):
    """What the rest of the computation needs of n blocks of C tokens, and the backward pass through the blocks."""

    A: Tensor  # [n, C, C], A_ij as above for i >= j, else 0
    q: Tensor  # [n, C, K], q_i * exp G(start, i]
    k: Tensor  # [n, C, K], k_j * exp G(j, end]
    g: Tensor  # [n, K], G(start, end]
    # Maps the gradients of these four to those of the block's q, k and g. It may overwrite the gradient of A.
    pullback: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def compute_block(q: Tensor, k: Tensor, g: Tensor) -> Block:
    """Compute n blocks from q, k, g [n, C, K]: directly where their exponents are small, else by halves."""
    sums = sums_from_middle(g)
    exponents = sums @ g
    large = exponents.abs().amax((1, 2)) >= MAX_EXPONENT
    if not large.any():
        return compute_direct_block(q, k, g, exponents, sums)
    if large.all():
        return compute_halved_block(q, k, g)

    groups = [large.nonzero().view(-1), (~large).nonzero().view(-1)]
    parts = [compute_block(q[i], k[i], g[i]) for i in groups]
    restore_order = torch.cat(groups).argsort()

    def pullback(*grads):
        part_grads = [part.pullback(*(d[i] for d in grads)) for part, i in zip(parts, groups, strict=True)]
        return tuple(torch.cat(d)[restore_order] for d in zip(*part_grads, strict=True))

    results = zip(*(part[:4] for part in parts), strict=True)
    A, q_start, k_end, total = (torch.cat(x)[restore_order] for x in results)
    return Block(A, q_start, k_end, total, pullback)


def sums_from_middle(g: Tensor) -> Tensor:
    """Return the matrices [n, C, C] whose row i sums g [n, C, K] from the middle of its block to token i.

    The sum is negated where token i comes before the middle. With e = sums_from_middle(g) @ g, G(j, i] = e_i - e_j for
    all j < i.
    """
    n, C, _ = g.shape
    middle = max(C // 2, 1)
    same_half = g.new_ones(C, C)
    same_half[middle:, :middle] = 0
    same_half[:middle, middle:] = 0
    sums = same_half.tril()
    sums[:middle] -= same_half[:middle]
    return sums.expand(n, C, C)


def compute_direct_block(q: Tensor, k: Tensor, g: Tensor, exponents: Tensor, sums: Tensor) -> Block:
    """Compute all pairs of tokens in one matmul of q * exp(e) and k * exp(-e), for e = `exponents` = `sums` @ g.

    Only pairs with i < j, which are discarded, can overflow. `exponents` is overwritten.
    """
    middle = max(g.shape[1] // 2, 1)
    first_half = g[:, :middle].sum(1)
    second_half = g[:, middle:].sum(1)
    enter = first_half.exp()[:, None]
    leave = second_half.exp()[:, None]
    decay = exponents.exp_()
    q = q * decay
    k = k / decay
    q_start = q * enter
    k_end = k * leave

    def pullback(dA, dq_start, dk_end, dtotal):
        dA = dA.tril_()
        dq = (dA @ k).addcmul_(dq_start, enter)
        dk = (dA.mT @ q).addcmul_(dk_end, leave)
        dg = sums.mT @ (q * dq).addcmul_(k, dk, value=-1)
        dg[:, :middle] += ((q_start * dq_start).sum(1) + dtotal)[:, None]
        dg[:, middle:] += ((k_end * dk_end).sum(1) + dtotal)[:, None]
        return dq.mul_(decay), dk.div_(decay), dg

    return Block((q @ k.mT).tril_(), q_start, k_end, first_half + second_half, pullback)


def compute_halved_block(q: Tensor, k: Tensor, g: Tensor) -> Block:
    """Compute the two halves of each block by compute_block, and the pairs of tokens across them in one matmul."""
    n, C, K = q.shape
    h = C // 2
    halves = compute_block(*(x.reshape(2 * n, h, K) for x in (q, k, g)))
    q1, q2 = halves.q.view(n, 2, h, K).unbind(1)
    k1, k2 = halves.k.view(n, 2, h, K).unbind(1)
    first_half, second_half = halves.g.view(n, 2, K).unbind(1)
    enter = first_half.exp()[:, None]
    leave = second_half.exp()[:, None]
    q_start = torch.cat([q1, q2 * enter], 1)
    k_end = torch.cat([k1 * leave, k2], 1)
    A = q.new_zeros(n, C, C)
    A[:, :h, :h], A[:, h:, h:] = halves.A.view(n, 2, h, h).unbind(1)
    A[:, h:, :h] = q2 @ k1.mT

    def pullback(dA, dq_start, dk_end, dtotal):
        dA1 = dA[:, :h, :h]
        dA2 = dA[:, h:, h:]
        dA = dA[:, h:, :h]
        dq1, dq2 = dq_start.split(h, 1)
        dk1, dk2 = dk_end.split(h, 1)
        dfirst = (q_start[:, h:] * dq2).sum(1) + dtotal
        dsecond = (k_end[:, :h] * dk1).sum(1) + dtotal
        dq2 = (dA @ k1).addcmul_(dq2, enter)
        dk1 = (dA.mT @ q2).addcmul_(dk1, leave)
        pairs = (dA1, dA2), (dq1, dq2), (dk1, dk2), (dfirst, dsecond)
        grads = halves.pullback(*(torch.stack(pair, 1).flatten(0, 1) for pair in pairs))
        return tuple(x.view(n, C, K) for x in grads)

    return Block(A, q_start, k_end, first_half + second_half, pullback)


# 3. From chunk to chunk ------------------------------------------------------------------------------------


def scan_chunks(steps: list[slice], decay: Tensor, update: Tensor, S: Tensor) -> Tensor:
    """Carry S <- decay * S + update through the chunks of each sequence, the only part that is sequential.

    Args:
        steps: the rows of the chunks that are computed side by side, in order of time.
        decay: [chunks, H, K, 1].
        update: [chunks, H, K, V], overwritten by the states that enter each chunk.
        S: [N, H, K, V] in the order of the layout, overwritten by the states after the last chunk.

    Returns `update`.
    """
    for rows in steps:
        entering = S[: rows.stop - rows.start]
        leaving = torch.addcmul(update[rows], decay[rows], entering)
        update[rows] = entering
        entering.copy_(leaving)
    return update


# 4. The operator -------------------------------------------------------------------------------------------


class ChunkedGLA:
    """One call of `chunk_gla`, whose arguments these are. The backward pass recomputes all but the arguments.

    With a context, S is the state before the first process's tokens, and `entering` [N, H, K, V] the states that enter
    this process's sequences, which a backward pass hands in as its S. It needs no exchange then.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        scale: float,
        S: Tensor | None,
        cu_seqlens: Tensor | None,
        context: ContextShard | None = None,
    ):
        H, K = k.shape[2:]
        V = v.shape[3]
        dtype = wide_dtype(q)
        self.args = (q, k, v, g)
        self.scale = scale
        self.group = group = heads_per_group(q, k)
        self.layout = lay_out_chunks(q, cu_seqlens)
        q = self.layout.to_chunks(q, dtype)
        k, self.v, g = (self.layout.to_chunks(x, dtype, group) for x in (k, v, g))
        self.blocks = compute_block(q.mul_(scale), k, g.clamp_(min=MIN_LOG_GATE))
        # Every head of a group has the same k, v and g: the first one's make the state.
        self.decay = self.blocks.g[::group].exp().view(-1, H, K, 1)
        update = (self.blocks.k[::group].mT @ self.v[::group]).view(-1, H, K, V)
        self.entering = S
        self.final: Tensor | None = None
        if context is not None:
            self.entering, self.final = context.exchange(*self.summarize(update, self.layout.steps), S)
            S = self.entering
        self.S = q.new_zeros(len(self.layout.order), H, K, V) if S is None else S.to(dtype)[self.layout.order]
        self.states = scan_chunks(self.layout.steps, self.decay, update, self.S)

    def outputs(self) -> Tensor:
        """Return o, [B, T, Hq, V]."""
        o = (self.blocks.A @ self.v).baddbmm_(self.blocks.q, self.repeat_states(self.states))
        q, _, v, _ = self.args
        return self.layout.to_tokens(o, *q.shape[:3], v.shape[3]).to(v.dtype)

    def final_state(self) -> Tensor:
        """Return the states after the last tokens, [N, H, K, V]; with a context, of the last process."""
        return self.S[self.layout.rank] if self.final is None else self.final

    def repeat_states(self, states: Tensor) -> Tensor:
        """Return states [chunks, H, K, V] for each head of queries, [n, K, V]."""
        return states[:, :, None].expand(-1, -1, self.group, -1, -1).flatten(0, 2)

    def summarize(self, update: Tensor, steps: list[slice]) -> tuple[Tensor, Tensor]:
        """Return what the sequences do to the states that enter them, and leave `update` as it is.

        These are the states [N, H, K, V] to which scan_chunks brings zeros, and the factors [N, H, K, 1] by which the
        sequences multiply what enters.
        """
        N = len(self.layout.order)
        local = update.new_zeros(N, *update.shape[1:])
        scan_chunks(steps, self.decay, update.clone(), local)
        decay = self.decay.new_ones(N, *self.decay.shape[1:])
        scan_chunks(self.layout.steps, self.decay, torch.zeros_like(self.decay), decay)
        return local[self.layout.rank], decay[self.layout.rank]

    def gradients(
        self, do: Tensor, dfinal_state: Tensor | None, context: ContextShard | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dq, dk, dv, dg and the gradient of the initial states; dg is not rounded to the dtype of g.

        With a context, the initial and final states are those of the whole group of processes.
        """
        layout = self.layout
        blocks = self.blocks
        do = layout.to_chunks(do, self.v.dtype)
        update = blocks.q.mT @ do
        if self.group > 1:
            update = update.unflatten(0, (-1, self.group)).sum(1)
        update = update.view(self.states.shape)
        if context is not None:
            dentering, decay = self.summarize(update, layout.steps[::-1])
            dfinal_state, dinitial = reverse_exchange(context, dentering, decay, dfinal_state)
        dS = torch.zeros_like(self.S) if dfinal_state is None else dfinal_state.to(self.S.dtype)[layout.order]
        dstates = scan_chunks(layout.steps[::-1], self.decay, update, dS)

        if self.group > 1:  # to_tokens sums the gradients of the repeated k, v and g: each gets an equal share here.
            dstates = dstates / self.group
        dtotal = self.repeat_states(self.decay * (self.states * dstates).sum(-1, keepdim=True)).squeeze(-1)
        states = self.repeat_states(self.states)
        dstates = self.repeat_states(dstates)
        dv = (blocks.A.mT @ do).baddbmm_(blocks.k, dstates)
        dq, dk, dg = blocks.pullback(do @ self.v.mT, do @ states.mT, self.v @ dstates.mT, dtotal)
        q, k, v, g = self.args
        dq = layout.to_tokens(dq.mul_(self.scale), *q.shape).to(q.dtype)
        dk, dv, dg = (layout.to_tokens(dx, *x.shape, group=self.group) for dx, x in ((dk, k), (dv, v), (dg, g)))
        return dq, dk.to(k.dtype), dv.to(v.dtype), dg, dS[layout.rank] if context is None else dinitial


# 5. A gate on the value axis -------------------------------------------------------------------------------


def value_gated_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return o [B, T, H, V] and the final state [B, H, K, V] of S_t = S_{t-1} diag(exp g_t) + k_t^T v_t, o_t = q_t S_t.

    Written out, o_t = sum_{s <= t} (q_t . k_s) exp(g_{s+1} + ... + g_t) * v_s. The scores do not depend on the gate, so
    those of a chunk are one matmul, but the decays of its pairs of tokens are [C, C, V]. Gradients come from autograd.

    Args:
        q, k: [B, T, H, K].
        v, g: [B, T, H, V].
        S: [B, H, K, V], or None for zeros.
        sequence: [T], sequence_ids of packed sequences, or None.
    """
    C = VALUE_GATE_CHUNK
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[3]) if S is None else S
    n = (T + C - 1) // C
    q, k, v, g = (F.pad(x, (0, 0, 0, 0, 0, n * C - T)).unflatten(1, (n, C)) for x in (q, k, v, g))
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    # Gates are summed between every two tokens. A difference of two sums would lose its low bits after a strong gate,
    # and would be NaN after one of -inf.
    between = g[:, :, :, None].masked_fill(~causal.tril(-1)[:, :, None, None], 0).cumsum(2)
    decay = between.masked_fill(~causal[:, :, None, None], -torch.inf).exp()
    entering = g.cumsum(2).exp()
    leaving = between[:, :, -1].exp()
    if sequence is not None:
        same, enters, leaves = (mask[..., None] for mask in sequence_masks(sequence, C))
        decay = decay * same[..., None]
        entering = entering * enters
        leaving = leaving * leaves
    scores = torch.einsum("bnihk,bnjhk->bnijh", q, k)
    within = (scores[..., None] * decay * v[:, :, None]).sum(3)
    values = v * leaving
    through = entering[:, :, -1]
    outputs = []
    # The backward pass of unbind writes one gradient. That of indexing would allocate a full one for every chunk.
    for chunk in zip(*(x.unbind(1) for x in (q, k, values, entering, through, within)), strict=True):
        q_n, k_n, values_n, entering_n, through_n, within_n = chunk
        outputs.append(within_n + torch.einsum("bihk,bhkv->bihv", q_n, S) * entering_n)
        S = S * through_n[:, :, None] + torch.einsum("bihk,bihv->bhkv", k_n, values_n)
    return torch.cat(outputs, 1)[:, :T] if outputs else empty_output(v.flatten(1, 2), q, k, g), S
