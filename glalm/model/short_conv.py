"""A causal convolution of a few taps, each channel by itself, over sequences that may be continued or packed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.kernels.common import at_least_float32, sequence_ids


class ShortConv(nn.Module):
    """y_t = silu(bias + sum_i weight[:, i] * x_{t - taps + 1 + i}), i < taps; what lies before a sequence is 0.

    weight: [channels, 1, taps], as in nn.Conv1d. The state is the last taps - 1 inputs, [N, taps - 1, channels].
    """

    def __init__(self, channels: int, taps: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def initialise(self) -> None:
        bound = self.weight.shape[2] ** -0.5  # nn.Conv1d's
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: [B, T, channels]. Returns y, of x's shape, and the new state."""
        before = self.weight.shape[2] - 1
        if cu_seqlens is None:
            head = x.new_zeros(len(x), before, x.shape[2]) if state is None else state.to(x.dtype)
            x = torch.cat([head, x], 1)
            return self.convolve(x), x[:, x.shape[1] - before :].clone()  # a view would keep the whole sequence

        # Each sequence gets its own `before` places ahead of it.
        N, (_, T, D) = len(cu_seqlens) - 1, x.shape
        made, taps = before * torch.arange(N, device=x.device), torch.arange(before, device=x.device)
        place = torch.arange(T, device=x.device) + before * (sequence_ids(cu_seqlens, T) + 1)
        long = x.new_zeros(T + N * before, D).index_copy(0, place, x[0])
        if state is not None:
            heads = (cu_seqlens[:-1] + made)[:, None] + taps
            long = long.index_copy(0, heads.flatten(), state.to(x.dtype).flatten(0, 1))
        tails = (cu_seqlens[1:] + made)[:, None] + taps
        return self.convolve(long[None])[:, place - before], long[tails]

    def convolve(self, x: Tensor) -> Tensor:
        """x: the inputs behind the taps - 1 places ahead of each sequence. Tap by tap, of which a compiler makes one
        kernel: conv1d with a group a channel takes longer, and transposes besides.
        """
        weight = at_least_float32(self.weight)
        T = max(0, x.shape[1] - weight.shape[2] + 1)
        y = sum(x[:, i : i + T] * weight[:, 0, i] for i in range(weight.shape[2]))
        return F.silu(y if self.bias is None else y + self.bias).to(x.dtype)

    def flops(self) -> int:
        """Operations a token."""
        return 2 * self.weight.numel()
