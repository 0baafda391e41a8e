"""Kernelized attention with relative positional encoding, by FFT (Luo et al., arXiv 2106.12566)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import require_positive
from glalm.kernels.common import at_least_float32, sequence_ids, without_autocast
from glalm.kernels.long_convolution import convolve_between_blocks
from glalm.model.layers import ParameterUses, SumOver, append_ones, divide_by_weights
from glalm.model.mixers.base import Mixer, append_inputs, convolution_flops, keep_last, mix_unpacked

State = tuple[Tensor, Tensor]

# Up to so many tokens, their matrix of scores takes less time and memory than FFTs over the F (V + 1) columns.
DENSE_BLOCK = 2048


@dataclass
class RPEAttentionOptions:
    """The keys model.rpe_attention.*."""

    features: int = 16  # of queries and keys in each head; the memory in training is proportional to them
    window: int = 2048  # a token sees itself and the window - 1 tokens before it; each distance has a learned weight

    def __post_init__(self):
        require_positive(self, "model.rpe_attention", "features", "window", finite=True)


class RPEAttention(Mixer):
    """Attention with phi(q_t) . phi(k_s) in place of softmax's exponential, weighted by the distance of the tokens:

        o_t = sum_{s <= t} c_{t-s} (phi(q_t) . phi(k_s)) v_s / sum_{s <= t} c_{t-s} (phi(q_t) . phi(k_s)),   y = o W_o
        c_i = exp(b_i) for i < model.rpe_attention.window, else 0,   phi(x) = exp(W x / |x|)

    Each head has a bias b_i for every distance, and features W. As sums over c_{t-s}, numerator and denominator are
    convolutions of the F (V + 1) columns of phi(k_s)^T [v_s, 1] for a head with F features and V channels.

    With one FFT over the whole text, as in the paper, all tokens have rounding errors as large as those of the largest
    sums, which early tokens then divide by small denominators. So tokens of the same block of DENSE_BLOCK attend to
    each other in the dense form, and FFTs of growing size add the earlier blocks, each over only the tokens that it
    sums: O(T log^2 T) in all.

    phi is the paper's map of positive random features, of normalized queries and keys, without the factors that cancel.
    W starts as the paper's random numbers and is trained. The paper's b has as many distances as the training length.
    The range of float32 limits both: |W x| / |x| above 88 overflows to NaN, and a token that sees only distances whose
    biases are 87 below the largest one gets 0.

    The state is a tuple of phi(k) [N, S, H, F], at least float32, and v [N, S, H, V] in the dtype it was computed in. S
    is the number of tokens so far, but at most window - 1. A decoding step reads all of it, as softmax attention does.
    """

    options_name = "rpe_attention"
    Options = RPEAttentionOptions
    state_grows = True
    sums_over: ClassVar[ParameterUses] = {"features": SumOver(2, unit_norm=True), "position_bias": None}

    def __init__(self, config):
        super().__init__()
        options: RPEAttentionOptions = config.rpe_attention
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.window = options.window
        self.q_proj = nn.Linear(d, config.key_dim, bias=False)
        self.k_proj = nn.Linear(d, config.key_dim, bias=False)
        self.v_proj = nn.Linear(d, config.value_dim, bias=False)
        self.features = nn.Parameter(torch.empty(self.num_heads, options.features, config.key_dim // self.num_heads))
        self.position_bias = nn.Parameter(torch.empty(options.window, self.num_heads))
        self.o_proj = nn.Linear(config.value_dim, d, bias=False)

    def init_parameters(self) -> None:
        """Draw the features from a normal distribution, and let all distances weigh the same."""
        nn.init.normal_(self.features)
        nn.init.zeros_(self.position_bias)

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
            return mix_unpacked(self, x, cu_seqlens, state=state, return_state=return_state, padding=padding)
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = self.map_features(q)
        k = self.map_features(k)
        if padding is not None:
            k = k * padding[..., None].to(k.dtype)  # phi(0) is not 0.
        past_k, past_v = (None, None) if state is None else state
        k = append_inputs(past_k, k, padding)
        v = append_inputs(past_v, v, padding)
        o = self.attend(q, k, v, cu_seqlens).to(v.dtype)
        new_state = (keep_last(k, self.window - 1), keep_last(v, self.window - 1)) if return_state else None
        return self.o_proj(o.flatten(-2)), new_state

    def map_features(self, x: Tensor) -> Tensor:
        """Return phi(x) [B, T, H, F], at least float32, of queries or keys x [B, T, H, K]."""
        with without_autocast(x):
            x = at_least_float32(x)
            # F.normalize's second derivative is NaN where x = 0, as at padding.
            directions = x * x.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()
            return torch.einsum("bthk,hfk->bthf", directions, at_least_float32(self.features)).exp()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Return the outputs [B, T, H, V], at least float32.

        Args:
            q: phi(q) [B, T, H, F].
            k: phi(k) [B, S, H, F], whose last T tokens are those of q; 0 at padding.
            v: [B, S, H, V].
            cu_seqlens: as of Mixer.forward.
        """
        T = q.shape[1]
        S = k.shape[1]
        bias = at_least_float32(self.position_bias[: max(1, S)])
        # The largest bias cancels in the ratio; without it, no weight overflows.
        c = (bias - bias.detach().amax(0)).exp()
        v = append_ones(at_least_float32(v))
        with without_autocast(v):
            if T == 1 and cu_seqlens is None:
                weights = torch.einsum("bhf,bshf->bsh", q[:, 0], k) * c.flip(0)
                return divide_by_weights(torch.einsum("bsh,bshv->bhv", weights, v)[:, None])
            sequence = None if cu_seqlens is None else sequence_ids(cu_seqlens, S)
            block = max(1, min(S, DENSE_BLOCK))
            q = F.pad(q, (0, 0, 0, 0, S - T, 0))
            o = attend_within_blocks(q, k, v, c, sequence, block)
            if block < S:
                sequence = c.new_zeros(S, dtype=torch.int64) if sequence is None else sequence
                columns = k[..., None] * v[..., None, :]
                columns = convolve_between_blocks(columns, c[..., None, None], sequence, block)
                o = o + torch.einsum("bthf,bthfv->bthv", q, columns)
        return divide_by_weights(o[:, S - T :])

    def flops(self, T: int) -> int:
        """Count both maps, the scores and sums in blocks, and where there are several blocks the FFTs and their use."""
        H, features, K = self.features.shape
        V = self.v_proj.out_features // H + 1
        block = min(T, DENSE_BLOCK)
        within = H * (4 * features * K + 2 * block * (features + V))
        if T <= DENSE_BLOCK:
            return within
        channels = H * features * V
        return within + 2 * channels + convolution_flops(T, min(self.window, T), block, channels, filters=H)


