"""Helpers that the operators share: dtypes, gates, packed sequences, input checks, and registration with PyTorch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

CHUNK = 64  # tokens
AnyFunction = TypeVar("AnyFunction", bound=Callable)
Gate = TypeVar("Gate", Tensor, Tensor | None)


def constant_when_compiled(function: AnyFunction) -> AnyFunction:
    """Let Dynamo call a function while it traces, and treat the result as a constant.

    This is torch.compiler.assume_constant_result without its import of torch._dynamo, which takes as long as all of
    torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Only Dynamo knows this attribute.
    return function


# Dtypes and devices -----------------------------------------------------------------------------------------


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that operators compute in and store states in: float64 for float64 tensors, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert x to float32 unless it is float64, for values that autocast or half-precision weights must not round."""
    return x.to(wide_dtype(x))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of x: that of autocast if it applies to x, else its own."""
    device = x.device.type
    # Autocast leaves float64 alone.
    cast = x.dtype != torch.float64 and has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


@constant_when_compiled  # Dynamo in torch 2.11 does not trace torch's function.
def has_autocast(device: str) -> bool:
    """Return whether autocast supports this type of device."""
    return torch.amp.is_autocast_available(device)


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which autocast leaves operations on x's device alone."""
    device = x.device.type if has_autocast(x.device.type) else "cpu"  # Meta tensors' device has none.
    return torch.autocast(device, enabled=False)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device is a GPU that computes in bfloat16 without emulating it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def multiplies_exactly(x: Tensor) -> bool:
    """Return whether the user asks for matrix products of x in all of float32's precision, rather than in TF32.

    torch.set_float32_matmul_precision changes this setting, too, while torch.get_float32_matmul_precision does not see,
    or refuses to return, what was written to it directly.
    """
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def l2_normalize(x: Tensor) -> Tensor:
    """Return x / |x| along the last axis, and 0 for x = 0.

    The gradient is a difference of two products that may nearly cancel, so it is rounded to x's dtype only once.
    """
    wide = at_least_float32(x)
    return (wide * wide.square().sum(-1, keepdim=True).add(1e-6).rsqrt()).to(x.dtype)


_assumes_gpu = False


def has_kernel(q: Tensor) -> bool:
    """Return whether the Triton kernels can serve q: it is on a CUDA device and not float64."""
    return (q.is_cuda or _assumes_gpu) and q.dtype != torch.float64


@contextmanager
def assume_gpu() -> Iterator[None]:
    """Let operators take every tensor for one on a GPU. Give them fake tensors only, which no kernel computes."""
    global _assumes_gpu
    _assumes_gpu = True
    try:
        yield
    finally:
        _assumes_gpu = False


def heads_per_group(q: Tensor, k: Tensor) -> int:
    """Return how many heads of q [B, T, H, K] share each head of k [B, T, H_kv, K]."""
    return max(1, q.shape[2]) // max(1, k.shape[2])


# Gates ------------------------------------------------------------------------------------------------------


def expand_gate(g: Tensor | None, k: Tensor) -> Tensor:
    """Expand a gate [B, T, H, K], [B, T, H], [H] or None (a log gate of 0) to k's [B, T, H, K] without a copy."""
    if g is None:
        return k.new_zeros((), dtype=wide_dtype(k)).expand(k.shape)
    return (g if g.dim() == 4 else g[..., None]).expand(k.shape)


def log_gate(g: Gate, normalizer: float | None) -> Gate:
    """Return logsigmoid(g) / normalizer in at least float32. Without a normalizer, g is the log gate already."""
    if g is None or normalizer is None:
        return g
    return F.logsigmoid(at_least_float32(g)) / normalizer


def gate_has_gradient(g: Tensor | None) -> bool:
    """Return whether g depends on the token and so gets a gradient. A fixed decay per head, [H], does not."""
    return g is not None and g.dim() > 1


def retention_gate(k: Tensor) -> Tensor:
    """Return RetNet's fixed log gate of every head of k, log(1 - 2^(-5-h)), [H], in k's wide_dtype."""
    H = k.shape[2] if k.dim() == 4 else 0  # check_inputs rejects other ranks.
    heads = torch.arange(H, device=k.device, dtype=wide_dtype(k))
    return torch.log1p(-torch.exp2(-5 - heads))


