"""Cross-entropy of a linear head, computed without the [tokens, vocabulary] matrix of logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm import IGNORE_INDEX
from glalm.kernels.common import (
    at_least_float32,
    matmul_dtype,
    needs_gradient,
    refuse_double_backward,
    refuse_transforms,
)
from glalm.kernels.cross_entropy import scale_of_gradients, token_losses_operator
from glalm.model.plain import is_plain_linear

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
    return losses.sum() / (targets != IGNORE_INDEX).sum().clamp(min=1)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy in nats of each token, [...] float32, without gradient; 0 where it is IGNORE_INDEX."""
    refuse_transforms("token_losses", hidden, weight, alternative=ALTERNATIVE)
    args = (hidden.flatten(0, -2), weight, targets.flatten(), 0.0, matmul_dtype(hidden))
    losses, _, _ = token_losses_operator(*args, False, False)
    return losses.view(targets.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradients, too: up to a scalar factor they are known as soon as the loss is."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, dtype, hidden_gradient, weight_gradient):
        losses, dhidden, dweight = token_losses_operator(
            hidden, weight, targets, z_loss, dtype, hidden_gradient, weight_gradient
        )
        count = (targets != IGNORE_INDEX).sum().clamp(min=1)
        ctx.save_for_backward(dhidden, dweight, count, hidden, weight)
        ctx.gradient_scale = scale_of_gradients(dtype)
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