def attend_within_blocks(q: Tensor, k: Tensor, v: Tensor, c: Tensor, sequence: Tensor | None, block: int) -> Tensor:
    """Return the sums [B, S, H, V] over the tokens of a token's own block and sequence, by the matrix of weights.

    Args:
        q: phi(q) [B, S, H, F].
        k: phi(k) [B, S, H, F].
        v: [B, S, H, V].
        c: [window, H], the weights of the distances.
        sequence: [S], the sequence that each token belongs to, or None if each row of q is one.
        block: tokens in a block.
    """
    S = q.shape[1]
    surplus = -S % block
    # [B, blocks, H, block, F or V]
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, surplus)).unflatten(1, (-1, block)).transpose(2, 3) for x in (q, k, v))
    # Row t of the matrix of weights is c_t, ..., c_0, 0, ...: a window that slides over c, from its end to zeros.
    c = F.pad(c[:block], (0, 0, 0, block - len(c[:block])))
    weights = F.pad(c.flip(0), (0, 0, 0, block - 1)).unfold(0, block, 1).flip(0).transpose(0, 1)
    if sequence is not None:
        ids = F.pad(sequence, (0, surplus), value=-1).view(-1, 1, block)
        weights = weights * (ids[..., :, None] == ids[..., None, :])  # [blocks, H, block, block]
    return (q @ k.mT * weights @ v).transpose(2, 3).flatten(1, 2)[:, :S]