def gate_gradient(dg: Tensor, g: Tensor | None, normalizer: float | None) -> Tensor | None:
    """Convert the gradient of log gates per key channel, [B, T, H, K], to that of g, or None without one."""
    if g is None or not gate_has_gradient(g):
        return None
    if g.dim() == 3:
        dg = dg.sum(-1)
    if normalizer is not None:
        dg = dg * torch.sigmoid(-g.to(dg.dtype)) / normalizer
    return dg.to(g.dtype)


# No tokens --------------------------------------------------------------------------------------------------


def empty_output(v: Tensor, *others: Tensor | None) -> Tensor:
    """Return an output like v [B, 0, ...], through which autograd gives v and each other input a gradient of zeros.

    Without a path from the output to an input, the input would have no gradient at all.
    """
    return v + sum(x.sum() for x in others if x is not None)


# Packed sequences -------------------------------------------------------------------------------------------


def sequence_ids(cu_seqlens: Tensor, T: int) -> Tensor:
    """Return the index of the packed sequence that each token belongs to, [T]."""
    tokens = torch.arange(T, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True)


def map_sequences(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Apply function(*inputs, state, sequence) -> (o, state) to a batch or to packed sequences.

    Without states, packed sequences take one call, whose `sequence` [T] holds each token's sequence_ids. With states,
    each sequence takes a call of its own with its row of the states, which reads cu_seqlens on the host.

    Args:
        inputs: [B, T, ...] each; B is 1 for packed sequences.
        initial_state: [N, ...], or None for zeros.
        cu_seqlens: [N + 1], or None for a batch of N = B sequences.

    Returns:
        o [B, T, ...], and the final states [N, ...] if output_final_state, else None.
    """
    if cu_seqlens is None or (initial_state is None and not output_final_state):
        sequence = None if cu_seqlens is None else sequence_ids(cu_seqlens, inputs[0].shape[1])
        o, state = function(*inputs, initial_state, sequence)
        return o, state if output_final_state else None
    bounds = list(pairwise(cu_seqlens.tolist()))
    initial_states = [None] * len(bounds) if initial_state is None else initial_state.split(1)
    results = []
    for (start, end), state in zip(bounds, initial_states, strict=True):
        results.append(function(*(x[:, start:end] for x in inputs), state, None))
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, 1), torch.cat(states) if output_final_state else None


def sequence_masks(sequence: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks that confine a chunkwise operator to one packed sequence.

    Args:
        sequence: [T], as sequence_ids returns it.
        chunk: tokens in a chunk; T is padded to n chunks.

    Returns:
        Whether two tokens of a chunk belong to the same sequence [n, chunk, chunk]; whether a token belongs to the
        sequence whose state enters its chunk [n, chunk, 1]; and to the one whose state leaves it [n, chunk, 1].
    """
    ids = F.pad(sequence, (0, -len(sequence) % chunk), value=-1).view(-1, chunk, 1)
    last = ids[:, -1:]
    entering = torch.cat([ids[:1, :1], last[:-1]])
    return ids == ids.mT, ids == entering, ids == last


# Input checks. Every error is a ValueError whose message begins with the name of the argument. ---------------


def check_shape(name: str, x: Tensor, axes: str, sizes: dict[str, int]) -> None:
    """Check that x has one dimension per letter of `axes`, of the size that `sizes` has for the letter."""
    expected = tuple([sizes[axis] for axis in axes])
    if x.shape != expected:
        raise ValueError(f"{name}: expected the shape [{', '.join(axes)}] = {list(expected)}, got {list(x.shape)}")


def check_named(
    named: dict[str, tuple[Tensor | None, str]], sizes: dict[str, int], x: Tensor, cu_seqlens: Tensor | None
) -> None:
    """Check that tensors, if they exist, have a floating-point dtype, the device of x, and the axes beside them."""
    for name, (tensor, axes) in named.items():
        if tensor is not None:
            check_shape(name, tensor, axes, sizes)
            if not tensor.is_floating_point():
                raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    for name, (tensor, _) in {**named, "cu_seqlens": (cu_seqlens, "")}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on the device of x, {x.device}, got one on {tensor.device}")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    gate_axes: str = "BTHK",
    normalizer: float | None = None,
    grouped: bool = False,
) -> None:
    """Check shapes, dtypes and devices. No value of a tensor is read, so this also runs while a compiler traces.

    Where `grouped`, k, v, g and the states may have fewer heads than q, a divisor of theirs. `normalizer` is the
    divisor of a gate's logits, if there is one.
    """
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"q: expected the shape [B, T, H, K] with K > 0, got {list(q.shape)}")
    device = q.device
    tensors = {"k": k, "v": v, "g": g, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, got a {type(x).__name__}")
        if x is not None and x.device != device:
            raise ValueError(f"{name}: expected a tensor on the device of q, {device}, got one on {x.device}")

    B, T, H, K = q.shape
    if grouped and k.dim() == 4 and k.shape[2] != H:
        if k.shape[2] == 0 or H % k.shape[2] != 0:
            raise ValueError(f"k: expected as many heads as q, {H}, or a divisor of that, got {k.shape[2]}")
        H = k.shape[2]
    if k.shape != (B, T, H, K):
        expected = f"the shape of q, {list(q.shape)}" + ", or fewer heads" * grouped
        raise ValueError(f"k: expected {expected}, got {list(k.shape)}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected the shape [{B}, {T}, {H}, V], as k is {list(k.shape)}, got {list(v.shape)}")
    sizes = {"B": B, "T": T, "H": H, "K": K, "V": v.shape[3], "N": B}
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B)
        sizes["N"] = cu_seqlens.shape[0] - 1
    if g is not None:
        check_shape("g", g, gate_axes, sizes)
    if initial_state is not None:
        check_shape("initial_state", initial_state, "NHKV", sizes)
    check_dtypes(q, k, v, g, initial_state)
    if normalizer is not None and not normalizer > 0:
        raise ValueError(f"gate_logit_normalizer: expected a number above 0, got {normalizer}")


