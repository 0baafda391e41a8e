"""The delta rule, chunk by chunk (Yang et al., arXiv 2406.06484), and the gated ones.

    S_t = (I - beta_t k_t^T k_t) diag(a_t) S_{t-1} + beta_t k_t^T v_t        o_t = scale * q_t S_t,   a_t = exp(g_t)

The gate is one number per head (Gated DeltaNet, arXiv 2412.06464) or one per key channel (Kimi Delta Attention, arXiv
2510.26692). The recurrence equals S_t = diag(a_t) S_{t-1} + k_t^T u_t with u_t = beta_t (v_t - k_t diag(a_t) S_{t-1}):
the state is updated by the error of its own prediction. In a chunk that starts from S, with G the running sum of g, all
u solve one triangular system,

    (I + L) U = beta V - (beta e^G K) S,        L_ts = beta_t sum_c k_tc k_sc e^(G_tc - G_sc)  for s < t

It is solved for both right-hand sides at once, before S is known (the WY form). Two matmuls per chunk carry the state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels import common
from glalm.kernels.context_parallel import ContextShard, check_context, exchange_states

# The largest heads that the kernels serve.
MAX_KEY = 256
MAX_VALUE = 512
# In PyTorch, chunks with one gate per key channel are short, because they hold [C, C, K] decays.
CHANNEL_GATE_CHUNK = 16  # tokens


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the (gated) delta rule over whole sequences, or over the next tokens of them.

        S_t = (I - beta_t k_t^T k_t) diag(exp g_t) S_{t-1} + beta_t k_t^T v_t        o_t = scale * q_t S_t

    On CUDA, Triton kernels compute it. On other devices and in float64, PyTorch does. It is differentiable once, in all
    tensors but cu_seqlens.

    Args:
        q, k: [B, T, H, K], floating point. Keys much longer than 1 may make the state grow without bound.
        v: [B, T, H, V], in q's dtype.
        beta: [B, T, H], in [0, 1].
        g: natural log of the forget gate, <= 0: one per head [B, T, H], one per key channel [B, T, H, K], or None.
        scale: factor of the outputs; K**-0.5 if None.
        normalize: whether to divide q and k by their L2 norms over K first.
        initial_state: S_0, [N, H, K, V], float32 (float64 for float64 inputs); zeros if None.
        output_final_state: whether to return S_T.
        cu_seqlens: [N + 1], int32 or int64, the bounds of N sequences packed into one row (B = 1). With states, it is
            read on the host where PyTorch computes. Without cu_seqlens, N = B.
        context: this process's shard of sequences that several processes share; see ContextShard.

    Returns:
        o [B, T, H, V] in v's dtype, and S_T, of initial_state's shape and dtype, or None.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; on CUDA also if K > 256 or V > 512; on the CPU
            also if g > 0, or if cu_seqlens does not rise from 0 to T.
        NotImplementedError: under torch.func's transforms, in forward-mode differentiation, and in double backward.
    """
    per_channel = isinstance(g, Tensor) and g.dim() == 4
    common.check_inputs(q, k, v, g, initial_state, cu_seqlens, "BTHK" if per_channel else "BTH")
    B, T, H, K = q.shape
    common.check_shape("beta", beta, "BTH", {"B": B, "T": T, "H": H})
    common.check_values(g, q, cu_seqlens)
    common.refuse_transforms("chunk_delta_rule", q, k, v, beta, g, initial_state)
    scale = K**-0.5 if scale is None else scale
    if context is not None:
        check_context(context, initial_state, output_final_state, cu_seqlens)
        o, final = compute_over_processes(q, k, v, beta, g, scale, normalize, initial_state, cu_seqlens, context)
        return o, final if output_final_state else None
    if common.has_kernel(q):
        o, final = compute_by_kernels(q, k, v, beta, g, scale, normalize, initial_state, output_final_state, cu_seqlens)
        return o, final if output_final_state else None
    return compute_in_pytorch(q, k, v, beta, g, scale, normalize, initial_state, output_final_state, cu_seqlens)


