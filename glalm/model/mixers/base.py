"""The interface that every token mixer implements, and what several of them share."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map

from glalm.config.strict import ConfigError
from glalm.kernels.common import CHUNK
from glalm.kernels.context_parallel import ContextShard
from glalm.model.layers import ParameterUses

if TYPE_CHECKING:
    from glalm.model.config import ModelConfig


class Mixer(nn.Module):
    """A token mixer: the part of a block that lets tokens see the tokens before them.

    A subclass is constructed from a ModelConfig. The dataclass `Options` holds the settings that it alone has; they
    appear in the model's config as `model.<options_name>.*`. The options check themselves in __post_init__, and
    `check_config` checks what depends on the rest of the model.

    By default matrices are initialized from a normal distribution, norm weights to 1 and biases to 0. A module with
    other initial values sets them in `init_parameters()`.

    For optim.parametrization=mup, a mixer with parameters of its own says how they are used (`sums_over`, see SumOver),
    which of its layers gives the output, and of softmax attention, which gives the queries, of `head_dim` channels.

    A mixer whose forward also takes `context: ContextShard | None = None` may set `supports_context`: with a context, x
    holds this process's tokens of sequences that several processes share (parallel.context). It hands the context to
    its short convolution and to the operator of glalm.kernels.
    """

    options_name: ClassVar[str | None] = None
    Options: ClassVar[type | None] = None
    # Whether the state holds past tokens one by one, be it of the whole text or of a window.
    state_grows: ClassVar[bool] = False
    supports_context: ClassVar[bool] = False
    sums_over: ClassVar[ParameterUses] = {}
    output_layer: ClassVar[str] = "o_proj"
    softmax_query_layer: ClassVar[str | None] = None
    head_dim: int

    @classmethod
    def check_config(cls, config: "ModelConfig") -> None:
        """Raise ConfigError if a model with this config cannot have this mixer."""

    @classmethod
    def build(cls, config: "ModelConfig", layer: int) -> "Mixer":
        """Return the mixer of block `layer` = 0, 1, ... A mixer that differs between layers overrides this."""
        return cls(config)

    def forward(
        self,
        x: Tensor,
        *,
        state=None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, object]:
        """Mix the tokens of each sequence.

        Args:
            x: [B, T, d].
            state: what an earlier call returned for the text before x, or None at the start of the sequences. It is a
                tensor or a tuple of tensors whose first axis is the sequences, [N, ...], and is never changed in place.
            return_state: whether to return the state after x.
            cu_seqlens: [N + 1], the bounds of N sequences that are packed into a batch of one.
            padding: [B, T, 1], 0 at padding and 1 at tokens. Padding precedes all tokens of its row, and x is 0 there.
                A mixer whose state is still that of no tokens after such input may ignore it. With a state, only mixers
                of `state_grows` get padding: for the others the block calls `mix_tokens`.

        Returns:
            y [B, T, d], and the new state or None.
        """
        raise NotImplementedError

    def compute_log_gate(self, x: Tensor) -> Tensor | None:
        """Return the log forget gates of x [B, T, d], [B, T, H] or [B, T, H, channels]; None if there are none."""
        return None

    def gathered_channels(self) -> int:
        """Return the numbers per token that a shard holds of all processes at once, while they share sequences."""
        return 0

    def flops(self, T: int) -> int:
        """Return the operations per token in a sequence of T tokens, except those of linear layers."""
        raise NotImplementedError


def check_outputs(mixer: Mixer, x: Tensor, outputs: Any) -> tuple[Tensor, Any]:
    """Return what a mixer's forward returned for x [B, T, d]. Raise ConfigError if that is not (y [B, T, d], state)."""
    if not isinstance(outputs, tuple) or len(outputs) != 2 or not isinstance(outputs[0], Tensor):
        kind = f"a tuple of {len(outputs)}" if isinstance(outputs, tuple) else f"a {type(outputs).__name__}"
        raise ConfigError(f"the forward of the mixer {type(mixer).__name__} must return (y, state), not {kind}")
    if outputs[0].shape != x.shape:
        raise ConfigError(
            f"the forward of the mixer {type(mixer).__name__} must return y of the shape of x, {list(x.shape)}, not "
            f"{list(outputs[0].shape)}"
        )
    return outputs


Operator = Callable[..., tuple[Tensor, Tensor | None]]  # of glalm.kernels: returns o and the final state, if asked
State = Tensor | tuple[Tensor, Tensor]


