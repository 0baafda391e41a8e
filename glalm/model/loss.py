"""Cross-entropy of a linear head without the [tokens, vocabulary] logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from glalm.kernels.common import at_least_float32, wide_dtype
from glalm.kernels.cross_entropy import IGNORE_INDEX, cross_entropy_
from glalm.model.precision import matmul_dtype

# Logits held at once: 256 MiB in bfloat16. Every chunk reads and writes the head's float32 gradient once, so that
# chunks of a tenth of this size would cost as much in that as the softmax itself.
CHUNK_ELEMENTS = 2**27


def head_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """linear_cross_entropy by the head's weight; of a head that is more than its weight, from all its logits."""
    if is_plain(head):
        return linear_cross_entropy(hidden, head.weight, targets, z_loss)
    logits = at_least_float32(head(hidden)).flatten(0, -2)
    targets = targets.flatten().to(logits.device)
    scored = targets != IGNORE_INDEX
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = loss + z_loss * logits.logsumexp(-1)[scored].square().sum()
    return loss / scored.sum().clamp(min=1)


def head_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """token_losses by the head's weight, or from its logits, as head_cross_entropy."""
    if is_plain(head):
        return token_losses(hidden, head.weight, targets)
    logits = at_least_float32(head(hidden))
    return F.cross_entropy(logits.mT, targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="none")


def is_plain(head: nn.Module) -> bool:
    """Whether the head is its weight alone: peft puts adapters in its place, and accelerate's hooks bring the weight
    only while the head is called."""
    return type(head) is nn.Linear and not hasattr(head, "_hf_hook")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of softmax(hidden weight^T) over the targets that are not IGNORE_INDEX.

    hidden: [..., d]; weight: [vocabulary, d]; targets: [...] int64. Returns a float32 scalar (0 when nothing is
    scored), plus z_loss times the mean of logsumexp(logits)^2 (Chowdhery et al., arXiv 2204.02311, section 5). The
    logits are made a chunk of tokens at a time, and the gradient with them, so that the memory beyond the inputs and
    their gradients does not grow with tokens times vocabulary. Under autocast the products are in its dtype; the
    weight's gradient is summed over the chunks in float32.
    """
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), z_loss, matmul_dtype(hidden))


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each token, [...] float32, without gradient; 0 where the target is IGNORE_INDEX."""
    with torch.no_grad():
        flat, goal = hidden.flatten(0, -2), targets.flatten()
        losses = [cross_entropy_(F.linear(flat[c], weight), goal[c], 0.0, False) for c in _chunks(flat, weight)]
        return torch.cat(losses).view(targets.shape)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(i, i + size) for i in range(0, hidden.shape[0], size)]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is known as soon as the loss is (up to the scalar that comes back), so it is made in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, dtype):
        h, w = hidden.to(dtype), weight.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        dhidden = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide_dtype(weight)) if ctx.needs_input_grad[1] else None
        for c in _chunks(h, w):
            logits = F.linear(h[c], w)
            loss += cross_entropy_(logits, targets[c], z_loss, dhidden is not None or dweight is not None).sum()
            if dhidden is not None:
                torch.mm(logits, w, out=dhidden[c])
            if dweight is not None:
                _add_product(dweight, logits.T, h[c])
        count = (targets != IGNORE_INDEX).sum().clamp(min=1)
        ctx.save_for_backward(dhidden, dweight, count)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dhidden, dweight, count = ctx.saved_tensors
        scale = (grad / count).view(1, 1)  # a matrix: as a scalar it would be rounded to bfloat16 with dhidden
        return (
            None if dhidden is None else (dhidden * scale).to(ctx.dtypes[0]),
            None if dweight is None else (dweight * scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
