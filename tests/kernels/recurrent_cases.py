"""Compare the Triton recurrence with the float64 one, compiled on a GPU or interpreted on a CPU."""

import torch
import torch.nn.functional as F
from triton_cases import relative_error

from glalm.kernels.reference import recurrent_delta_rule, recurrent_gla
from glalm.kernels.triton.recurrent import forward


def relative_errors(
    B, T, H, K, V, *, dtype, gate="channel", gate_dtype=None, states=True, bounds=None, in_place=False, wild=False,
    delta=False, group=1, device="cpu", seed=0,
):  # fmt: skip
    """Return the relative RMS errors of o and the final state, whose memory held NaN before."""
    r = torch.Generator().manual_seed(seed)
    sizes = (H * group, K), (H, K), (H, V)
    q, k, v = (torch.randn(B, T, h, n, generator=r).to(device, dtype) for h, n in sizes)
    g = F.logsigmoid(torch.randn(B, max(T, 1), H, K, generator=r)) / 4
    if wild:
        g[:, 1::3, :, ::2] = -torch.inf
        g[:, 2::5, :, 1::2] = -1e5
    g = g.to(device, gate_dtype or dtype)
    N = B if bounds is None else len(bounds) - 1
    S = torch.randn(N, H, K, V, generator=r).to(device) if states else None
    bounds = None if bounds is None else torch.tensor(bounds, device=device)
    argument = {"channel": g, "head": g[..., 0], "fixed": g[0, 0, :, 0], "none": None}[gate]
    expanded = {"channel": g, "none": torch.zeros_like(g)}.get(gate)
    if expanded is None:
        expanded = argument[..., None].expand(B, max(T, 1), H, K)
    argument = argument[:, :T] if gate in ("channel", "head") else argument
    beta = torch.rand(B, T, H, generator=r).to(device, dtype) if delta else None
    if delta:
        k = F.normalize(k.float(), dim=-1).to(dtype)
        expected_o, expected_S = recurrent_delta_rule(q, k, v, beta, expanded[:, :T], 0.3, S, bounds)
    else:
        expected_o, expected_S = recurrent_gla(q, k, v, expanded[:, :T], 0.3, S, bounds)
    final_state = S if in_place else torch.full((N, H, K, V), torch.nan, device=device)
    o = forward(q, k, v, argument, 0.3, S, final_state, bounds, beta)
    assert o.dtype == dtype
    return {"o": relative_error(o, expected_o) if T else 0.0, "S": relative_error(final_state, expected_S)}
