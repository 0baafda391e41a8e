"""The interface that every token mixer implements, and what several of them share."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from glalm.kernels.common import CHUNK

if TYPE_CHECKING:
    from glalm.model.config import ModelConfig


class Mixer(nn.Module):
    """A token mixer: the part of a block that lets tokens see the tokens before them.

    A subclass is constructed from a ModelConfig. The dataclass `Options` holds the settings that it alone has; they
    appear in the model's config as `model.<options_name>.*`. The options check themselves in __post_init__, and
    `check_config` checks what depends on the rest of the model.

    By default matrices are initialized from a normal distribution, norm weights to 1 and biases to 0. A module with
    other initial values sets them in `init_parameters()`.
    """

    options_name: ClassVar[str | None] = None
    Options: ClassVar[type | None] = None

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
                A mixer whose state is not affected by such input may ignore it.

        Returns:
            y [B, T, d], and the new state or None.
        """
        raise NotImplementedError

    def compute_log_gate(self, x: Tensor) -> Tensor | None:
        """Return the log forget gates of x [B, T, d], [B, T, H] or [B, T, H, channels]; None if there are none."""
        return None

    def flops(self, T: int) -> int:
        """Return the operations per token in a sequence of T tokens, except those of linear layers."""
        raise NotImplementedError


Operator = Callable[..., tuple[Tensor, Tensor | None]]  # of glalm.kernels: returns o and the final state, if asked
State = Tensor | tuple[Tensor, Tensor]


def split_state(state: State | None, is_pair: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the tensors of a mixer's state, None where there is none.

    Args:
        state: What the mixer returned, or None at the start of the sequences.
        is_pair: Whether this mixer, with its options, has a state of two tensors.
    """
    if state is None:
        return None, None
    assert isinstance(state, tuple) == is_pair, "the state is of a mixer with other options"
    return state if isinstance(state, tuple) else (state, None)


def join_state(first: Tensor | None, second: Tensor | None) -> State | None:
    """Return a mixer's state of one or two tensors, or None without the first, which an operator returns if asked."""
    return first if first is None or second is None else (first, second)


def is_decoding_step(x: Tensor) -> bool:
    """Return whether x [B, T, d] is one token to decode, where recurrent operators are faster than chunkwise ones."""
    return x.shape[1] == 1 and not torch.is_grad_enabled()


def chunkwise_flops(heads: int, K: int, V: int, T: int, chunk: int = CHUNK) -> int:
    """Return the operations per token of `heads` linear recurrences with a state [K, V], computed chunk by chunk.

    Per token and head, with chunks of C tokens: 2 C K for the scores and 2 C V to sum the values by them, including the
    masked half, and 2 K V each to read and to update the state.
    """
    C = min(T, chunk)
    return heads * (2 * C * (K + V) + 4 * K * V)


def delta_rule_flops(heads: int, K: int, V: int, T: int) -> int:
    """Return the operations per token of the delta rule with a state [K, V], computed chunk by chunk.

    On top of `chunkwise_flops`, each token and head takes 2 C K to build the triangular system, C (K + V) to solve it,
    and 2 K V to read the values that the state already holds for the keys.
    """
    C = min(T, CHUNK)
    return chunkwise_flops(heads, K, V, T) + heads * (2 * C * K + C * (K + V) + 2 * K * V)
