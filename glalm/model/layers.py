"""Layers and functions that several mixers share: norms, rotary positions, short convolutions, feature maps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.kernels import gated_rms_norm, short_conv
from glalm.kernels.common import register_operator, sequence_ids, wide_dtype
from glalm.kernels.context_parallel import ContextShard
from glalm.kernels.gated_norm import Activation

MIN_TIME_STEP = 1e-3
MAX_TIME_STEP = 1e-1

# -------------------------------------------------------------------------------------------- how widths change scales


@dataclass(frozen=True)
class SumOver:
    """The axis of a parameter over which the forward pass sums its products with inputs: its fan-in.

    A module with parameters of its own says in its class variable `sums_over` how each is used; None is for those that
    act on single numbers, such as gains, biases and decays. optim.parametrization=mup reads it.
    """

    axis: int
    unit_norm: bool = False  # The inputs are vectors of norm 1, rather than of numbers of size 1.


ParameterUses = dict[str, SumOver | None]


# ------------------------------------------------------------------------------------------------------------ norms


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with its weight cast to the dtype of x.

    Under autocast the two dtypes differ, and torch would then warn and fall back from its fused kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm over the last axis, followed by an output gate: norm(x) * weight * activation(gate)."""

    def __init__(self, size: int, eps: float, activation: Activation = "silu"):
        super().__init__(size, eps=eps)
        self.activation = activation

    # A gated norm is an RMSNorm by its weight, but is never called as one.
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        assert self.eps is not None  # torch's class allows None.
        return gated_rms_norm(x, gate, self.weight, self.eps, self.activation)


class GroupedRMSNorm(nn.RMSNorm):
    """RMSNorm over each of `groups` equal parts of the last axis; the weight spans the entire axis."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__(size, eps=eps)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight


# -------------------------------------------------------------------------------------------------------- positions


def token_positions(
    x: Tensor,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    padding: Tensor | None = None,
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each token's position in its sequence, and the position after the last token of every sequence.

    Args:
        x: [B, T, d], of which only the shape and the device matter.
        start: [N], int64, the positions of the sequences' first tokens; zeros if None.
        cu_seqlens: [N + 1], the bounds of packed sequences, or None for N = B.
        padding: [B, T, 1], 0 at padding, which has no position of its own; None if all are tokens.
        context: the shard that x is, if processes share the sequences; `start` and the positions after the last tokens
            are then those of the entire sequences. Packed sequences have none of the latter.

    Returns:
        [B, T] and [N], int64; [1, T] where all sequences have the same positions.
    """
    B, T, _ = x.shape
    if start is None and cu_seqlens is None and padding is None and context is None:
        return torch.arange(T, device=x.device)[None], x.new_full((B,), T, dtype=torch.int64)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    start = x.new_zeros(N, dtype=torch.int64) if start is None else start
    if context is not None:
        positions, _ = token_positions(x, context.shift_positions(start, T), cu_seqlens)
        return positions, start + context.size * T
    is_token = x.new_ones(B, T, dtype=torch.int64) if padding is None else (padding[..., 0] > 0).long()
    seen = F.pad(is_token.cumsum(1), (1, 0))  # before each token, and after the last one
    if cu_seqlens is None:
        return start[:, None] + seen[:, 1:] - 1, start + seen[:, -1]
    seen_at_bounds = seen[0, cu_seqlens]
    offset = start - seen_at_bounds[:-1]
    return seen[:, 1:] - 1 + offset[sequence_ids(cu_seqlens, T)], start + seen_at_bounds.diff()


