"""Softmax attention as in LLaMA (Touvron et al., arXiv 2302.13971): the "Transformer++" of the comparisons."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.kernels.common import sequence_ids
from glalm.model.packing import repack, unpack
from glalm.model.rotary import rotate

NEVER = torch.iinfo(torch.int64).max  # the position of a padded token: no query comes after it
State = tuple[Tensor, Tensor, Tensor, Tensor]


class Attention(nn.Module):
    """o_t = sum_{s <= t} softmax_s(D^-1/2 q_t . k_s) v_s with rotary q and k; y = o W_o.

    Query heads share their group's key and value head (arXiv 2305.13245). With a window, s > t - window as well.
    Parameter names and shapes are those of transformers' LlamaAttention. The state is keys and values
    [N, S, H_kv, D], in the dtype they were computed in, the positions of these [N, S] and the next one's [N], int64;
    S is the number of tokens so far, or window - 1 where that is less.
    """

    def __init__(self, config):
        super().__init__()
        d, (self.num_heads, kv_heads) = config.hidden_size, config.attention_heads
        self.window, self.theta = config.attention.window, config.attention.rope_theta
        self.head_dim = d // self.num_heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d, kv_heads * self.head_dim, bias=False)
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
        if cu_seqlens is not None and (return_state or state is not None):
            rows, live = unpack(x, cu_seqlens)  # sequences with caches of different lengths
            live = live if padding is None else live * unpack(padding, cu_seqlens)[0]
            y, state = self(rows, state=state, return_state=return_state, padding=live)
            return repack(y, cu_seqlens), state
        B, T, _ = x.shape
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        live = x.new_ones(B, T, dtype=torch.bool) if padding is None else padding[..., 0] > 0
        start = torch.zeros(B, dtype=torch.int64, device=x.device) if state is None else state[3]
        positions = start[:, None] + live.cumsum(1) - 1
        q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
        at = key_at = positions.masked_fill(~live, NEVER)
        if state is not None:
            new = k, v, at
            k, v, key_at = (torch.cat([old.to(x.dtype), x], 1) for old, x in zip(state[:3], new, strict=True))
        if state is None and padding is None and flash(q, self.window, cu_seqlens):
            o = flash_attention(q, k, v, self.window, cu_seqlens)
        else:
            everything = state is None and padding is None and cu_seqlens is None and self.window is None
            mask = None if everything else visible(at, key_at, self.window, cu_seqlens)
            o = attend(q, k, v, mask)
        state = (*self.kept(k, v, key_at, padding), start + live.sum(1)) if return_state else None
        return self.o_proj(o.flatten(-2)), state

    def kept(self, k: Tensor, v: Tensor, key_at: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What of keys, values and positions [B, S, ...] later tokens can see; copies where it is not all, lest a view
        keep the rest."""
        old = 0 if self.window is None else max(0, k.shape[1] - (self.window - 1))
        if self.window is not None and padding is not None:  # which may stand between a state's keys and the new ones
            row = torch.arange(len(k), device=k.device)[:, None]
            last = (key_at != NEVER).int().argsort(stable=True)[:, old:]
            return tuple(y[row, last] for y in (k, v, key_at))
        return tuple(y[:, old:].clone() if old else y for y in (k, v, key_at))

    def flops(self, T: int) -> int:
        """Scores and their values, the masked half counted too, as is usual (arXiv 2204.02311, appendix B)."""
        return 4 * min(T, self.window or T) * self.num_heads * self.head_dim


def visible(at: Tensor, key_at: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """[B, 1, T, S]: which keys a query sees, by position. A padded query sees some, lest its softmax be 0 / 0."""
    mask = key_at[:, None, :] <= at[:, :, None]
    if window is not None:
        mask &= key_at[:, None, :] > at[:, :, None] - window
    if cu_seqlens is not None:
        sequence = sequence_ids(cu_seqlens, at.shape[1])
        mask &= sequence[None, :, None] == sequence
    return mask[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, H, D]; without a mask, each token sees itself and all before it."""
    grouped = k.shape[2] != q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    ).transpose(1, 2)


def flash(q: Tensor, window: int | None, cu_seqlens: Tensor | None) -> bool:
    """Whether variable-length flash attention serves: packed or windowed, where a mask would be [T, T]."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and (window, cu_seqlens) != (None, None)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, _ = q.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(B + 1, device=q.device) * T
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bounds, left = cu_seqlens.int(), -1 if window is None else window - 1
    return varlen_attn(q, k, v, bounds, bounds, T, T, window_size=(left, 0)).unflatten(0, (B, T))
