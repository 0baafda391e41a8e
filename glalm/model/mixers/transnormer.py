"""The linear attention of TransNormerLLM (Qin et al., arXiv 2307.14995) and of TransNormer (arXiv 2210.10340)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.kernels import chunk_linear_attn, chunk_retention, fused_recurrent_linear_attn, fused_recurrent_retention
from glalm.kernels.common import at_least_float32, wide_dtype
from glalm.kernels.context_parallel import ContextShard
from glalm.model.layers import FEATURE_MAPS, ParameterUses, token_positions
from glalm.model.mixers.base import Mixer, State, chunkwise_flops, is_decoding_step, join_state, split_state


@dataclass
class TransNormerOptions:
    """The keys model.transnormer.*. The defaults are TransNormerLLM's.

    TransNormer's NormAttention has feature_map=elu1, decay=false and output_gate=false.
    """

    feature_map: Literal["silu", "elu1", "relu", "identity"] = "silu"  # of queries and keys
    decay: bool = True  # the state decays at a fixed rate per head and layer; false: no decay
    lrpe: Literal["first", "all", "none"] = "first"  # which layers have LRPE, learned rotary positions that double K
    output_gate: bool = True  # y = norm(o) * x W_u instead of norm(o)


class TransNormer(Mixer):
    """Linear attention in which an RMS norm replaces the division by the sum of weights.

    In layer l = 0, ..., L - 1, with heads h = 1, ..., H:

        S_t = lambda_h S_{t-1} + phi(k_t)^T v_t,   lambda_h = exp(-2^(-8 h / H) (1 - l / (L - 1) + 1e-5))
        o_t = K^-1/2 phi(q_t) S_t,   y_t = (x_t W_u * norm(o_t)) W_o

    norm divides by the root mean square over all heads and has no weight. Decays are those of the released models: the
    paper prints exp(-8 h / H (1 - l / L)). By LRPE, phi(q_t) becomes [phi(q_t) cos(t theta), phi(q_t) sin(t theta)],
    and phi(k_t) alike, so that the products depend on the distance of two tokens; theta is learned. The released models
    have no factor K^-1/2, which changes nothing but the weight of the norm's epsilon.

    The state is [N, H, K, V], float32. With LRPE it is a tuple of [N, H, 2 K, V] and the next token's position [N],
    int64.
    """

    options_name = "transnormer"
    Options = TransNormerOptions
    supports_context = True

    @classmethod
    def build(cls, config, layer: int) -> "TransNormer":
        return cls(config, layer)

    def __init__(self, config, layer: int):
        super().__init__()
        options: TransNormerOptions = config.transnormer
        d = config.hidden_size
        key = config.key_dim
        value = config.value_dim
        self.num_heads = config.num_heads
        self.K = key // self.num_heads
        self.V = value // self.num_heads
        self.map_name = options.feature_map
        self.eps = config.norm_eps
        self.q_proj = nn.Linear(d, key, bias=False)
        self.k_proj = nn.Linear(d, key, bias=False)
        self.v_proj = nn.Linear(d, value, bias=False)
        self.u_proj = nn.Linear(d, value, bias=False) if options.output_gate else None
        self.o_proj = nn.Linear(value, d, bias=False)
        self.decay = LayerDecay(self.num_heads, layer, config.num_hidden_layers) if options.decay else None
        has_lrpe = options.lrpe == "all" or (options.lrpe == "first" and layer == 0)
        self.lrpe = LRPE(self.num_heads, self.K) if has_lrpe else None

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
        q = FEATURE_MAPS[self.map_name](q)
        k = FEATURE_MAPS[self.map_name](k)
        if padding is not None:
            # elu(0) + 1 is not 0, so padded keys must be masked explicitly.
            k = k * padding[..., None].to(k.dtype)
        S, start = split_state(state, self.lrpe is not None)
        end = None
        if self.lrpe is not None:
            positions, end = token_positions(x, start, cu_seqlens, context=context)
            q = self.lrpe(q, positions)
            k = self.lrpe(k, positions)
        options = {
            "scale": self.K**-0.5,
            "initial_state": S,
            "output_final_state": return_state,
            "cu_seqlens": cu_seqlens,
            "context": context,
        }
        if self.decay is None:
            linear = fused_recurrent_linear_attn if is_decoding_step(x, context) else chunk_linear_attn
            o, S = linear(q, k, v, **options)
        else:
            decaying = fused_recurrent_retention if is_decoding_step(x, context) else chunk_retention
            o, S = decaying(q, k, v, self.decay(wide_dtype(q)), **options)
        y = F.rms_norm(o.flatten(-2), (self.o_proj.in_features,), eps=self.eps)
        if self.u_proj is not None:
            y = y * self.u_proj(x)
        return self.o_proj(y), join_state(S, end)

    def flops(self, T: int) -> int:
        features = self.K if self.lrpe is None else 2 * self.K
        return chunkwise_flops(self.num_heads, features, self.V, T)


class LayerDecay(nn.Module):
    """The log decays of the heads in one layer: those of ALiBi (arXiv 2108.12409), which fade towards the last layer.

    The layer's index is a buffer, because torch.compile would compile the blocks anew for each value of an attribute.
    """

    layer: Tensor

    def __init__(self, heads: int, layer: int, layers: int):
        super().__init__()
        self.heads = heads
        self.last_layer = max(1, layers - 1)
        self.layer_index = layer
        self.register_buffer("layer", torch.tensor(layer), persistent=False)

    def init_parameters(self) -> None:
        """Refill the buffer, which is empty if the module was built on the meta device."""
        self.layer.fill_(self.layer_index)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return the log decays [H]."""
        heads = torch.arange(1, self.heads + 1, device=self.layer.device, dtype=dtype)
        return -torch.exp2(-8 * heads / self.heads) * (1 - self.layer.to(dtype) / self.last_layer + 1e-5)


class LRPE(nn.Module):
    """Linearized relative positional encoding (arXiv 2307.09270): a learned angle for each head's channels."""

    sums_over: ClassVar[ParameterUses] = {"theta": None}

    def __init__(self, heads: int, K: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(heads, K))

    def init_parameters(self) -> None:
        """Initialise the angles to 10000^(-2 j / (H K)) for channel j of all heads together."""
        channels = torch.arange(self.theta.numel(), device=self.theta.device, dtype=torch.float32)
        self.theta.copy_((10000 ** (-2 * channels / len(channels))).view_as(self.theta))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return x [B, T, H, K] at positions [B or 1, T] as [x cos(position theta), x sin(position theta)]."""
        theta = at_least_float32(self.theta)
        angles = positions[..., None, None].to(theta.dtype) * theta
        return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], -1)
