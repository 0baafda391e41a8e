"""Compare the delta rule's Triton kernels with the float64 recurrence, compiled on a GPU or interpreted on a CPU."""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from triton_cases import GATES, relative_error

from glalm.kernels.common import CHUNK
from glalm.kernels.reference import recurrent_delta_rule
from glalm.kernels.triton import delta


def resets(x):
    """Return fast gates of which several that forget everything lie in the same block of 16 tokens."""
    g = 8 * torch.nn.functional.logsigmoid(x)
    for t, value in ((1, -float("inf")), (2, -float("inf")), (9, -1e5), (12, 0.0), (65, -200.0), (66, -300.0)):
        if t < g.shape[1]:
            g[:, t] = value
    return g


GATES["resets"] = resets


def relative_errors(*shape, **options) -> dict[str, float]:
    """Return the relative RMS errors of o, the final state and all gradients for a case of `draw`."""
    args, gradients = draw(*shape, **options)
    return compare(run_kernels(args, *gradients), compute_exactly(args, *gradients))


def errors_beside_rounding(*shape, **options) -> dict[str, tuple[float, float]]:
    """Return the errors of `relative_errors`, each with the error of the formula whose matmuls round their operands."""
    args, gradients = draw(*shape, **options)
    found = run_kernels(args, *gradients)
    expected = compute_exactly(args, *gradients)
    operator = functools.partial(rounded_delta_rule, dtype=args["q"].dtype)
    rounded = differentiate(operator, args, *gradients, torch.float32)
    rounded = {name: x.to(found[name].dtype) for name, x in rounded.items()}
    errors = compare(found, expected), compare(rounded, expected)
    return {name: (errors[0][name], errors[1][name]) for name in expected}


def draw(
    B, T, H, K, V, *, dtype, gate="slow", per="head", normalize=False, gate_dtype=None, states=False, cu_seqlens=None,
    device="cpu", seed=0,
) -> tuple[dict, tuple[Tensor, Tensor | None]]:  # fmt: skip
    """Draw the arguments of delta.forward, and the gradients of o and of the final state.

    Args:
        per: whether there is one gate per "channel" or per "head", or "nothing".
        normalize: whether the kernels normalize q and k; otherwise k is normalized here.
    """
    r = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(B, T, H, n, generator=r).to(device, dtype) for n in (K, K, V, V))
    if not normalize:
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype)
    beta = torch.rand(B, T, H, generator=r).to(device, dtype)
    g = GATES[gate](torch.randn(B, T, H, K, generator=r)).to(device, gate_dtype or dtype)
    g = {"channel": g, "head": g[..., 0].contiguous(), "nothing": None}[per]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    S0, dS = (torch.randn(N, H, K, V, generator=r).to(device) if states else None for _ in range(2))
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, device=device)
    args = dict(q=q, k=k, v=v, beta=beta, g=g, normalize=normalize, S0=S0, cu_seqlens=cu_seqlens)
    return args, (do, dS)


def run_kernels(args: dict, do: Tensor, dS: Tensor | None) -> dict[str, Tensor]:
    """Return what the kernels compute, by the names of `differentiate`. All of it must be finite."""
    q, k, v, beta, g, normalize, S0, cu_seqlens = args.values()
    scale = q.shape[-1] ** -0.5
    o, S, saved = delta.forward(q, k, v, beta, g, scale, normalize, S0, True, cu_seqlens)
    grads = delta.backward(q, k, v, beta, g, scale, normalize, S0, cu_seqlens, saved, do, dS)
    found = dict(zip(["o", "S", "dq", "dk", "dv", "dbeta", "dg", "dS0"], (o, S, *grads), strict=True))
    assert all(x is None or torch.isfinite(x).all() for x in found.values())
    return found


def compute_exactly(args: dict, do: Tensor, dS: Tensor | None) -> dict[str, Tensor]:
    return differentiate(recurrent_delta_rule, args, do, dS, torch.float64)


