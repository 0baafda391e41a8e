"""Gated linear attention (Yang et al., arXiv 2312.06635, section 4.4), and the ablations of the paper."""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from glalm import kernels
from glalm.config.strict import describe_divisors, require
from glalm.kernels.common import log_gate
from glalm.kernels.context_parallel import ContextShard
from glalm.model.layers import BiasedLinear, GatedRMSNorm, RMSNorm, ShortConv
from glalm.model.mixers.base import Mixer, Operator, State, chunkwise_flops, is_decoding_step, join_state, split_state

CHUNKWISE: dict[str, Operator] = {
    "vector": kernels.chunk_gla,
    "scalar": kernels.chunk_simple_gla,
    "fixed": kernels.chunk_retention,
    "none": kernels.chunk_linear_attn,
}
RECURRENT: dict[str, Operator] = {
    "vector": kernels.fused_recurrent_gla,
    "scalar": kernels.fused_recurrent_simple_gla,
    "fixed": kernels.fused_recurrent_retention,
    "none": kernels.fused_recurrent_linear_attn,
}


@dataclass
class GLAOptions:
    """The keys model.gla.*: the GLA paper's ablations and later additions. The defaults are the paper's model."""

    # vector: one forget gate per key channel; scalar: one per head; fixed: 1 - 2^(-5-h) in head h; none: no gate. With
    # num_kv_heads, these are the heads of keys and values.
    gate: Literal["vector", "scalar", "fixed", "none"] = "vector"
    min_log_gate: float | None = None  # lower bound of every log gate; null: no bound
    output_gate: bool = True  # y = norm(o) * swish(x W_r) instead of norm(o)
    short_conv: int = 0  # taps of a causal convolution over q, k and v; 0: no convolution
    # Heads of keys, values, gates and states, shared by groups of query heads, if fewer than model.num_heads; null: no
    # sharing.
    num_kv_heads: int | None = None
    feature_map: Literal["identity", "relu"] = "identity"  # of q and k; relu in models converted from softmax
    # [shortest, longest], in tokens: what the gates of a head's key channels (scalar: of the heads) halve in before
    # training, evenly spaced on a log scale; null: all in model.gate_logit_normalizer tokens, as biases of 0 make them.
    initial_half_lives: list[float] | None = None

    def __post_init__(self):
        require(
            self.short_conv == 0 or self.short_conv > 1,
            f"model.gla.short_conv must be 0 or 2 taps or more, not {self.short_conv}",
        )
        require(
            self.min_log_gate is None or self.min_log_gate <= 0,
            f"model.gla.min_log_gate must be null or at most 0, not {self.min_log_gate}",
        )
        half_lives = self.initial_half_lives
        if half_lives is None:
            return
        require(
            len(half_lives) == 2 and 0 < half_lives[0] <= half_lives[1] < math.inf,
            f"model.gla.initial_half_lives must be null or [shortest, longest] in tokens, not {half_lives}",
        )
        require(
            self.gate in ("vector", "scalar"),
            f"model.gla.initial_half_lives is for gates that are learned, not for model.gla.gate={self.gate}",
        )


