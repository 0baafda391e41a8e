"""The recurrences in float64: every other implementation is tested against them."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute S_t = diag(exp g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t (GLA, arXiv 2312.06635, equation 3).

    Args:
        q, k, g: [B, T, H, K], of any floating-point dtype.
        v: [B, T, H, V].
        scale: K**-0.5 if None.
        initial_state: [N, H, K, V]; zeros if None.
        cu_seqlens: [N + 1], the bounds of N sequences packed into one row (B = 1). Without it, N = B.

    Returns:
        o [B, T, H, V] and the final states [N, H, K, V], float64. Gradients come from autograd.
    """
    q, k, v, g = (x.double() for x in (q, k, v, g))

    def update(S: Tensor, b: int, t: int) -> Tensor:
        return g[b, t].exp()[:, :, None] * S + k[b, t][:, :, None] * v[b, t][:, None, :]

    return run_recurrence(update, q, v.shape[-1], scale, initial_state, cu_seqlens)


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute S_t = (I - beta_t k_t^T k_t) diag(exp g_t) S_{t-1} + beta_t k_t^T v_t, o_t = scale * q_t S_t.

    The source for one gate per head, which may stand on either side, is arXiv 2412.06464, equation 10; for one per key
    channel it is arXiv 2510.26692, equation 1.

    Args:
        q, k: [B, T, H, K], of any floating-point dtype.
        v: [B, T, H, V].
        beta: [B, T, H].
        g: [B, T, H, K] or [B, T, H], or None for no gate.
        scale, initial_state, cu_seqlens: as for recurrent_gla.

    Returns:
        o [B, T, H, V] and the final states [N, H, K, V], float64. Gradients come from autograd.
    """
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    g = q.new_zeros(q.shape[:3]) if g is None else g.double()
    decay = (g if g.dim() == 4 else g[..., None].expand(q.shape)).exp()

    def update(S: Tensor, b: int, t: int) -> Tensor:
        S = decay[b, t][:, :, None] * S
        error = v[b, t] - torch.einsum("hk,hkv->hv", k[b, t], S)
        return S + (beta[b, t][:, None] * k[b, t])[:, :, None] * error[:, None, :]

    return run_recurrence(update, q, v.shape[-1], scale, initial_state, cu_seqlens)


def run_recurrence(
    update: Callable[[Tensor, int, int], Tensor],
    q: Tensor,
    V: int,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o_t = scale * q_t S_t token by token. update(S, b, t) is the state [H, K, V] after token t of row b.

    The other arguments and the results are those of recurrent_gla.
    """
    B, T, H, K = q.shape
    if scale is None:
        scale = K**-0.5
    if cu_seqlens is None:
        sequences = [(b, 0, T) for b in range(B)]
    else:
        sequences = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]

    outputs = [q.new_zeros(0, H, V)]
    states = []
    for n, (b, start, end) in enumerate(sequences):
        S = q.new_zeros(H, K, V) if initial_state is None else initial_state[n].double()
        for t in range(start, end):
            S = update(S, b, t)
            outputs.append(scale * torch.einsum("hk,hkv->hv", q[b, t], S)[None])
        states.append(S)
    o = torch.cat(outputs).view(B, T, H, V)
    return o, torch.stack(states) if states else q.new_zeros(0, H, K, V)
