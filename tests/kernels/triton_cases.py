"""Compare the Triton kernels with the float64 recurrence, compiled on a GPU or interpreted on a CPU."""

import torch
import torch.nn.functional as F

from glalm.kernels.reference import recurrent_gla
from glalm.kernels.triton import gla

GATES = {
    "slow": lambda x: F.logsigmoid(x) / 16,
    "usual": F.logsigmoid,
    "fast": lambda x: 4 * F.logsigmoid(x),  # Most chunks take the pairwise path.
    "none": torch.zeros_like,
}


def wild(x):
    """Return ordinary gates with a few that forget everything."""
    g = F.logsigmoid(x)
    for t, value in ((2, -float("inf")), (17, -1e5), (18, 0.0), (40, -1000.0), (70, -float("inf"))):
        if t < g.shape[1]:
            g[:, t] = value
    return g


GATES["wild"] = wild


def relative_errors(
    B, T, H, K, V, *, dtype, gate="slow", per="channel", logits=None, gate_dtype=None, states=False, cu_seqlens=None,
    group=1, device="cpu", seed=0,
):  # fmt: skip
    """Return the relative RMS errors of o, the final state and all gradients, and check that all are finite.

    Args:
        per: whether there is one gate per "channel" or per "head", a "fixed" one per head for all tokens, which gets
            no gradient, or "nothing".
        logits: the normalizer, if g holds logits.
        group: the heads of q for each of the H heads of k, v and g.
    """
    r = torch.Generator().manual_seed(seed)
    heads = H * group
    q, k, v, do = (
        torch.randn(B, T, h, n, generator=r).to(device, dtype) for h, n in ((heads, K), (H, K), (H, V), (heads, V))
    )
    x = torch.randn(B, T, H, K, generator=r)
    g = (x if logits else GATES[gate](x)).to(device, gate_dtype or dtype)
    per_head = g[..., 0].contiguous()
    g = {"channel": g, "head": per_head, "fixed": per_head[0, 0], "nothing": None}[per]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    S0, dS = (torch.randn(N, H, K, V, generator=r).to(device) if states else None for _ in range(2))
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, device=device)

    o, S, saved = gla.forward(q, k, v, g, K**-0.5, logits, S0, True, cu_seqlens, True)
    grads = gla.backward(q, k, v, g, K**-0.5, logits, S0, cu_seqlens, saved, do, dS)
    found = dict(zip(["o", "S", "dq", "dk", "dv", "dg", "dS0"], (o, S, *grads), strict=True))

    inputs = {"q": q, "k": k, "v": v, "g": g, "S0": S0}
    inputs = {name: x.double().requires_grad_() for name, x in inputs.items() if x is not None}
    gates = inputs.get("g", torch.zeros_like(inputs["k"]))
    gates = F.logsigmoid(gates) / logits if logits else gates.clamp(min=-1e4)
    gates = gates if gates.dim() == 4 else gates[..., None].expand(k.shape)
    o, S = recurrent_gla(inputs["q"], inputs["k"], inputs["v"], gates, K**-0.5, inputs.get("S0"), cu_seqlens)
    total = (o * do.double()).sum() + ((S * dS.double()).sum() if states else 0)
    expected = dict(zip((f"d{name}" for name in inputs), torch.autograd.grad(total, inputs.values()), strict=True))
    expected |= {"o": o, "S": S}
    if per == "fixed":
        assert found["dg"] is None
        del expected["dg"]
    assert all(torch.isfinite(found[name]).all() for name in expected)
    return {name: relative_error(found[name], x) for name, x in expected.items()}


def relative_error(x, expected, *alike):
    """Return the RMS of the error, relative to the RMS of the expected values.

    A sum of many terms may nearly cancel, and its error is not in proportion to what is left. The scale is then that of
    several such sums: the expected one, and others that are drawn `alike`.
    """
    scale = torch.stack([expected, *alike]).square().mean().sqrt().clamp(min=1e-30)
    return ((x.double() - expected).square().mean().sqrt() / scale).item()