def differentiate(operator, args: dict, do: Tensor, dS: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the operator's o and final state S and the gradients of its inputs, computed in `dtype`."""
    inputs = {name: args[name] for name in ("q", "k", "v", "beta", "g", "S0")}
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items() if x is not None}
    gates = inputs["g"].clamp(min=-1e4) if "g" in inputs else None
    keys = [l2_normalize(inputs[n]) if args["normalize"] else inputs[n] for n in "qk"]
    scale = keys[0].shape[-1] ** -0.5
    o, S = operator(*keys, inputs["v"], inputs["beta"], gates, scale, inputs.get("S0"), args["cu_seqlens"])
    total = (o * do.to(dtype)).sum() + (0 if dS is None else (S * dS.to(dtype)).sum())
    results = dict(zip((f"d{name}" for name in inputs), torch.autograd.grad(total, inputs.values()), strict=True))
    return results | {"o": o.detach(), "S": S.detach()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(found[name], x) for name, x in expected.items()}


def l2_normalize(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


# The chunkwise formula with rounded operands: the errors that an implementation on tensor cores may have.


class RoundedMatmul(torch.autograd.Function):
    """a @ b with operands rounded to `dtype` and sums in float32, forward and backward."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(a.to(dtype), b.to(dtype))
        return a.to(dtype).float() @ b.to(dtype).float()

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        d = d.to(a.dtype).float()
        return d @ b.float().mT, a.float().mT @ d, None


def rounded_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, S0: Tensor | None,
    cu_seqlens: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute recurrent_delta_rule in float32 by chunks of matmuls that round their operands to `dtype`."""
    g = torch.zeros_like(beta) if g is None else g
    inputs = [x.transpose(1, 2) for x in (q * scale, k, v, beta[..., None], g if g.dim() == 4 else g[..., None])]
    B, H, T, K = inputs[0].shape
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    S0 = q.new_zeros(N, H, K, v.shape[-1]) if S0 is None else S0
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    outputs = []
    states = []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        S = S0 if cu_seqlens is None else S0[n : n + 1]
        for chunk in split_chunks(inputs, start, end):
            o, S = rounded_chunk(*chunk, S, dtype)
            outputs.append(o)
        states.append(S)
    return torch.cat(outputs, 2).transpose(1, 2), torch.cat(states)


def split_chunks(inputs: list[Tensor], start: int, end: int) -> Iterator[list[Tensor]]:
    for t in range(start, end, CHUNK):
        yield [x[:, :, t : min(t + CHUNK, end)] for x in inputs]


def rounded_chunk(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return o and the next state of one chunk. All inputs are [B, H, tokens, n], with one gate or one per channel."""

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return RoundedMatmul.apply(a, b, dtype)

    def contract(reads: Tensor) -> Tensor:
        """Return the products [B, H, t, s] of reads t and keys s. Each row is rescaled by half of the decay."""
        left = (reads[:, :, :, None] * half_decays)[..., None, :]
        right = (k[:, :, None] * half_decays)[..., None]
        return matmul(left, right)[..., 0, 0]

    sums = g.double().cumsum(2)  # Differences of float32 sums would lose bits after a gate that forgets everything.
    half_decays = ((sums[:, :, :, None] - sums[:, :, None]).clamp(max=0) / 2).exp().float()
    before = sums.exp().float()
    after = (sums[:, :, -1:] - sums).exp().float()
    eye = torch.eye(q.shape[2], device=q.device)
    system = eye + (beta * contract(k)).tril(-1)
    inverse = torch.linalg.solve_triangular(system, eye.expand_as(system), upper=False, unitriangular=True)
    u = matmul(inverse * beta.mT, v - matmul(k * before, S))
    o = matmul(q * before, S) + matmul(contract(q).tril(), u)
    S = before[:, :, -1, :, None] * S + matmul((k * after).mT, u)
    return o, S
