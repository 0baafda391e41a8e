"""GLA token by token in plain PyTorch: decoding, where a state is carried and T is mostly 1."""

from itertools import pairwise

import torch
from torch import Tensor


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, S: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o: [B, T, H, V] and the final states [N, H, K, V]. Arguments as for `fused_recurrent_gla`."""
    if cu_seqlens is None:
        return steps(q, k, v, g, scale, S)
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        one = (x[:, start:end] for x in (q, k, v, g))
        o, final = steps(*one, scale, None if S is None else S[n : n + 1])
        outputs.append(o)
        states.append(final)
    return torch.cat(outputs, 1), torch.cat(states)


def steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, S: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence itself, in float32, or in float64 for float64 inputs."""
    (B, T, H, K), V = q.shape, v.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    S = q.new_zeros(B, H, K, V, dtype=dtype) if S is None else S
    q, k, values, decay = q.to(dtype) * scale, k.to(dtype), v.to(dtype), g.to(dtype).exp()
    outputs = []
    for t in range(T):
        S = torch.addcmul(S * decay[:, t, :, :, None], k[:, t, :, :, None], values[:, t, :, None, :])
        # Not a matmul, which autocast and TF32 would round.
        outputs.append((q[:, t, :, :, None] * S).sum(2))
    o = torch.stack(outputs, 1) if T else values
    return o.to(v.dtype), S
