"""Recurrences in float64, token by token: every other implementation is tested against them."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
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
        q: [B, T, Hq, K], of any floating-point dtype. Query head h reads the state of head h // (Hq / H).
        k, g: [B, T, H, K].
        v: [B, T, H, V].
        scale: K**-0.5 if None.
        initial_state: [N, H, K, V]; zeros if None.
        cu_seqlens: [N + 1], the bounds of N sequences packed into one row (B = 1). Without it, N = B.

    Returns:
        o [B, T, Hq, V] and the final states [N, H, K, V], float64. Gradients come from autograd.
    """
    q, k, v, g = (x.double() for x in (q, k, v, g))

    def update(S: Tensor, b: int, t: int) -> Tensor:
        return g[b, t].exp()[:, :, None] * S + k[b, t][:, :, None] * v[b, t][:, None, :]

    return run_recurrence(update, q, v.shape[2:], scale, initial_state, cu_seqlens)


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

    return run_recurrence(update, q, v.shape[2:], scale, initial_state, cu_seqlens)


def run_recurrence(
    update: Callable[[Tensor, int, int], Tensor],
    q: Tensor,
    heads_and_values: tuple[int, ...],
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o_t = scale * q_t S_t token by token. update(S, b, t) is the state [H, K, V] after token t of row b.

    `heads_and_values` are H and V. The other arguments and the results are those of recurrent_gla.
    """
    B, T, query_heads, K = q.shape
    H, V = heads_and_values
    q = q.unflatten(2, (H, query_heads // H))
    if scale is None:
        scale = K**-0.5
    if cu_seqlens is None:
        sequences = [(b, 0, T) for b in range(B)]
    else:
        sequences = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]

    outputs = [q.new_zeros(0, H, query_heads // H, V)]
    states = [q.new_zeros(0, H, K, V)]
    for n, (b, start, end) in enumerate(sequences):
        S = q.new_zeros(H, K, V) if initial_state is None else initial_state[n].double()
        for t in range(start, end):
            S = update(S, b, t)
            outputs.append(scale * torch.einsum("hgk,hkv->hgv", q[b, t], S)[None])
        states.append(S[None])
    o = torch.cat(outputs).view(B, T, query_heads, V)
    return o, torch.cat(states)


def recurrent_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = (h_t C_t + D x_t) silu(z_t) (Mamba, arXiv 2312.00752).

    Args:
        x, dt, z: [batch, T, d]. With dt_bias [d], the time step is softplus(dt + dt_bias).
        A: [d, N]; B, C: [batch, T, N]; D: [d].
        initial_state: [n, d, N]; zeros if None.
        cu_seqlens: [n + 1], the bounds of n sequences packed into one row.

    Returns:
        y [batch, T, d] and the final states [n, d, N], float64. Gradients come from autograd.
    """
    x, dt, A, B, C = (tensor.double() for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = F.softplus(dt + dt_bias.double())
    rows, T, d = x.shape
    if cu_seqlens is None:
        sequences = [(row, 0, T) for row in range(rows)]
    else:
        sequences = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]

    outputs = [x.new_zeros(0, d)]
    states = [x.new_zeros(0, *A.shape)]
    for n, (row, start, end) in enumerate(sequences):
        h = x.new_zeros(A.shape) if initial_state is None else initial_state[n].double()
        for t in range(start, end):
            h = (dt[row, t][:, None] * A).exp() * h + (dt[row, t] * x[row, t])[:, None] * B[row, t]
            outputs.append((h @ C[row, t])[None])
        states.append(h[None])
    y = torch.cat(outputs).view(x.shape)
    if D is not None:
        y = y + D.double() * x
    if z is not None:
        y = y * F.silu(z.double())
    return y, torch.cat(states)


def recurrent_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute S_t = exp(dt_t A) S_{t-1} + B_t^T (dt_t x_t), o_t = C_t S_t + D x_t (Mamba-2, arXiv 2405.21060).

    Args:
        x: [batch, T, H, P].
        dt: [batch, T, H]. With dt_bias [H], the time step is softplus(dt + dt_bias).
        A, D: [H].
        B, C: [batch, T, G, N]; head h reads group h // (H / G).
        initial_state: [n, H, N, P]; zeros if None.
        cu_seqlens: [n + 1], the bounds of n sequences packed into one row.

    Returns:
        o [batch, T, H, P] and the final states [n, H, N, P], float64. Gradients come from autograd.
    """
    x, dt, A, B, C = (tensor.double() for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = F.softplus(dt + dt_bias.double())
    heads_per_group = x.shape[2] // B.shape[2]
    q = C.repeat_interleave(heads_per_group, 2)
    k = B.repeat_interleave(heads_per_group, 2)
    g = (dt * A)[..., None].expand(q.shape)
    o, final_state = recurrent_gla(q, k, dt[..., None] * x, g, 1.0, initial_state, cu_seqlens)
    return o if D is None else o + D.double()[:, None] * x, final_state


def recurrent_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y_t = silu(bias + sum_{i < taps} weight_i x_{t - taps + 1 + i}).

    Args:
        x: [B, T, D].
        weight: [D, taps].
        bias: [D], or None.
        initial_state: the last taps - 1 inputs before x, [N, taps - 1, D]; zeros if None.
        cu_seqlens: [N + 1], the bounds of N sequences packed into one row.

    Returns:
        y [B, T, D] and the last inputs [N, taps - 1, D], float64. Gradients come from autograd.
    """
    x = x.double()
    rows, T, D = x.shape
    taps = weight.shape[1]
    if cu_seqlens is None:
        sequences = [(row, 0, T) for row in range(rows)]
    else:
        sequences = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]
    outputs = [x.new_zeros(0, D)]
    states = [x.new_zeros(0, taps - 1, D)]
    for n, (row, start, end) in enumerate(sequences):
        past = x.new_zeros(taps - 1, D) if initial_state is None else initial_state[n].double()
        inputs = torch.cat([past, x[row, start:end]])
        for t in range(end - start):
            u = torch.einsum("td,dt->d", inputs[t : t + taps], weight.double())
            outputs.append(F.silu(u if bias is None else u + bias.double())[None])
        states.append(inputs[end - start :][None])
    return torch.cat(outputs).view(rows, T, D), torch.cat(states)