def check_dtypes(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None) -> None:
    """Check that k and v have the dtype of q, the states that of sums over them, and g any floating-point one."""
    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating-point dtype, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}; only g may differ")
    if g is not None and not g.is_floating_point():
        raise ValueError(f"g: expected a floating-point dtype, got {g.dtype}")
    if initial_state is not None and initial_state.dtype != wide_dtype(q):
        raise ValueError(f"initial_state: expected {wide_dtype(q)}, as q is {q.dtype}, got {initial_state.dtype}")


def check_cu_seqlens(cu_seqlens: Tensor, B: int) -> None:
    """Check the dtype and shape of packed sequences' bounds, and that they are packed into B = 1 row."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: expected a tensor, got a {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens: expected the bounds [0, ..., T] of at least one sequence, one-dimensional, "
            f"got the shape {list(cu_seqlens.shape)}"
        )
    if B != 1:
        raise ValueError(f"cu_seqlens: expected all sequences packed into one row (B = 1), got B = {B}")


def check_values(
    g: Tensor | None,
    q: Tensor,
    cu_seqlens: Tensor | None,
    expected: str = "g: expected log forget gates <= 0 (apply logsigmoid first)",
) -> None:
    """Check that log gates are <= 0, as `expected`, and that cu_seqlens runs from 0 to T without decreasing.

    This runs on the CPU only: on an accelerator, reading a value would make the host wait for the device. It is also
    skipped where there are no values: while a compiler or a dispatch mode traces, and under torch.func. NaN gates pass.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(q, FakeTensor) or functorch_transform():
        return
    if torch._C._len_torch_dispatch_stack() > 0:
        return
    if g is not None and g.numel() and g.max() > 0:
        raise ValueError(f"{expected}, got a maximum of {g.max():.3g}")
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        T = q.shape[1]
        if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens: expected non-decreasing bounds from 0 to T = {T}, got {bounds}")


# Registration and differentiation ---------------------------------------------------------------------------