def apply_rotary(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotate queries or keys by their positions (Su et al., arXiv 2104.09864), in LLaMA's layout.

    Channel i is paired with channel i + D/2, and pair i turns by position * theta^(-2i/D) radians, so that q_s . k_t
    depends on s - t alone.

    Args:
        x: [B, T, H, D] with D even.
        positions: [B or 1, T].
        theta: the base of the frequencies.

    Returns:
        [B, T, H, D] in the dtype of x. The angles are computed in float32, or in float64 if x is float64.
    """
    half = x.shape[-1] // 2
    cos, sin = rotary_operator(positions, half, theta, wide_dtype(x))[..., None, :, :].to(x.dtype).unbind(-2)
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotary_table(positions: Tensor, pairs: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Return the cosines and sines of the angles of all pairs of channels at positions [..., T], [..., T, 2, pairs]."""
    frequencies = theta ** -(torch.arange(pairs, device=positions.device, dtype=dtype) / pairs)
    angles = positions[..., None].to(dtype) * frequencies
    return torch.stack([angles.cos(), angles.sin()], -2)


def rotary_table_fake(positions: Tensor, pairs: int, theta: float, dtype: torch.dtype) -> Tensor:
    return positions.new_empty((*positions.shape, 2, pairs), dtype=dtype)


# An operator, because a compiler that saw its inside would compute the angle of every channel of every head again.
rotary_operator = register_operator("rotary_table", rotary_table, rotary_table_fake)


# ----------------------------------------------------------------------------------------------- short convolutions


class ShortConv(nn.Module):
    """A causal depthwise convolution of a few taps with a SiLU, over sequences that may be continued or packed.

        y_t = silu(bias + sum_{i < taps} weight[:, i] * x_{t - taps + 1 + i}),   x_t = 0 before the sequence

    The weight is [channels, 1, taps], as in nn.Conv1d. The state is the last taps - 1 inputs,
    [N, taps - 1, channels].
    """

    sums_over: ClassVar[ParameterUses] = {"weight": None, "bias": None}

    def __init__(self, channels: int, taps: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_parameters(self) -> None:
        """Initialise as nn.Conv1d does, but the bias to 0."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        context: ContextShard | None = None,
    ) -> tuple[Tensor | list[Tensor], Tensor]:
        """Convolve x [B, T, channels], or its parts, each [B, T, its channels], without joining them.

        Returns y, in parts if x is, and the new state of all channels. Joined parts would be copied to one tensor and,
        since operators read contiguous heads, back from it.
        """
        parts = [x] if isinstance(x, Tensor) else x
        widths = [part.shape[-1] for part in parts]
        weights = self.weight[:, 0].split(widths)
        biases = [None] * len(parts) if self.bias is None else self.bias.split(widths)
        states = [None] * len(parts) if state is None else state.split(widths, -1)
        outputs = []
        new_states = []
        for part, weight, bias, initial in zip(parts, weights, biases, states, strict=True):
            y, final = short_conv(
                part, weight, bias, initial_state=initial, cu_seqlens=cu_seqlens, context=context
            )  # fmt: skip
            outputs.append(y)
            new_states.append(final)
        return outputs[0] if isinstance(x, Tensor) else outputs, torch.cat(new_states, -1)

    def flops(self) -> int:
        """Return the floating-point operations per token."""
        return 2 * self.weight.numel()


# ----------------------------------------------------------------------------------------------------- feature maps


class Hedgehog(nn.Module):
    """The learned map softmax([W x; -W x]) of each head, with 2 K features (Zhang et al., arXiv 2402.04347)."""

    sums_over: ClassVar[ParameterUses] = {"weight": SumOver(2)}

    def __init__(self, heads: int, K: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, K, K))

    def init_parameters(self) -> None:
        """Initialise W of every head to the identity."""
        nn.init.zeros_(self.weight)
        for head in self.weight:
            nn.init.eye_(head)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("...hk,hjk->...hj", x, self.weight.to(x.dtype))
        return torch.cat([x, -x], -1).softmax(-1)


def elu1(x: Tensor) -> Tensor:
    """Return elu(x) + 1, which is positive (Katharopoulos et al., arXiv 2006.16236)."""
    return F.elu(x) + 1


def identity(x: Tensor) -> Tensor:
    return x


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": elu1,
    "relu": F.relu,
    "silu": F.silu,
    "identity": identity,
}


def build_feature_map(name: str, heads: int, K: int) -> Callable[[Tensor], Tensor]:
    """Return the map of q or k that replaces the exponential of softmax: [..., H, K] to [..., H, num_features].

    Only `hedgehog` has parameters, and is therefore an nn.Module.
    """
    return Hedgehog(heads, K) if name == "hedgehog" else FEATURE_MAPS[name]


def num_features(name: str, K: int) -> int:
    """Return the number of features that the map `name` makes of K channels."""
    return 2 * K if name == "hedgehog" else K


def append_ones(v: Tensor) -> Tensor:
    """Append a column of ones to values, [..., V] to [..., V + 1], so that attention also sums its weights.

    float16 values become float32, because the sum of the weights overflows float16 after a few hundred tokens.
    """
    v = v.float() if v.dtype == torch.float16 else v
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def divide_by_weights(o: Tensor) -> Tensor:
    """Divide attention's output over `append_ones` values by the sum of the weights: [..., V + 1] to [..., V]."""
    return o[..., :-1] / o[..., -1:].clamp(min=1e-6)


# --------------------------------------------------------------------------------------------------- initialisation


class BiasedLinear(nn.Linear):
    """A linear layer whose bias begins with given values: one for all outputs, or one for each."""

    def __init__(self, inputs: int, outputs: int, initial_bias: float | list[float]):
        super().__init__(inputs, outputs)
        self.initial_bias = initial_bias

    def init_parameters(self) -> None:
        self.bias.copy_(torch.tensor(self.initial_bias, dtype=torch.float64))


def init_time_step(bias: Tensor) -> None:
    """Set a bias so that softplus(bias) is log-uniform between MIN_TIME_STEP and MAX_TIME_STEP.

    These are the initial time steps of Mamba (Gu and Dao, arXiv 2312.00752, section 3.6).
    """
    step = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(MIN_TIME_STEP), math.log(MAX_TIME_STEP)).exp()
    with torch.no_grad():
        bias.copy_(step + torch.log(-torch.expm1(-step)))
