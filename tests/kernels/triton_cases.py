"""The Triton kernels against the float64 recurrence, on whatever device they run."""

import torch
import torch.nn.functional as F

from glalm.kernels.reference import recurrent_gla
from glalm.kernels.triton import gla

GATES = {
    "slow": lambda x: F.logsigmoid(x) / 16,
    "usual": F.logsigmoid,
    "fast": lambda x: 4 * F.logsigmoid(x),  # most chunks need the pairwise path
    "none": torch.zeros_like,
}


def wild(x):
    """Ordinary gates with a few that forget everything."""
    g = F.logsigmoid(x)
    for t, value in ((2, -float("inf")), (17, -1e5), (18, 0.0), (40, -1000.0), (70, -float("inf"))):
        if t < g.shape[1]:
            g[:, t] = value
    return g


GATES["wild"] = wild


def case(B, T, H, K, V, *, dtype, gate="slow", gate_dtype=None, states=False, cu_seqlens=None, device="cpu", seed=0):
    """Relative RMS errors of o, the final state and all gradients; all must be finite."""
    r = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(B, T, H, n, generator=r).to(device, dtype) for n in (K, K, V, V))
    g = GATES[gate](torch.randn(B, T, H, K, generator=r)).to(device, gate_dtype or dtype)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    S0, dS = (torch.randn(N, H, K, V, generator=r).to(device) if states else None for _ in range(2))
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, device=device)

    o, S = gla.forward(q, k, v, g, K**-0.5, S0, True, cu_seqlens)
    grads = gla.backward(q, k, v, g, K**-0.5, S0, cu_seqlens, do, dS)
    got = dict(zip(["o", "S", "dq", "dk", "dv", "dg", "dS0"], (o, S, *grads), strict=True))

    inputs = [x.double().requires_grad_() for x in (q, k, v, g.clamp(min=-1e4), *([S0] if states else []))]
    o, S = recurrent_gla(*inputs[:4], K**-0.5, inputs[4] if states else None, cu_seqlens)
    total = (o * do.double()).sum() + ((S * dS.double()).sum() if states else 0)
    truth = dict(zip(got, (o, S, *torch.autograd.grad(total, inputs)), strict=False))
    assert all(torch.isfinite(got[name]).all() for name in truth)
    return {name: relative(got[name], x) for name, x in truth.items()}


def relative(x, truth):
    scale = truth.square().mean().sqrt().clamp(min=1e-30)
    return ((x.double() - truth).square().mean().sqrt() / scale).item()