def register_operator(name: str, function: Callable, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Register a function on every device as the torch.library operator glalm::<name>, and return the operator.

    torch.compile traces the operator as one node, and selective activation checkpointing recognizes its namespace. The
    operator has no derivative of its own: an autograd.Function calls it, through which Dynamo traces. Called elsewhere
    on tensors that require a gradient, the operator raises a RuntimeError instead of losing the gradient.

    In plain eager mode, where nothing could observe the operator, the function is called directly: the dispatcher takes
    0.05 ms per call. torch.library.custom_op would take another 0.5 ms in torch 2.11, longer than the kernels of a
    small layer.

    Args:
        function: the implementation, with annotated arguments. It returns tensors that share no memory with them.
        fake: a function of the same arguments that returns uninitialized tensors of the results' shapes and dtypes.
        mutates: the names of the arguments that `function` writes to.
    """

    def refuse_gradients(implementation: Callable) -> Callable:
        def call(*args):
            if needs_gradient(*args):
                raise RuntimeError(
                    f"glalm::{name} has no derivative, and an argument requires a gradient. Call the public operator "
                    "of glalm.kernels, or this one under torch.no_grad()."
                )
            return implementation(*args)

        return call

    schema = torch.library.infer_schema(function, mutates_args=mutates)
    torch.library.define(f"glalm::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    eager = refuse_gradients(function)
    torch.library.impl(f"glalm::{name}", "default", eager)
    operator = getattr(torch.ops.glalm, name).default
    torch.library.register_fake(operator, refuse_gradients(fake))

    def call(*args):
        x = args[0]
        # A compiler, a dispatch mode, a transform or a tensor subclass could see which operators run. On the meta
        # device, only the operator's fake knows the shapes.
        is_observed = (
            torch.compiler.is_compiling()
            or x.is_meta
            or type(x) not in (Tensor, torch.nn.Parameter)
            or torch._C._len_torch_dispatch_stack() > 0
            or functorch_transform() is not None
        )
        return operator(*args) if is_observed else eager(*args)

    return call


def tensor_or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Return x, or in its place an empty tensor on the device of `like`. Registered operators return only tensors."""
    return like.new_empty(0) if x is None else x


def gradient_of(x: Tensor | None, grad: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient of x in its dtype, or an empty tensor on the device of `like` if x is None."""
    return like.new_empty(0) if x is None or grad is None else grad.to(x.dtype).contiguous()


def needs_gradient(*args) -> bool:
    """Return whether autograd would record an operation on these arguments."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


FUNCTORCH_TRANSFORMS = {
    "Grad": "torch.func.grad or torch.func.vjp",
    "Vmap": "torch.func.vmap",
    "Jvp": "torch.func.jvp",
    "Functionalize": "torch.func.functionalize",
}


@constant_when_compiled
def functorch_transform() -> str | None:
    """Return the name of the innermost torch.func transform that is running, or None."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return None if interpreter is None else FUNCTORCH_TRANSFORMS[interpreter.key().name]


def active_transform(*tensors: Tensor | None) -> str | None:
    """Return the name of the transform that differentiates or batches `tensors` other than by .backward(), or None."""
    transform = functorch_transform()
    # Outside of forward_ad.dual_level(), the level is -1. Asking each tensor would take 2 us per call of an operator.
    if transform is not None or forward_ad._current_level < 0:
        return transform
    # While a compiler traces, no tensor has a tangent yet.
    if torch.compiler.is_compiling() or any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        return "forward-mode automatic differentiation"
    return None


def refuse_transforms(
    name: str, *tensors: Tensor | None, alternative: str | None = None, in_backward: bool = False
) -> None:
    """Raise NotImplementedError inside a transform for which the operator `name` has no rule.

    Without this check, forward-mode differentiation would lose the tangent in silence, and torch.func would fail with
    a message about PyTorch's internals. Rules for the transforms would cost every layer 0.1 ms of host time.

    A backward pass needs a check of its own, because it can run in a transform without its forward pass:
    torch.autograd.grad in one is an example, and its option is_grads_batched, which batches by a mechanism of its own,
    is another.
    """
    transform = active_transform(*tensors)
    if in_backward and not torch.compiler.is_compiling():
        is_batched = torch._C._functorch.is_legacy_batchedtensor
        if any(x is not None and is_batched(x) for x in tensors):
            transform = "torch.autograd.grad(is_grads_batched=True)"
    if transform is not None:
        raise NotImplementedError(
            f"{name} does not support {transform}. Call it without the transform and compute gradients by .backward() "
            f"or torch.autograd.grad{f', or use {alternative}' if alternative else ''}."
        )


refuse_transformed_gradients = partial(refuse_transforms, in_backward=True)


def refuse_double_backward(
    name: str, grads: tuple, inputs: tuple[Tensor | None, ...], alternative: str | None = None
) -> tuple:
    """Return what the backward pass of the operator `name` computed, so that differentiating it raises an error.

    Autograd's once_differentiable would return constants where the gradient of the output is one, and so lose the
    second derivative in silence.

    Args:
        grads: the computed gradients, without a graph.
        inputs: every tensor that they depend on, as autograd knows it. autograd.grad runs only the nodes that lead to
            the tensors it differentiates by, so the node that raises must lead to all of these.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    refuse_transforms(name, *inputs, alternative=alternative)
    message = f"{name} does not support double backward (the gradient of a gradient)."
    return _RefuseDoubleBackward.apply(f"{message} Use {alternative}." if alternative else message, grads, *inputs)


class _RefuseDoubleBackward(torch.autograd.Function):
    """Return the gradients unchanged, and raise NotImplementedError in the backward pass."""

    @staticmethod
    def forward(ctx, message, grads, *inputs):
        ctx.message = message
        return grads

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(ctx.message)