def compute_by_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return o and the final state, or an empty tensor, on a GPU. Raise ValueError for heads without tiles."""
    K = q.shape[3]
    V = v.shape[3]
    if K > MAX_KEY:
        raise ValueError(f"q: heads of K = {K} channels are wider than {MAX_KEY}, the most that the GPU kernels serve")
    if V > MAX_VALUE:
        raise ValueError(
            f"v: heads of V = {V} channels are wider than {MAX_VALUE}, the most that the GPU kernels serve"
        )
    if normalize and q.dtype != torch.bfloat16:
        # The kernels of wider numbers divide the channels among programs, so that none sees all of a row.
        q = common.l2_normalize(q)
        k = common.l2_normalize(k)
        normalize = False
    args = (q, k, v, beta, g, scale, normalize, initial_state, output_final_state, cu_seqlens)
    if common.needs_gradient(q, k, v, beta, g, initial_state):
        return DeltaRule.apply(*args)
    o, final_state, *_ = forward_operator(*args)
    return o, final_state


def compute_over_processes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    context: ContextShard,
) -> tuple[Tensor, Tensor]:
    """Return o and the final state of sequences that several processes share.

    Tokens take a state S to P S + local, with a matrix P [K, K]. Values that are followed by K columns of zeros, from
    the state [0 | I], give [local | P] after the shard and [o | q P] at each token. So one call of the operator serves
    both the exchange and the outputs, to which q P S is added.
    """
    V = v.shape[3]
    K = q.shape[3]
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    identity = torch.eye(K, V + K, dtype=common.wide_dtype(q), device=q.device).roll(V, 1)
    o, state = chunk_delta_rule(
        q, k, torch.cat([v, torch.zeros_like(k)], -1), beta, g, scale=scale, normalize=normalize,
        initial_state=identity.expand(N, q.shape[2], K, V + K).contiguous(),
        output_final_state=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    assert state is not None
    local, transition = state.split([V, K], -1)
    entering, final = exchange_states(local, transition, initial_state, context, is_matrix=True)
    o, reads = (context.unpack_rows(x) for x in o.split([V, K], -1))
    with common.without_autocast(q):
        effect = context.read_entering(reads.to(entering.dtype), entering, cu_seqlens)
    return (o + effect).to(v.dtype).reshape(v.shape), final


# Differentiation of the kernels -----------------------------------------------------------------------------


class DeltaRule(torch.autograd.Function):
    """Differentiate the forward operator by the backward operator."""

    @staticmethod
    def forward(ctx, q, k, v, beta, g, scale, normalize, initial_state, output_final_state, cu_seqlens):
        o, final_state, *saved = forward_operator(
            q, k, v, beta, g, scale, normalize, initial_state, output_final_state, cu_seqlens
        )
        ctx.save_for_backward(q, k, v, beta, g, initial_state, cu_seqlens, *saved)
        ctx.set_materialize_grads(False)  # Autograd would allocate zeros for a final state that the loss ignores.
        ctx.options = (scale, normalize, output_final_state)
        return o, final_state

    @staticmethod
    def backward(ctx, do, dfinal_state):
        q, k, v, beta, g, initial_state, cu_seqlens, *saved = ctx.saved_tensors
        scale, normalize, output_final_state = ctx.options
        common.refuse_transformed_gradients("chunk_delta_rule", do, dfinal_state)
        do = torch.zeros_like(v) if do is None else do
        dfinal_state = dfinal_state if output_final_state else None
        with torch.no_grad():
            dq, dk, dv, dbeta, dg, dinitial_state = backward_operator(
                q, k, v, beta, g, scale, normalize, initial_state, cu_seqlens, saved, do, dfinal_state
            )
        dg = None if g is None else dg
        dinitial_state = None if initial_state is None else dinitial_state
        grads = (dq, dk, dv, dbeta, dg, dinitial_state)
        inputs = (q, k, v, beta, g, initial_state, do, dfinal_state)
        dq, dk, dv, dbeta, dg, dinitial_state = common.refuse_double_backward("chunk_delta_rule", grads, inputs)
        return dq, dk, dv, dbeta, dg, None, None, dinitial_state, None, None


# The kernels as registered operators. Each returns tensors only: an empty one stands for a result that does not exist.


def delta_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute o, the final states, and the seven buffers that the kernels save for delta_backward."""
    from glalm.kernels.triton import delta  # A machine without a GPU may lack Triton.

    o, final_state, saved = delta.forward(
        q, k, v, beta, g, scale, normalize, initial_state, output_final_state, cu_seqlens
    )
    return o, common.tensor_or_empty(final_state, q), *saved


