"""ReGLA: gated linear attention with a refined gate and a normalized exponential feature map (arXiv 2502.01578)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import require
from glalm.kernels import chunk_gla, chunk_value_gla, fused_recurrent_gla
from glalm.kernels.chunked import VALUE_GATE_CHUNK
from glalm.kernels.common import CHUNK, at_least_float32, sequence_ids
from glalm.kernels.context_parallel import ContextShard, gather_ranks
from glalm.model.layers import BiasedLinear, RMSNorm, append_ones, build_feature_map, divide_by_weights, num_features
from glalm.model.mixers.base import Mixer, Operator, State, chunkwise_flops, is_decoding_step, join_state, split_state

# The running maximum of a sequence without a token: far below any logit, and finite.
NO_MAXIMUM = -1e4


@dataclass
class ReGLAOptions:
    """The keys model.regla.*: the ReGLA paper's ablations. The defaults are its full model."""

    refined_gate: bool = True  # F = g (g + 2 r (1 - g)) instead of g
    gate_axis: Literal["key", "value"] = "key"  # the axis of the state [K, V] that has one gate per channel
    feature_map: Literal["exp", "elu1", "relu", "identity", "hedgehog"] = "exp"  # exp: the normalized exponential
    variance_scale: bool = True  # multiply the scores of the exponential map by 1 / (e sqrt(K (e^2 - 1)))
    output_norm: bool = True  # an RMSNorm on the output of each head; false: divide by the sum of the weights instead
    initial_forget: float = 0.96  # F of every channel before training; 0.96 equals GLA's with a bias of 0

    def __post_init__(self):
        require(0 < self.initial_forget < 1, "model.regla.initial_forget must lie between 0 and 1")
        require(
            self.output_norm or (self.feature_map != "identity" and self.gate_axis == "key"),
            "model.regla.output_norm=false divides by the sum of the weights, which needs a positive "
            "model.regla.feature_map and model.regla.gate_axis=key",
        )


