"""Softmax attention as in LLaMA (Touvron et al., arXiv 2302.13971): the "Transformer++" of the comparisons."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import describe_divisors, require, require_positive
from glalm.kernels.common import sequence_ids
from glalm.model.layers import apply_rotary
from glalm.model.mixers.base import Mixer

NEVER = torch.iinfo(torch.int64).max  # the position of a padded token: no query comes after it
State = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class AttentionOptions:
    """The keys model.attention.*: softmax attention as in LLaMA."""

    num_heads: int | None = None  # null: heads of 64 channels if these divide the width, else model.num_heads
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query attention; null: num_heads
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; null: all tokens before it
    rope_theta: float = 10000.0

    def __post_init__(self):
        require_positive(self, "model.attention", "num_heads", "num_kv_heads", "rope_theta", finite=True)
        require(
            self.window is None or self.window > 0,
            f"model.attention.window must be positive or null, not {self.window}",
        )


def attention_heads(config) -> tuple[int, int]:
    """Return the number of query heads and of key-value heads in a model with this ModelConfig."""
    heads_of_64 = config.hidden_size // 64 if config.hidden_size % 64 == 0 else config.num_heads
    heads = config.attention.num_heads or heads_of_64
    return heads, config.attention.num_kv_heads or heads


class Attention(Mixer):
    """o_t = sum_{s <= t} softmax_s(D^-1/2 q_t . k_s) v_s with rotary q and k; y = o W_o.

    Query heads share their group's key and value head (arXiv 2305.13245). With a window, s > t - window as well.
    Parameter names and shapes are those of transformers' LlamaAttention. The state is keys and values
    [N, S, H_kv, D], in the dtype they were computed in, the positions of these [N, S] and the next one's [N], int64;
    S is the number of tokens so far, or window - 1 where that is less.
    """

    options_name = "attention"
    Options = AttentionOptions

    @classmethod
    def check_config(cls, config) -> None:
        heads, kv_heads = attention_heads(config)
        require(
            config.hidden_size % (2 * heads) == 0,
            f"model.attention.num_heads={heads} does not cut model.hidden_size={config.hidden_size} into heads of an "
            f"even number of channels; {describe_divisors(config.hidden_size // 2)}",
        )
        require(
            heads % kv_heads == 0,
            f"model.attention.num_kv_heads={kv_heads} does not divide the {heads} query heads; "
            f"{describe_divisors(heads)}",
        )

    def __init__(self, config):
        super().__init__()
        d, (self.num_heads, kv_heads) = config.hidden_size, attention_heads(config)
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
            rows, live = unpack_sequences(x, cu_seqlens)  # sequences with caches of different lengths
            live = live if padding is None else live * unpack_sequences(padding, cu_seqlens)[0]
            y, state = self(rows, state=state, return_state=return_state, padding=live)
            return pack_sequences(y, cu_seqlens), state
        B, T, _ = x.shape
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        live = x.new_ones(B, T, dtype=torch.bool) if padding is None else padding[..., 0] > 0
        start = torch.zeros(B, dtype=torch.int64, device=x.device) if state is None else state[3]
        positions = start[:, None] + live.cumsum(1) - 1
        q, k = apply_rotary(q, positions, self.theta), apply_rotary(k, positions, self.theta)
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


def unpack_sequences(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Turn packed sequences into a batch that is padded on the left.

    This copies cu_seqlens to the host.

    Args:
        x: [1, T, ...].
        cu_seqlens: [N + 1].

    Returns:
        [N, longest, ...] with zeros at padding, and its mask [N, longest, 1].
    """
    lengths = cu_seqlens.diff().tolist()
    longest = max(lengths)

    def pad_left(y: Tensor) -> Tensor:
        return F.pad(y, (0, 0) * (y.dim() - 1) + (longest - len(y), 0))

    rows = [pad_left(y) for y in x[0].split(lengths)]
    mask = [pad_left(x.new_ones(n, 1)) for n in lengths]
    return torch.stack(rows), torch.stack(mask)


def pack_sequences(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Invert unpack_sequences: [N, longest, ...] to [1, T, ...]."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([row[len(row) - n :] for row, n in zip(x, lengths, strict=True)])[None]
