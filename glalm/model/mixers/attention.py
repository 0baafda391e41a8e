"""Softmax attention as in LLaMA (Touvron et al., arXiv 2302.13971): the "Transformer++" of the comparisons."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from glalm.config.strict import describe_divisors, require, require_positive
from glalm.kernels.common import active_transform, sequence_ids
from glalm.kernels.context_parallel import ContextShard, gather_tokens
from glalm.model.layers import apply_rotary, token_positions
from glalm.model.mixers.base import Mixer, mix_unpacked

# The position of padded tokens: later than any query, so that no query sees them.
PADDED = torch.iinfo(torch.int64).max
State = tuple[Tensor, Tensor, Tensor, Tensor]
# Masks come with texts of any length: cached keys, padding. cuDNN, which torch prefers on Hopper, would plan each new
# length anew, in some 80 ms.
BACKENDS_FOR_MASKS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class AttentionOptions:
    """The keys model.attention.*: softmax attention as in LLaMA."""

    num_heads: int | None = None  # null: heads of 64 channels if these divide the width, else model.num_heads
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query attention; null: num_heads
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; null: all tokens before it
    rope_theta: float = 10000.0  # base of the rotary embedding's wavelengths

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

    The query heads of a group share a key and value head (arXiv 2305.13245). With a window, the sum has s > t - window
    as well. Parameter names and shapes are those of transformers' LlamaAttention.

    The state holds keys and values [N, S, H_kv, D] in the dtype they were computed in, their positions [N, S], and the
    next token's position [N], int64. S is the number of tokens so far, but at most window - 1.
    """

    options_name = "attention"
    Options = AttentionOptions
    state_grows = True
    supports_context = True
    softmax_query_layer = "q_proj"

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
        d = config.hidden_size
        self.num_heads, kv_heads = attention_heads(config)
        self.window = config.attention.window
        self.theta = config.attention.rope_theta
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
        context: ContextShard | None = None,
    ) -> tuple[Tensor, State | None]:
        if context is not None:
            return self.attend_over_processes(x, state, return_state, cu_seqlens, context)
        if cu_seqlens is not None and (return_state or state is not None):
            return mix_unpacked(self, x, cu_seqlens, state=state, return_state=return_state, padding=padding)
        B, T, _ = x.shape
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        is_token = x.new_ones(B, T, dtype=torch.bool) if padding is None else padding[..., 0] > 0
        start = torch.zeros(B, dtype=torch.int64, device=x.device) if state is None else state[3]
        positions = start[:, None] + is_token.cumsum(1) - 1
        # Sequences that begin here without padding have the same angles, computed once.
        rotary_positions = positions[:1] if state is None and padding is None else positions
        q = apply_rotary(q, rotary_positions, self.theta)
        k = apply_rotary(k, rotary_positions, self.theta)
        positions = key_positions = positions.masked_fill(~is_token, PADDED)
        if state is not None:
            past_k, past_v, past_positions = state[:3]
            k = torch.cat([past_k.to(k.dtype), k], 1)
            v = torch.cat([past_v.to(v.dtype), v], 1)
            key_positions = torch.cat([past_positions, positions], 1)
        starts_fresh = state is None and padding is None
        o = self.attend(q, k, v, positions, key_positions, cu_seqlens, starts_fresh)
        if return_state:
            state = *self.trim_cache(k, v, key_positions, padding), start + is_token.sum(1)
        return self.o_proj(o.flatten(-2)), state if return_state else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        key_positions: Tensor,
        cu_seqlens: Tensor | None,
        starts_fresh: bool,
    ) -> Tensor:
        """Return the outputs [B, T, H, D], computed without a mask where possible.

        `starts_fresh` says that the sequences begin with these tokens and have no padding.
        """
        if starts_fresh and cu_seqlens is None and self.window is None:
            return masked_attention(q, k, v, None)
        if starts_fresh and can_use_flash_attention(q):
            return flash_attention(q, k, v, self.window, cu_seqlens)
        return masked_attention(q, k, v, visibility_mask(positions, key_positions, self.window, cu_seqlens))

    def attend_over_processes(
        self, x: Tensor, state: State | None, return_state: bool, cu_seqlens: Tensor | None, context: ContextShard
    ) -> tuple[Tensor, State | None]:
        """Gather the keys and values of all processes, and attend from the queries of this one.

        Where autograd records and no state is involved, the backward pass gathers them again and repeats the attention,
        so that only one layer's are in memory at a time.
        """
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        positions, end = token_positions(x, None if state is None else state[3], cu_seqlens, context=context)
        q = apply_rotary(q, positions, self.theta)
        k = apply_rotary(k, positions, self.theta)
        q, k, v, positions = (context.unpack_rows(y) for y in (q, k, v, positions))
        if state is None and not return_state:
            attend = self.attend_packed if cu_seqlens is not None else self.attend_from_start
            o = checkpoint(attend, q, k, v, positions, context, use_reentrant=False, preserve_rng_state=False)
            return self.o_proj(o.reshape(*x.shape[:2], -1)), None
        k, v = (gather_tokens(y, context) for y in (k, v))
        key_positions = end[:, None] - torch.arange(k.shape[1], 0, -1, device=x.device)
        if state is not None:
            k = torch.cat([state[0].to(k.dtype), k], 1)
            v = torch.cat([state[1].to(v.dtype), v], 1)
            key_positions = torch.cat([state[2], key_positions], 1)
        o = masked_attention(q, k, v, visibility_mask(positions, key_positions, self.window, None))
        new_state = (*self.trim_cache(k, v, key_positions, None), end) if return_state else None
        return self.o_proj(o.flatten(-2)), new_state

    def attend_from_start(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, context: ContextShard) -> Tensor:
        """Return the outputs [B, T, H, D] of a shard."""
        end = (context.rank + 1) * q.shape[1]
        k, v = (gather_tokens(y, context)[:, :end] for y in (k, v))
        if can_use_flash_attention(q):
            return flash_attention(q, k, v, self.window, None)
        key_positions = torch.arange(end, device=q.device)[None]
        return masked_attention(q, k, v, visibility_mask(positions, key_positions, self.window, None))

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, context: ContextShard) -> Tensor:
        """Return the outputs [B, T, H, D] of rows of packed sequences, in which the tokens have these positions."""
        T = q.shape[1]
        end = (context.rank + 1) * T
        k, v = (gather_tokens(y, context)[:, :end] for y in (k, v))
        # A query sees itself and as many tokens before it as its sequence has.
        tokens = torch.arange(end, device=q.device)
        query = tokens[end - T :, None]
        reach = positions if self.window is None else positions.clamp(max=self.window - 1)
        mask = (tokens <= query) & (tokens >= query - reach[..., None])
        return masked_attention(q, k, v, mask[:, None])

    def gathered_channels(self) -> int:
        return self.k_proj.out_features + self.v_proj.out_features

    def trim_cache(
        self, k: Tensor, v: Tensor, key_positions: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the keys, values and positions [B, S, ...] to cache; with a window, the newest window - 1 per row."""
        if self.window is None:
            return k, v, key_positions
        surplus = max(0, k.shape[1] - (self.window - 1))
        if padding is not None:
            # Padding may lie between the cached keys and the new ones. A stable sort moves it to the front of each row.
            row = torch.arange(len(k), device=k.device)[:, None]
            is_token = key_positions != PADDED
            newest = is_token.int().argsort(stable=True)[:, surplus:]
            return k[row, newest], v[row, newest], key_positions[row, newest]
        if surplus == 0:
            return k, v, key_positions
        # A copy, because a view would keep the surplus in memory.
        return k[:, surplus:].clone(), v[:, surplus:].clone(), key_positions[:, surplus:].clone()

    def flops(self, T: int) -> int:
        """Count the scores and their values including the masked half, as is usual (arXiv 2204.02311, appendix B)."""
        return 4 * min(T, self.window or T) * self.num_heads * self.head_dim


def visibility_mask(positions: Tensor, key_positions: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return which keys each query sees, [B, 1, T, S].

    A padded query sees some keys, because a softmax over none would be 0 / 0.
    """
    mask = key_positions[:, None, :] <= positions[:, :, None]
    if window is not None:
        mask = mask & (key_positions[:, None, :] > positions[:, :, None] - window)
    if cu_seqlens is not None:
        sequence = sequence_ids(cu_seqlens, positions.shape[1])
        mask = mask & (sequence[None, :, None] == sequence)
    return mask[:, None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax attention [B, T, H, D], causal without a mask [B, 1, T, S]."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is None:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
    else:
        if groups > 1:  # Efficient attention wants as many heads of keys as of queries.
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        with sdpa_kernel(BACKENDS_FOR_MASKS):
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o.transpose(1, 2)


def can_use_flash_attention(q: Tensor) -> bool:
    """Return whether variable-length flash attention serves q [..., D], in half precision on CUDA.

    It sees only the keys that are visible, where a mask [T, S] would take memory. It has no rules for transforms of
    functions. It refuses heads of more than 256 channels, or of no multiple of 8, which scaled_dot_product_attention
    pads or computes otherwise.
    """
    fits_kernel = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.is_cuda and fits_kernel and active_transform(q) is None


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return causal softmax attention [B, T, H, D], by torch's variable-length kernel.

    Args:
        q: [B, T, H, D].
        k, v: [B, S, H_kv, D]. The last T tokens are those of q, and the others come before them.
        window: the number of tokens that a query sees, or None for all.
        cu_seqlens: the bounds of packed sequences, for which S is T.
    """
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, _ = q.shape
    S = k.shape[1]
    rows = torch.arange(B + 1, device=q.device, dtype=torch.int32)
    bounds, key_bounds = (rows * T, rows * S) if cu_seqlens is None else (cu_seqlens.int(), cu_seqlens.int())
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    left = -1 if window is None else window - 1
    o = varlen_attn(q, k, v, bounds, key_bounds, T, S, window_size=(left, 0))
    assert isinstance(o, Tensor)  # With the sums of the weights, which are not asked for, it would be a tuple.
    return o.unflatten(0, (B, T))
