"""Cross-entropy of a linear head, computed without the [tokens, vocabulary] matrix of logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm import IGNORE_INDEX
from glalm.kernels.common import (
    at_least_float32,
    needs_gradient,
    refuse_double_backward,
    refuse_transforms,
    register_operator,
    wide_dtype,
)
from glalm.kernels.cross_entropy import cross_entropy_
from glalm.model.plain import is_plain_linear
from glalm.model.precision import matmul_dtype

# The largest number of logits in memory: 256 MiB in bfloat16. Every chunk reads and writes the float32 gradient of the
# head once; in chunks of a tenth of this size, that would take as long as the softmax itself.
CHUNK_ELEMENTS = 2**27
# The gradient of the logits is computed before the scale of the loss, which would carry it through float16, is known.
# With this factor, probabilities down to 1.5e-8 keep float16's full precision, and the gradient does not overflow.
FLOAT16_GRADIENT_SCALE = 2.0**12
ALTERNATIVE = "torch.nn.functional.cross_entropy of the logits"


def head_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Return what linear_cross_entropy does, but from all logits at once if the head is not a plain nn.Linear."""
    if is_plain_linear(head):
        return linear_cross_entropy(hidden, head.weight, targets, z_loss)
    logits = at_least_float32(head(hidden)).flatten(0, -2)
    targets = targets.flatten().to(logits.device)
    scored = targets != IGNORE_INDEX
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = loss + z_loss * logits.logsumexp(-1).where(scored, 0).square().sum()
    return loss / scored.sum().clamp(min=1)


def head_token_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return token_losses of the head's weight, or the same from all logits if the head has to be called."""
    if is_plain_linear(head):
        return token_losses(hidden, head.weight, targets)
    logits = at_least_float32(head(hidden))
    return F.cross_entropy(logits.mT, targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="none")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of softmax(hidden weight^T) over the targets that are not IGNORE_INDEX.

    The logits and their gradient are computed one chunk of tokens at a time, so the memory beyond the inputs and their
    gradients does not grow with tokens times vocabulary. Under autocast the products are in its dtype, while the
    gradient of the weight is summed over the chunks in float32.

    Args:
        hidden: [..., d].
        weight: [vocabulary, d].
        targets: [...], int64.
        z_loss: a factor for the mean of logsumexp(logits)^2, which is added (Chowdhery et al., arXiv 2204.02311,
            section 5).

    Returns:
        A float32 scalar in nats; 0 if there are no targets.
    """
    refuse_transforms("linear_cross_entropy", hidden, weight, alternative=ALTERNATIVE)
    args = (hidden.flatten(0, -2), weight, targets.flatten(), z_loss, matmul_dtype(hidden))
    if needs_gradient(hidden, weight):
        return _LinearCrossEntropy.apply(*args, hidden.requires_grad, weight.requires_grad)
    losses, _, _ = token_losses_operator(*args, False, False)
    return losses.sum() / _count_scored(args[2])


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy in nats of each token, [...] float32, without gradient; 0 where it is IGNORE_INDEX."""
    refuse_transforms("token_losses", hidden, weight, alternative=ALTERNATIVE)
    args = (hidden.flatten(0, -2), weight, targets.flatten(), 0.0, matmul_dtype(hidden))
    losses, _, _ = token_losses_operator(*args, False, False)
    return losses.view(targets.shape)


def _count_scored(targets: Tensor) -> Tensor:
    """Return the number of targets that are not IGNORE_INDEX, but at least 1."""
    return (targets != IGNORE_INDEX).sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradients, too: up to a scalar factor they are known as soon as the loss is."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, dtype, hidden_gradient, weight_gradient):
        losses, dhidden, dweight = token_losses_operator(
            hidden, weight, targets, z_loss, dtype, hidden_gradient, weight_gradient
        )
        count = _count_scored(targets)
        ctx.save_for_backward(dhidden, dweight, count, hidden, weight)
        ctx.gradient_scale = gradient_scale(dtype)
        ctx.hidden_dtype = hidden.dtype if hidden_gradient else None
        ctx.weight_dtype = weight.dtype if weight_gradient else None
        return losses.sum() / count

    @staticmethod
    def backward(ctx, grad):
        dhidden, dweight, count, *inputs = ctx.saved_tensors
        with torch.no_grad():
            # As a 0-dimensional tensor the factor would be rounded to bfloat16 with dhidden.
            scale = (grad / (count * ctx.gradient_scale)).view(1, 1)
            dhidden = None if ctx.hidden_dtype is None else (dhidden * scale).to(ctx.hidden_dtype)
            dweight = None if ctx.weight_dtype is None else (dweight * scale).to(ctx.weight_dtype)
        grads = refuse_double_backward("linear_cross_entropy", (dhidden, dweight), (*inputs, grad), ALTERNATIVE)
        return *grads, None, None, None, None, None


# The registered operator, so that torch.compile does not trace how the logits are computed chunk by chunk. ----------


def compute_token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    dtype: torch.dtype,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of every token, and the gradients of the losses' sum times gradient_scale(dtype).

    Args:
        hidden: [N, d].
        weight: [vocabulary, d].
        targets: [N], int64.
        z_loss: as of linear_cross_entropy.
        dtype: that of the matrix products.
        hidden_gradient, weight_gradient: which gradients to compute.

    Returns:
        The losses in nats [N], float32; the gradients of hidden [N, d], in `dtype` but float32 for float16, and of
        weight [vocabulary, d], in at least float32. A gradient that is not asked for is an empty tensor.
    """
    args = (hidden, weight, targets, z_loss, dtype, hidden_gradient, weight_gradient)
    losses, dhidden, dweight = token_losses_fake(*args)
    dweight.zero_()
    h = hidden.to(dtype)
    w = weight.to(dtype)
    scale = gradient_scale(dtype)
    for rows in _chunk_rows(h, w):
        logits = F.linear(h[rows], w)
        losses[rows] = cross_entropy_(logits, targets[rows], z_loss, hidden_gradient or weight_gradient, scale)
        # With a gradient, cross_entropy_ has replaced the logits by it.
        if hidden_gradient:
            _store_product(dhidden[rows], logits, w)
        if weight_gradient:
            _add_product(dweight, logits.T, h[rows])
    return losses, dhidden, dweight


def token_losses_fake(
    hidden, weight, targets, z_loss, dtype, hidden_gradient, weight_gradient
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized tensors of the shapes and dtypes that compute_token_losses returns."""
    # Products with the scaled gradient may overflow float16.
    hidden_dtype = torch.float32 if dtype == torch.float16 else dtype
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape if hidden_gradient else 0, dtype=hidden_dtype)
    dweight = weight.new_empty(weight.shape if weight_gradient else 0, dtype=wide_dtype(weight))
    return losses, dhidden, dweight


def gradient_scale(dtype: torch.dtype) -> float:
    """Return the factor of the gradients that compute_token_losses returns for matrix products in `dtype`."""
    return FLOAT16_GRADIENT_SCALE if dtype == torch.float16 else 1.0


def _chunk_rows(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Divide the rows of hidden [tokens, d] into chunks with at most CHUNK_ELEMENTS logits."""
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def _store_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Store a b in out, in the precision of out."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to total in place, in the precision of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


token_losses_operator = register_operator("token_losses", compute_token_losses, token_losses_fake)