class ReGLA(Mixer):
    """With g = sigmoid(x W_g + b_g) and r = sigmoid(x W_r + b_r),

        F_t = (1 - r_t) g_t^2 + r_t (1 - (1 - g_t)^2) = g_t (g_t + 2 r_t (1 - g_t))
        phi(q_t) = exp(q_t - max_i q_ti),   phi(k_t) = exp(k_t - m_t),   m_t = max_{s <= t, i} k_si
        S_t = e^(m_{t-1} - m_t) diag(F_t) S_{t-1} + phi(k_t)^T v_t
        o_t = phi(q_t) S_t / (e sqrt(K (e^2 - 1))),   y_t = RMSNorm_head(o_t) W_o

    r moves F away from g where g saturates. At r = 1/2, F equals g, so b_r starts at 0, and b_g starts where F is
    model.regla.initial_forget. With F near 1 the state forgets slowly, and since the feature map is nearly flat at
    first, the mixer averages over many tokens. Runs of a few hundred steps learn faster from 1/2, the value in
    regla_tiny.yaml.

    Choices that the published descriptions leave open:

    - The gated axis. The paper writes S = v phi(k)^T with F = f 1^T, which gates the value axis. GLA and its kernels
      gate the key axis, which is better studied and the default here. gate_axis=value is the paper's, in PyTorch.
    - The key maximum. The paper takes it over features and the entire sequence, including the future. It is one factor
      for each sequence and head, which the output norm cancels. Here it is the running maximum, in training as well.
      That is exact, because the state's rescaling is one more factor of its gate, and it is the same in training, in
      segments and in decoding.
    - The projections of the gates have low rank, as GLA's, so that the model has as many parameters as its baselines.
    - The variance scale. For unit normals x and y, Var[exp(x + y)] = e^2 (e^2 - 1). The scale makes the variance of a
      score 1, so it is one factor of the scores, not one each of phi(q) and phi(k).
    - Without the output norm (an ablation) the outputs are divided by the sum of the weights, as in linear attention.

    The state is S [N, H, K, V], float32 (V + 1 with the sum of the weights); with the exponential map it is a tuple of
    S and m [N, H].
    """

    options_name = "regla"
    Options = ReGLAOptions
    supports_context = True

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        key = config.key_dim
        value = config.value_dim
        rank = config.gate_low_rank_dim
        self.options: ReGLAOptions = config.regla
        self.num_heads = config.num_heads
        self.K = key // self.num_heads
        self.V = value // self.num_heads
        self.q_proj = nn.Linear(d, key, bias=False)
        self.k_proj = nn.Linear(d, key, bias=False)
        self.v_proj = nn.Linear(d, value, bias=False)
        gates = num_features(self.options.feature_map, key) if self.options.gate_axis == "key" else value
        forget = self.options.initial_forget
        forget_logits = BiasedLinear(rank, gates, math.log(forget / (1 - forget)))
        self.forget_proj = nn.Sequential(nn.Linear(d, rank, bias=False), forget_logits)
        if self.options.refined_gate:
            self.refine_proj = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, gates))
        if self.options.feature_map != "exp":
            self.q_map = build_feature_map(self.options.feature_map, self.num_heads, self.K)
            self.k_map = build_feature_map(self.options.feature_map, self.num_heads, self.K)
        if self.options.output_norm:
            self.o_norm = RMSNorm(self.V, eps=config.norm_eps)
        self.o_proj = nn.Linear(value, d, bias=False)

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
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        log_gate = self.compute_log_gate(x)
        S, past_maximum = split_state(state, self.options.feature_map == "exp")
        final_maximum = None
        if self.options.feature_map == "exp":
            q, k, log_gate, final_maximum = map_exponentially(
                q, k, log_gate, past_maximum, cu_seqlens=cu_seqlens, padding=padding, context=context
            )
        else:
            q = self.q_map(q)
            k = self.k_map(k)
        dtype = v.dtype
        if not self.options.output_norm:
            v = append_ones(v)
            v = v if padding is None else v * padding[..., None].to(v.dtype)
        operator: Operator = fused_recurrent_gla if is_decoding_step(x, context) else chunk_gla
        if self.options.gate_axis == "value":
            operator = chunk_value_gla
        o, S = operator(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            log_gate,
            scale=self.scale,
            initial_state=S,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            context=context,
        )
        o = self.o_norm(o) if self.options.output_norm else divide_by_weights(o).to(dtype)
        return self.o_proj(o.flatten(-2)), join_state(S, final_maximum)

    def compute_log_gate(self, x: Tensor) -> Tensor:
        """Return the log forget gate log F, [B, T, H, features or V]."""
        logit = at_least_float32(self.forget_proj(x))
        log_gate = F.logsigmoid(logit)
        if self.options.refined_gate:
            g = logit.sigmoid()
            r = at_least_float32(self.refine_proj(x)).sigmoid()
            log_gate = (log_gate + (g + 2 * r * (1 - g)).clamp(min=1e-30).log()).clamp(max=0)
        return log_gate.unflatten(-1, (self.num_heads, -1))

    @property
    def scale(self) -> float:
        """Return the factor of the scores."""
        if not self.options.output_norm:
            return 1.0  # Dividing by the sum of the weights cancels any factor.
        if self.options.feature_map == "exp":
            return 1 / (math.e * math.sqrt(self.K * (math.e**2 - 1))) if self.options.variance_scale else 1.0
        return self.K**-0.5

    def flops(self, T: int) -> int:
        features = num_features(self.options.feature_map, self.K)
        # Hedgehog multiplies q and k of each head by a K x K matrix.
        maps = 4 * self.num_heads * self.K**2 if self.options.feature_map == "hedgehog" else 0
        V = self.V if self.options.output_norm else self.V + 1  # with the sum of the weights
        chunk = CHUNK if self.options.gate_axis == "key" else VALUE_GATE_CHUNK
        return maps + chunkwise_flops(self.num_heads, features, V, T, chunk)