def split_state(state: State | None, is_pair: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the tensors of a mixer's state, None where there is none.

    Args:
        state: What the mixer returned, or None at the start of the sequences.
        is_pair: Whether this mixer, with its options, has a state of two tensors.

    Raises:
        ValueError: The state has another number of tensors.
    """
    if state is None:
        return None, None
    if isinstance(state, tuple) != is_pair:
        raise ValueError("the state is of a mixer with other options: the cache (past_key_values) is another model's")
    return state if isinstance(state, tuple) else (state, None)


def join_state(first: Tensor | None, second: Tensor | None) -> State | None:
    """Return a mixer's state of one or two tensors, or None without the first, which an operator returns if asked."""
    return first if first is None or second is None else (first, second)


def is_decoding_step(x: Tensor, context: ContextShard | None = None) -> bool:
    """Return whether x [B, T, d] is one token to decode, where recurrent operators are faster than chunkwise ones.

    They serve no context.
    """
    return x.shape[1] == 1 and not torch.is_grad_enabled() and context is None


def chunkwise_flops(heads: int, K: int, V: int, T: int, chunk: int = CHUNK, states: int | None = None) -> int:
    """Return the operations per token of `heads` linear recurrences with a state [K, V], computed chunk by chunk.

    Per token and head, with chunks of C tokens: 2 C K for the scores and 2 C V to sum the values by them, including the
    masked half, and 2 K V each to read and to update the state. Where groups of heads share a state, there are `states`
    of them.
    """
    C = min(T, chunk)
    states = heads if states is None else states
    return heads * (2 * C * (K + V) + 2 * K * V) + states * 2 * K * V


def convolution_flops(T: int, taps: int, block: int | None, channels: int, filters: int) -> int:
    """Return the operations per token of `channels` long convolutions of T tokens with `filters` different filters.

    Each channel takes an FFT and its inverse, and each filter an FFT, which all sequences of a batch share. A real FFT
    of n numbers takes 5/2 n log2 n operations.

    Args:
        block: None for `long_convolution`, or the tokens in a block for `convolve_between_blocks`.
    """
    if block is None:
        return round((2 * channels + filters) * fft_flops(T + taps) / T)
    size = block
    while size < taps:
        size *= 2
    blocks = -(-T // size)
    total = ((blocks - 1) * 2 * channels + filters) * fft_flops(2 * size) if blocks > 1 else 0.0
    while size > block:
        size //= 2
        total += (blocks * 2 * channels + filters) * fft_flops(2 * size)
        blocks *= 2
    return round(total / T)


def fft_flops(n: int) -> float:
    """Return the operations of a fast Fourier transform of n real numbers."""
    return 2.5 * n * math.log2(n)


# ------------------------------------------------------------------------------------------- padding after a state


def mix_tokens(
    mixer: Mixer, x: Tensor, padding: Tensor, *, state, return_state: bool = False, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Continue a mixer's state by the tokens of a padded batch alone, since padding would decay or shift the state.

    The tokens are packed, and the padding becomes one more sequence behind them, so that no length is copied to the
    host. A single token for each sequence is not packed, because decoding operators read no packed sequences.

    The arguments and results are those of Mixer.forward.
    """
    B, T, d = x.shape
    if T == 1 and cu_seqlens is None:
        y, new_state = mixer(x, state=state, return_state=return_state)
        if not return_state:
            return y, None
        is_token = padding[:, 0, 0] > 0
        return y, tree_map(
            lambda new, old: torch.where(is_token.view(-1, *[1] * (new.dim() - 1)), new, old.to(new.dtype)),
            new_state,
            state,
        )

    is_token = padding.flatten() > 0
    order = is_token.logical_not().argsort(stable=True)
    bounds = T * torch.arange(B + 1, device=x.device) if cu_seqlens is None else cu_seqlens
    tokens_before = F.pad(is_token.cumsum(0), (1, 0))
    y, new_state = mixer(
        x.flatten(0, 1)[order][None],
        state=tree_map(lambda old: F.pad(old, (0, 0) * (old.dim() - 1) + (0, 1)), state),
        return_state=return_state,
        cu_seqlens=F.pad(tokens_before[bounds], (0, 1), value=B * T),
    )
    y = torch.zeros_like(y[0]).index_copy(0, order, y[0]).view(B, T, d)
    return y, tree_map(lambda new: new[:-1].clone(), new_state) if return_state else None


# ------------------------------------------------------------------------------------ states that hold past tokens


def mix_unpacked(
    mixer: Mixer, x: Tensor, cu_seqlens: Tensor, *, state, return_state: bool, padding: Tensor | None
) -> tuple[Tensor, Any]:
    """Call a mixer on packed sequences as on a batch padded on the left, because their states have different lengths.

    The arguments and results are those of Mixer.forward. This copies cu_seqlens to the host, which waits for the GPU.
    """
    lengths = cu_seqlens.diff().tolist()
    is_token = x.new_ones(1, x.shape[1], 1) if padding is None else padding
    rows, is_token = (pad_sequence(y[0].split(lengths), True, padding_side="left") for y in (x, is_token))
    y, state = mixer(rows, state=state, return_state=return_state, padding=is_token)
    return torch.cat([row[len(row) - n :] for row, n in zip(y, lengths, strict=True)])[None], state


def append_inputs(past: Tensor | None, x: Tensor, padding: Tensor | None) -> Tensor:
    """Return the past inputs [B, S, ...] of each row, followed by its new inputs x [B, T, ...], as [B, S + T, ...].

    Padding, which lies between the two, moves to the front of its row, so that the distances of tokens are right. The
    tokens of x keep their places at the end.

    Args:
        past: from the state, in any dtype, or None at the start of the sequences.
        padding: [B, T, 1] as in Mixer.forward, or None.
    """
    if past is None:
        return x
    joined = torch.cat([past.to(x.dtype), x], 1)
    if padding is None:
        return joined
    is_token = F.pad(padding[..., 0] > 0, (past.shape[1], 0), value=True)
    order = is_token.int().argsort(stable=True)
    return joined[torch.arange(len(x), device=x.device)[:, None], order]


def keep_last(x: Tensor, count: int) -> Tensor:
    """Return the last `count` inputs of x [B, S, ...], or all if they are fewer, as a state that holds no more memory.

    A view would keep the memory of all inputs.
    """
    return x[:, max(0, x.shape[1] - count) :].clone()