def delta_forward_fake(
    q, k, v, beta, g, scale, normalize, initial_state, output_final_state, cu_seqlens
) -> tuple[Tensor, ...]:
    """Return uninitialized tensors of the shapes and dtypes that delta_forward returns."""
    from glalm.kernels.triton.delta import saved_shapes

    B, _, H, K = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = q.new_empty(N, H, K, v.shape[3], dtype=torch.float32) if output_final_state else q.new_empty(0)
    saved = saved_shapes(q, g, normalize, cu_seqlens)
    return v.new_empty(v.shape), final_state, *(q.new_empty(shape, dtype=dtype) for shape, dtype in saved)


def delta_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    do: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, beta, g and initial_state."""
    from glalm.kernels.triton import delta

    dq, dk, dv, dbeta, dg, dinitial_state = delta.backward(
        *(q, k, v, beta, g, scale, normalize, initial_state, cu_seqlens),
        delta.SavedForBackward(*saved),
        *(do, dfinal_state),
    )
    return dq, dk, dv, dbeta, common.tensor_or_empty(dg, q), common.tensor_or_empty(dinitial_state, q)


def delta_backward_fake(
    q, k, v, beta, g, scale, normalize, initial_state, cu_seqlens, saved, do, dfinal_state
) -> tuple[Tensor, ...]:
    """Return uninitialized tensors of the shapes and dtypes that delta_backward returns."""
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, beta, g, initial_state))


forward_operator = common.register_operator("delta_rule", delta_forward, delta_forward_fake)
backward_operator = common.register_operator("delta_rule_backward", delta_backward, delta_backward_fake)


# The chunkwise form in PyTorch ------------------------------------------------------------------------------


def compute_in_pytorch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return o and the final state or None."""
    if normalize:
        q = common.l2_normalize(q)
        k = common.l2_normalize(k)
    dtype = common.wide_dtype(q)
    g = torch.zeros_like(beta) if g is None else g
    g = g if g.dim() == 4 else g[..., None]
    inputs = [q.to(dtype) * scale, *(x.to(dtype) for x in (k, v, beta, g))]
    with common.without_autocast(q):
        o, state = common.map_sequences(compute_chunks, inputs, initial_state, output_final_state, cu_seqlens)
    return o.to(v.dtype), state