def map_exponentially(
    q: Tensor,
    k: Tensor,
    log_gate: Tensor,
    past_maximum: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
    padding: Tensor | None,
    context: ContextShard | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply the normalized exponential map.

    Args:
        q, k, log_gate: [B, T, H, K].
        past_maximum: [N, H], the maximum of the keys before x, or None.
        cu_seqlens, padding, context: as of Mixer.forward.

    Returns:
        phi(q) and phi(k), at least float32; the log gates with the factor e^(m_{t-1} - m_t); the maximum at the end of
        each sequence [N, H].
    """
    q = at_least_float32(q)
    k = at_least_float32(k)
    if padding is not None:
        k = k.masked_fill(padding[..., None] == 0, NO_MAXIMUM)
    largest = k.amax(-1)
    entering_maximum = past_maximum
    if context is not None:
        entering_maximum, final_maximum = exchange_maxima(largest, past_maximum, cu_seqlens, context)
    m, previous_m = running_maximum(largest, entering_maximum, cu_seqlens)
    q = (q - q.amax(-1, keepdim=True)).exp()
    k = (k - m[..., None]).exp()
    log_gate = log_gate + (previous_m - m)[..., None]
    if context is None:
        final_maximum = last_maximum(m, past_maximum, cu_seqlens)
    return q, k, log_gate, final_maximum


def running_maximum(x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return m_t = max(past, x_0, ..., x_t) of each sequence, and m_{t-1}, both [B, T, H].

    At the first token, m_{t-1} is `past`, or m_t if there is no past.

    Args:
        x: [B, T, H].
        past: [N, H], the maximum of the tokens before x, or None.
        cu_seqlens: [N + 1], the bounds of packed sequences, or None.
    """
    if cu_seqlens is None:
        if past is None:
            m = cumulative_maximum(x)
            return m, torch.cat([m[:, :1], m[:, :-1]], 1)
        m = cumulative_maximum(torch.cat([past[:, None], x], 1))
        return m[:, 1:], m[:, :-1]
    T = x.shape[1]
    tokens = torch.arange(T, device=x.device)
    sequence = sequence_ids(cu_seqlens, T)
    first = cu_seqlens[sequence]
    m = x if past is None else x.maximum(past[sequence].to(x.dtype))
    # Doubling: after each round, m is the maximum over the last 2 * distance tokens of the sequence.
    distance = 1
    while distance < T:
        earlier = torch.cat([m[:, :distance], m[:, :-distance]], 1)
        in_sequence = tokens - distance >= first
        m = torch.where(in_sequence[:, None], m.maximum(earlier), m)
        distance *= 2
    previous = torch.cat([m[:, :1], m[:, :-1]], 1)
    at_start = m if past is None else past[sequence].to(x.dtype)[None]
    return m, torch.where((tokens == first)[:, None], at_start, previous)


def cumulative_maximum(x: Tensor) -> Tensor:
    """Return the maxima over the tokens so far of x [B, T, H]. A GPU scans the last axis alone in parallel."""
    return x.mT.contiguous().cummax(-1).values.mT


def exchange_maxima(
    x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, context: ContextShard
) -> tuple[Tensor, Tensor]:
    """Return the maximum before each sequence of a shard, [N, H], and that of all processes' tokens, [B, H].

    Args:
        x: [B, T, H], or [1, B * T, H] of packed sequences.
        past: [B, H], the maximum of the tokens before the first process's, or None.
    """
    x = context.unpack_rows(x)
    B, T, H = x.shape
    past = x.new_full((B, H), NO_MAXIMUM) if past is None else past.to(x.dtype)
    if context.rows is None:
        # Of equal numbers, cummax lets the last have the gradient, as running_maximum does over whole sequences.
        largest = cumulative_maximum(x)[:, -1]
        maxima = torch.cat([past[None], gather_ranks(largest, context)]).cummax(0).values
        return maxima[context.rank], maxima[-1]
    assert cu_seqlens is not None
    first, last, offset = context.rows
    tokens = torch.arange(T, device=x.device)
    row_starts = torch.arange(B, device=x.device) * T
    in_last = tokens >= (cu_seqlens[last] - row_starts)[:, None]
    maxima = gather_ranks(x.masked_fill(~in_last[..., None], NO_MAXIMUM).max(1).values, context)
    # The last sequence of an earlier process is the first of this one if so many of its tokens lie before this shard.
    distance = (context.rank - 1 - torch.arange(context.size, device=x.device)) * T
    is_same = (distance >= 0)[:, None] & (offset > distance[:, None])
    entering = maxima.masked_fill(~is_same[..., None], NO_MAXIMUM).max(0).values
    N = cu_seqlens.shape[0] - 1
    return x.new_full((N, H), NO_MAXIMUM).index_copy(0, first, entering), past


def last_maximum(m: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return the running maximum m [B, T, H] at the end of each sequence, [N, H]; for an empty one its `past`."""
    if cu_seqlens is None and m.shape[1] > 0:
        return m[:, -1].clone()  # A view would keep the entire sequence in memory.
    N = len(m) if cu_seqlens is None else len(cu_seqlens) - 1
    past = m.new_full((N, m.shape[2]), NO_MAXIMUM) if past is None else past
    if cu_seqlens is None or m.shape[1] == 0:
        return past
    return torch.where(cu_seqlens.diff()[:, None] > 0, m[0, cu_seqlens[1:] - 1], past)
