"""The DiagAttention of TransNormer (Qin et al., arXiv 2210.10340, section 4.2): softmax attention inside of blocks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import describe_divisors, require, require_positive
from glalm.kernels.common import sequence_ids
from glalm.model.layers import apply_rotary, token_positions
from glalm.model.mixers.attention import masked_attention
from glalm.model.mixers.base import Mixer

State = tuple[Tensor, Tensor, Tensor]


@dataclass
class DiagAttentionOptions:
    """The keys model.transnormer_diag.*."""

    block: int = 64  # tokens that see each other; the next block starts afresh

    def __post_init__(self):
        require_positive(self, "model.transnormer_diag", "block", finite=True)


class DiagAttention(Mixer):
    """Causal softmax attention within blocks of b tokens:

        o_t = sum_s softmax_s(D^-1/2 q_t . k_s) v_s over b floor(t / b) <= s <= t with rotary q and k,   y = o W_o

    Every sequence is cut into such blocks, which do not see each other. TransNormer has such layers below its layers of
    linear attention, which see everything (the mixer `transnormer`).

    The state holds the keys and values of the current block [N, b, H, D], zeros where no token is yet, and the next
    token's position [N], int64.
    """

    options_name = "transnormer_diag"
    Options = DiagAttentionOptions
    softmax_query_layer = "q_proj"

    @classmethod
    def check_config(cls, config) -> None:
        d = config.hidden_size
        require(
            d % (2 * config.num_heads) == 0,
            f"model.num_heads={config.num_heads} does not cut model.hidden_size={d} into heads of an even number of "
            f"channels, which rotary positions need; {describe_divisors(d // 2)}",
        )

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.head_dim = d // self.num_heads
        self.block = config.transnormer_diag.block
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        past_k, past_v, start = (None, None, None) if state is None else state
        positions, end = token_positions(x, start, cu_seqlens, padding)
        q = apply_rotary(q, positions)
        k = apply_rotary(k, positions)
        if cu_seqlens is None and padding is None:
            if state is None and not return_state:
                return self.o_proj(self.attend_from_start(q, k, v).flatten(-2)), None
            if state is not None and x.shape[1] == 1:
                o, state = self.attend_to_state(q, k, v, state)
                return self.o_proj(o.flatten(-2)), state if return_state else None

        layout = BlockLayout.build(positions, start, end, cu_seqlens, padding, self.block)
        k = layout.scatter(k, past_k)
        v = layout.scatter(v, past_v)
        o = layout.gather(masked_attention(layout.scatter(q), k, v, None)).view_as(q)
        new_state = (layout.last_blocks(k), layout.last_blocks(v), end) if return_state else None
        return self.o_proj(o.flatten(-2)), new_state

    def attend_from_start(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the outputs [B, T, H, D] of sequences that begin here, whose blocks are cut out of T."""
        B, T = q.shape[:2]
        block = max(1, min(T, self.block))
        blocks = -(-T // block)
        q, k, v = (F.pad(y, (0, 0, 0, 0, 0, -T % block)).unflatten(1, (blocks, block)).flatten(0, 1) for y in (q, k, v))
        return masked_attention(q, k, v, None).unflatten(0, (B, blocks)).flatten(1, 2)[:, :T]

    def attend_to_state(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the output [B, 1, H, D] of one token more for every sequence, and the new state."""
        past_k, past_v, start = state
        offsets = torch.arange(self.block, device=q.device)
        new_offset = (start % self.block)[:, None]
        is_new = (offsets == new_offset)[..., None, None]
        k = torch.where(is_new, k, past_k.to(k.dtype))
        v = torch.where(is_new, v, past_v.to(v.dtype))
        o = masked_attention(q, k, v, (offsets <= new_offset)[:, None, None])
        is_full = (new_offset == self.block - 1)[..., None, None]
        return o, (k.masked_fill(is_full, 0), v.masked_fill(is_full, 0), start + 1)

    def flops(self, T: int) -> int:
        """Count the scores and their values including the masked half, as is usual for attention."""
        return 4 * min(T, self.block) * self.o_proj.in_features


@dataclass
class BlockLayout:
    """Where tokens lie if each sequence has blocks of its own, the first of which continues that of its state.

    No length is copied to the host: there are as many blocks as the sequences could need, and the surplus stays empty.
    """

    token_rows: Tensor  # [B * T], the row of each token; padding is sent to one extra row, which is dropped
    first_rows: Tensor  # [N], the row at which the first block of each sequence begins
    last_rows: Tensor  # [N], the same of the last block, in which the next token will lie
    blocks: int
    block: int

    @classmethod
    def build(
        cls,
        positions: Tensor,
        start: Tensor | None,
        end: Tensor,
        cu_seqlens: Tensor | None,
        padding: Tensor | None,
        block: int,
    ) -> "BlockLayout":
        """Lay out tokens at positions [B or 1, T] of N sequences that continue from `start` to `end` [N]."""
        N = len(end)
        B = N if cu_seqlens is None else 1
        T = positions.shape[1]
        start = torch.zeros_like(end) if start is None else start
        first_block = start // block
        counts = end // block + 1 - first_block
        first_rows = (counts.cumsum(0) - counts) * block
        sequence = torch.arange(B, device=end.device)[:, None] if cu_seqlens is None else sequence_ids(cu_seqlens, T)
        token_rows = positions + (first_rows - first_block * block)[sequence]
        blocks = B * T // block + 2 * N
        if padding is not None:
            token_rows = token_rows.masked_fill(padding[..., 0] == 0, blocks * block)
        return cls(token_rows.flatten(), first_rows, first_rows + (counts - 1) * block, blocks, block)

    def rows_of_blocks(self, first_rows: Tensor) -> Tensor:
        """Return the rows of whole blocks, [N * block]."""
        return (first_rows[:, None] + torch.arange(self.block, device=first_rows.device)).flatten()

    def scatter(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """Return x [B, T, H, D] as blocks [blocks, block, H, D].

        The tokens follow `past` [N, block, H, D], the blocks that are already begun.
        """
        rows = x.new_zeros(self.blocks * self.block + 1, *x.shape[2:])
        if past is not None:
            rows = rows.index_copy(0, self.rows_of_blocks(self.first_rows), past.to(x.dtype).flatten(0, 1))
        rows = rows.index_copy(0, self.token_rows, x.flatten(0, 1))
        return rows[:-1].unflatten(0, (self.blocks, self.block))

    def gather(self, o: Tensor) -> Tensor:
        """Return the outputs [blocks, block, H, D] of the tokens, [B * T, H, D], 0 at padding."""
        return F.pad(o.flatten(0, 1), (0, 0, 0, 0, 0, 1)).index_select(0, self.token_rows)

    def last_blocks(self, x: Tensor) -> Tensor:
        """Return the block of every sequence in which its next token will lie, [N, block, H, D]."""
        rows = x.flatten(0, 1).index_select(0, self.rows_of_blocks(self.last_rows))
        return rows.unflatten(0, (-1, self.block))