def compute_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor | None, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return o [B, T, H, V] and the final state [B, H, K, V].

    Args:
        q, k, v, beta, g: as for chunk_delta_rule, with scaled q and g [B, T, H, K or 1], in the dtype to compute in.
        S: [B, H, K, V], or None for zeros.
        sequence: [T], sequence_ids of packed sequences, or None.
    """
    B, T, H, K = q.shape
    V = v.shape[3]
    S = q.new_zeros(B, H, K, V) if S is None else S
    if T == 0:
        return common.empty_output(v, q, k, beta, g), S
    C = min(common.CHUNK if g.shape[3] == 1 else CHANNEL_GATE_CHUNK, T)
    n = (T + C - 1) // C
    # From [B, T, H, D] to [B, H, n, C, D]. Zeros in the padding leave the state unchanged.
    padded = (F.pad(x, (0, 0, 0, 0, 0, n * C - T)) for x in (q, k, v, beta[..., None], g))
    q, k, v, beta, g = (x.unflatten(1, (n, C)).permute(0, 3, 1, 2, 4) for x in padded)
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    # Gates are summed between every two tokens. A difference of two sums would lose its low bits after a strong gate,
    # and would be NaN after one of -inf.
    between = g[..., None, :].masked_fill(~causal.tril(-1)[..., None], 0).cumsum(3)
    decay = between.masked_fill(~causal[..., None], -torch.inf).exp()
    entering = g.cumsum(3).exp()
    leaving = between[:, :, :, -1].exp()
    if sequence is not None:
        same, enters, leaves = common.sequence_masks(sequence, C)
        decay = decay * same[..., None]
        entering = entering * enters
        leaving = leaving * leaves
    k_beta = k * beta
    through = entering[:, :, :, -1:].mT
    system = sum_products(k_beta, k, decay).tril(-1) + torch.eye(C, dtype=q.dtype, device=q.device)
    right_hand_sides = torch.cat([v * beta, k_beta * entering], -1)
    solution = torch.linalg.solve_triangular(system, right_hand_sides, upper=False, unitriangular=True)
    new, read = solution.split([V, K], -1)
    scores = sum_products(q, k, decay)
    q = q * entering
    carried = (k * leaving, new, read, through, S)
    u, starts, S = DeltaCarry.apply(*carried) if common.needs_gradient(*carried) else carry_operator(*carried)
    o = q @ starts + scores @ u
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), S


def sum_products(x: Tensor, y: Tensor, decay: Tensor) -> Tensor:
    """Return sum_c x_ic y_jc decay_ijc, [..., C, C], for x, y [..., C, K] and decay [..., C, C, K or 1]."""
    if decay.shape[-1] == 1:
        return x @ y.mT * decay.squeeze(-1)
    return (x[..., :, None, :] * y[..., None, :, :] * decay).sum(-1)


class DeltaCarry(torch.autograd.Function):
    """Differentiate carry_states by carry_states_backward."""

    @staticmethod
    def forward(ctx, k, new, read, through, S):
        u, starts, S = carry_operator(k, new, read, through, S)
        ctx.save_for_backward(k, read, through, u, starts)
        return u, starts, S

    @staticmethod
    def backward(ctx, du, dstarts, dS):
        common.refuse_transformed_gradients("chunk_delta_rule", du, dstarts, dS)
        inputs = (*ctx.saved_tensors, du, dstarts, dS)
        with torch.no_grad():
            grads = carry_backward_operator(*inputs)
        return common.refuse_double_backward("chunk_delta_rule", grads, inputs)


def carry_states(k: Tensor, new: Tensor, read: Tensor, through: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Carry the state from chunk to chunk: u_n = new_n - read_n S_n and S_{n+1} = through_n S_n + k_n^T u_n.

    The loop is a registered operator because a compiler would unroll it and take a second for every chunk.

    Args:
        k, read: [B, H, n, C, K].
        new: [B, H, n, C, V].
        through: [B, H, n, K or 1, 1].
        S: [B, H, K, V].

    Returns:
        u [B, H, n, C, V], the states that enter the chunks [B, H, n, K, V], and the final state.
    """
    u = new.new_empty(new.shape)
    starts = S.new_empty(*k.shape[:3], *S.shape[2:])
    with common.without_autocast(k):
        for n in range(k.shape[2]):
            starts[:, :, n] = S
            u[:, :, n] = new[:, :, n] - read[:, :, n] @ S
            S = S * through[:, :, n] + k[:, :, n].mT @ u[:, :, n]
    return u, starts, S


def carry_states_fake(k, new, read, through, S) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized tensors of the shapes and dtypes that carry_states returns."""
    return new.new_empty(new.shape), S.new_empty(*k.shape[:3], *S.shape[2:]), S.new_empty(S.shape)


def carry_states_backward(
    k: Tensor, read: Tensor, through: Tensor, u: Tensor, starts: Tensor, du: Tensor, dstarts: Tensor, dS: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of k, new, read, through and S."""
    dnew = du.new_empty(du.shape)
    dends = starts.new_empty(starts.shape)
    with common.without_autocast(k):
        for n in reversed(range(k.shape[2])):
            dends[:, :, n] = dS
            dnew[:, :, n] = du[:, :, n] + k[:, :, n] @ dS
            dS = dS * through[:, :, n] + dstarts[:, :, n] - read[:, :, n].mT @ dnew[:, :, n]
        dthrough = (dends * starts).sum_to_size(through.shape)
        return u @ dends.mT, dnew, -(dnew @ starts.mT), dthrough, dS


def carry_states_backward_fake(k, read, through, u, starts, du, dstarts, dS) -> tuple[Tensor, ...]:
    """Return uninitialized tensors of the shapes and dtypes that carry_states_backward returns."""
    return tuple(x.new_empty(x.shape) for x in (k, u, read, through, dS))


carry_operator = common.register_operator("delta_carry", carry_states, carry_states_fake)
carry_backward_operator = common.register_operator(
    "delta_carry_backward", carry_states_backward, carry_states_backward_fake
)
