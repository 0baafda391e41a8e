"""The delta rule, chunkwise (Yang et al., arXiv 2406.06484), and with a gate (arXiv 2412.06464), with autograd.

    S_t = a_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t        o_t = scale * q_t S_t,   a_t = exp(g_t)

which is S_t = a_t S_{t-1} + k_t^T u_t with u_t = beta_t (v_t - a_t k_t S_{t-1}): what is written is the error of what
is read. In a chunk that starts from S, with G the running sum of g, all u solve one triangular system,

    (I + L) U = beta V - (beta e^G K) S,        L_ts = beta_t e^(G_t - G_s) k_t . k_s  for s < t

solved for both right-hand sides at once, before S is known (the WY form); from chunk to chunk go two matmuls.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.common import (
    CHUNK,
    check_inputs,
    check_values,
    expand_gate,
    map_sequences,
    register_operator,
    sequence_masks,
    wide_dtype,
)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence above over whole sequences, or over the next tokens of them.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V]; beta: [B, T, H], in [0, 1]; g: [B, T, H], <= 0, or None for no gate.
            Keys longer than 1 may make the state grow without bound: normalise them.
        scale: factor of the outputs; K**-0.5 if None.
        initial_state: [N, H, K, V], float32 (float64 for float64 inputs); zeros if None.
        cu_seqlens: [N + 1], the bounds of N sequences packed into one row (B = 1). Read on the host where
            states go in or out.

    Returns o [B, T, H, V] in v's dtype and, if asked for, the final state. Computed in float32 (float64 for float64
    inputs). On CUDA, half-precision inputs take flash-linear-attention's kernel where that is installed (see `fused`).
    Differentiable once. Raises ValueError when a shape, dtype or device does not fit.
    """
    check_inputs(q, k, v, expand_gate(None, q), initial_state, cu_seqlens)
    for name, x in (("beta", beta), ("g", g)):
        if x is not None and x.shape != q.shape[:3]:
            raise ValueError(f"{name}: expected the shape [B, T, H] = {list(q.shape[:3])}, got {list(x.shape)}")
    check_values(g, q, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    options = {"initial_state": initial_state, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    half = q.dtype in (torch.bfloat16, torch.float16)
    kernel = fused(q.shape[3], v.shape[3], g is not None) if q.is_cuda and half else None
    if kernel is not None:
        return kernel(q, k, v, **({} if g is None else {"g": g}), beta=beta, scale=scale, **options)
    dtype = wide_dtype(q)
    g = torch.zeros_like(beta) if g is None else g
    inputs = [q.to(dtype) * scale, *(x.to(dtype) for x in (k, v, beta, g))]
    with torch.autocast(q.device.type, enabled=False):
        o, state = map_sequences(chunks, inputs, initial_state, output_final_state, cu_seqlens)
    return o.to(v.dtype), state


def fused(K: int, V: int, gated: bool) -> Callable | None:
    """flash-linear-attention's kernel, or None where it is not installed or does not work."""
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    # Of 0.6.0 on Hopper: with heads narrower than 64 its backward reads memory that is not its own, and with gates it
    # refuses Triton 3.4 to 3.7.0, which compile it wrongly.
    hopper, triton = machine()
    if hopper and (min(K, V) < 64 or (gated and (3, 4) <= triton < (3, 7, 1))):
        return None
    return chunk_gated_delta_rule if gated else chunk_delta_rule


@torch.compiler.assume_constant_result
def machine() -> tuple[bool, tuple[int, ...]]:
    """Whether the GPU is a Hopper, and Triton's version."""
    import triton  # here, since a machine without a GPU may lack it

    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
    return torch.cuda.get_device_capability()[0] == 9, version


def chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor | None, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The outputs and the last state; sequence [T]: which of several packed ones each token belongs to."""
    (B, T, H, K), V = q.shape, v.shape[3]
    S = q.new_zeros(B, H, K, V) if S is None else S
    if T == 0:
        return v, S
    C = min(CHUNK, T)

    def cut(x: Tensor) -> Tensor:
        """[B, T, H, D] to [B, H, n, C, D]; tokens of padding write nothing."""
        return F.pad(x, (0, 0, 0, 0, 0, -T % C)).unflatten(1, (-1, C)).permute(0, 3, 1, 2, 4)

    q, k, v, beta, g = (cut(x) for x in (q, k, v, beta[..., None], g[..., None]))
    later = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    # The gates between two tokens are summed: a difference of sums from the chunk's start would keep no low bits behind
    # a strong gate, and be NaN behind one of -inf.
    between = g.masked_fill(~later.tril(-1), 0).cumsum(3)
    decay = between.masked_fill(~later, -torch.inf).exp()
    entering, leaving = g.cumsum(3).exp(), between[:, :, :, -1, :, None].exp()
    if sequence is not None:
        together, before, after = sequence_masks(sequence, C)
        decay, entering, leaving = decay * together, entering * before, leaving * after
    written, through = k * beta, entering[:, :, :, -1:]
    system = (written @ k.mT * decay).tril(-1) + torch.eye(C, dtype=q.dtype, device=q.device)
    sides = torch.cat([v * beta, written * entering], -1)
    new, read = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split([V, K], -1)
    scores, q, k = q @ k.mT * decay, q * entering, k * leaving
    u, starts, S = carry_op(k, new, read, through, S)
    o = q @ starts + scores @ u
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), S


def carry(k: Tensor, new: Tensor, read: Tensor, through: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What goes from chunk to chunk, u_n = new_n - read_n S_n and S_{n+1} = through_n S_n + k_n^T u_n, as one operator:
    a compiler would unroll the loop, and take a second for every chunk.

    Returns u [B, H, n, C, V], the states that the chunks start from [B, H, n, K, V], and the last.
    """
    u, starts = new.new_empty(new.shape), S.new_empty(*k.shape[:3], *S.shape[2:])
    with torch.autocast(k.device.type, enabled=False):
        for n in range(k.shape[2]):
            starts[:, :, n] = S
            u[:, :, n] = new[:, :, n] - read[:, :, n] @ S
            S = S * through[:, :, n] + k[:, :, n].mT @ u[:, :, n]
    return u, starts, S


def carry_backward(
    k: Tensor, read: Tensor, through: Tensor, u: Tensor, starts: Tensor, du: Tensor, dstarts: Tensor, dS: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, new, read, through and S."""
    dnew, dends = du.new_empty(du.shape), starts.new_empty(starts.shape)
    with torch.autocast(k.device.type, enabled=False):
        for n in reversed(range(k.shape[2])):
            dends[:, :, n] = dS
            dnew[:, :, n] = du[:, :, n] + k[:, :, n] @ dS
            dS = dS * through[:, :, n] + dstarts[:, :, n] - read[:, :, n].mT @ dnew[:, :, n]
        dthrough = (dends * starts).sum((-2, -1), keepdim=True)
        return u @ dends.mT, dnew, -(dnew @ starts.mT), dthrough, dS


def carry_fake(k, new, read, through, S):
    return new.new_empty(new.shape), S.new_empty(*k.shape[:3], *S.shape[2:]), S.new_empty(S.shape)


def carry_backward_fake(k, read, through, u, starts, du, dstarts, dS):
    return tuple(x.new_empty(x.shape) for x in (k, u, read, through, dS))


def save(ctx, inputs: tuple, output: tuple) -> None:
    k, _, read, through, _ = inputs
    ctx.save_for_backward(k, read, through, *output[:2])


def differentiate(ctx, du: Tensor, dstarts: Tensor, dS: Tensor) -> tuple[Tensor, ...]:
    return carry_backward_op(*ctx.saved_tensors, du, dstarts, dS)


def differentiate_twice(ctx, *grads):
    raise NotImplementedError("chunk_delta_rule: no second derivatives")


carry_op = register_operator("delta_carry", carry, carry_fake)
carry_backward_op = register_operator("delta_carry_backward", carry_backward, carry_backward_fake)
torch.library.register_autograd(carry_op, differentiate, setup_context=save)
torch.library.register_autograd(carry_backward_op, differentiate_twice)