class GatedLinearAttention(Mixer):
    """Linear attention whose state forgets by a data-dependent gate for each key channel:

        S_t = diag(alpha_t) S_{t-1} + k_t^T v_t,   alpha_t = sigmoid(x_t W1 W2 + b)^(1/16)
        o_t = K^-1/2 q_t S_t,   y_t = (swish(x_t W_r) * RMSNorm_head(o_t)) W_o

    There is no normalizer, and no feature map unless model.gla.feature_map=relu. With model.gla.num_kv_heads, the query
    heads of a group share keys, values and gates, and so a state. Parameter names and shapes are those of the published
    GLA checkpoints.

    The state is [N, kv heads, K, V], float32. With a short convolution over q, k and v (model.gla.short_conv) it is a
    tuple of that and the convolution's state.
    """

    options_name = "gla"
    Options = GLAOptions
    supports_context = True

    @classmethod
    def check_config(cls, config) -> None:
        heads, kv_heads = config.num_heads, config.gla.num_kv_heads
        require(
            kv_heads is None or (kv_heads > 0 and heads % kv_heads == 0),
            f"model.gla.num_kv_heads={kv_heads} does not divide model.num_heads={heads}; {describe_divisors(heads)}",
        )

    def __init__(self, config):
        super().__init__()
        options: GLAOptions = config.gla
        d = config.hidden_size
        value = config.value_dim
        self.num_heads = config.num_heads
        self.kv_heads = options.num_kv_heads or self.num_heads
        shared_key = config.key_dim * self.kv_heads // self.num_heads
        shared_value = value * self.kv_heads // self.num_heads
        self.gate = options.gate
        self.min_log_gate = options.min_log_gate
        self.feature_map = options.feature_map
        self.output_gate = options.output_gate
        self.gate_logit_normalizer = config.gate_logit_normalizer
        self.q_proj = nn.Linear(d, config.key_dim, bias=False)
        self.k_proj = nn.Linear(d, shared_key, bias=False)
        self.v_proj = nn.Linear(d, shared_value, bias=False)
        channels = config.key_dim + shared_key + shared_value
        self.conv = ShortConv(channels, options.short_conv) if options.short_conv else None
        if self.gate == "vector":
            rank = config.gate_low_rank_dim
            per_head = shared_key // self.kv_heads
            logits = build_gate_logits(rank, self.kv_heads, per_head, options, self.gate_logit_normalizer)
            self.gk_proj: nn.Module = nn.Sequential(nn.Linear(d, rank, bias=False), logits)
        elif self.gate == "scalar":
            self.gk_proj = build_gate_logits(d, 1, self.kv_heads, options, self.gate_logit_normalizer)
        if self.output_gate:
            self.g_proj = nn.Linear(d, value, bias=False)
            self.g_norm_swish_gate = GatedRMSNorm(value // self.num_heads, eps=config.norm_eps)
        else:
            self.g_norm = RMSNorm(value // self.num_heads, eps=config.norm_eps)
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
        # `padding` is not needed: where x is 0, k is 0, and the state stays as it is.
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        S, conv_state = split_state(state, self.conv is not None)
        if self.conv is not None:
            (q, k, v), conv_state = self.conv([q, k, v], conv_state, cu_seqlens, context)
        if self.feature_map == "relu":
            q = F.relu(q)
            k = F.relu(k)
        operator = RECURRENT[self.gate] if is_decoding_step(x, context) else CHUNKWISE[self.gate]
        o, S = operator(
            q.unflatten(-1, (self.num_heads, -1)),
            k.unflatten(-1, (self.kv_heads, -1)),
            v.unflatten(-1, (self.kv_heads, -1)),
            **self.gate_arguments(x),
            initial_state=S,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            context=context,
        )
        if self.output_gate:
            y = self.g_norm_swish_gate(o, self.g_proj(x).unflatten(-1, (self.num_heads, -1)))
        else:
            y = self.g_norm(o)
        return self.o_proj(y.flatten(-2)), join_state(S, conv_state)

    def gate_arguments(self, x: Tensor) -> dict:
        """Return the operator's arguments for the gate: logits, or log gates if they are bounded from below."""
        if self.gate in ("fixed", "none"):
            return {}
        logits = self.gk_proj(x)
        if self.gate == "vector":
            logits = logits.unflatten(-1, (self.kv_heads, -1))
        if self.min_log_gate is None:
            return {"g": logits, "gate_logit_normalizer": self.gate_logit_normalizer}
        # The log gates are float32, because the sum over a chunk would accumulate bf16's rounding errors.
        return {"g": log_gate(logits, self.gate_logit_normalizer).clamp(min=self.min_log_gate)}

    def compute_log_gate(self, x: Tensor) -> Tensor | None:
        arguments = self.gate_arguments(x)
        return log_gate(arguments["g"], arguments.get("gate_logit_normalizer")) if arguments else None

    def flops(self, T: int) -> int:
        K = self.q_proj.out_features // self.num_heads
        V = self.o_proj.in_features // self.num_heads
        convolution = self.conv.flops() if self.conv is not None else 0
        return chunkwise_flops(self.num_heads, K, V, T, states=self.kv_heads) + convolution


def build_gate_logits(inputs: int, groups: int, gates: int, options: GLAOptions, normalizer: float) -> nn.Linear:
    """Return the layer of the logits z of groups of gates sigmoid(z)^(1/normalizer).

    In every group, the gates begin with the same half-lives, a geometric sequence between those of the options.
    """
    if options.initial_half_lives is None:
        return nn.Linear(inputs, groups * gates)
    shortest, longest = options.initial_half_lives
    logits = []
    for i in range(gates):
        half_life = shortest * (longest / shortest) ** (i / max(1, gates - 1))
        # sigmoid(z)^(half_life / normalizer) = 1/2. Where a model is only sized, tensors could not compute z.
        exponent = math.log(2) * normalizer / half_life
        logits.append(-exponent - math.log(-math.expm1(-exponent)))
    return BiasedLinear(inputs, groups * gates, groups * logits)
