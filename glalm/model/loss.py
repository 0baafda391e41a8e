"""Cross-entropy of a linear head, computed without the [tokens, vocabulary] matrix of logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm import IGNORE_INDEX
from glalm.kernels.common import at_least_float32, refuse_double_backward, refuse_transforms, wide_dtype
from glalm.kernels.cross_entropy import cross_entropy_
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
    loss = loss + z_loss * logits.logsumexp(-1)[scored].square().sum()
    return loss / scored.sum().clamp(min=1)


def head_token_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return token_losses of the head's weight, or the same from all logits if the head has to be called."""
    if is_plain_linear(head):
        return token_losses(hidden, head.weight, targets)
    logits = at_least_float32(head(hidden))
    return F.cross_entropy(logits.mT, targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="none")


def is_plain_linear(head: nn.Module) -> bool:
    """Return whether the head is described by its weight.

    It is not if peft replaced it by an adapter, or if a hook of accelerate loads its weight only while it is called.
    """
    return type(head) is nn.Linear and not hasattr(head, "_hf_hook")


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
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), z_loss, matmul_dtype(hidden))


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy in nats of each token, [...] float32, without gradient; 0 where it is IGNORE_INDEX."""
    refuse_transforms("token_losses", hidden, weight, alternative=ALTERNATIVE)
    flat_hidden = hidden.flatten(0, -2)
    flat_targets = targets.flatten()
    losses = [hidden.new_empty(0, dtype=torch.float32)]
    for rows in _chunk_rows(flat_hidden, weight):
        losses.append(cross_entropy_(F.linear(flat_hidden[rows], weight), flat_targets[rows], 0.0, False))
    return torch.cat(losses).view(targets.shape)


def _chunk_rows(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Divide the rows of hidden [tokens, d] into chunks with at most CHUNK_ELEMENTS logits."""
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradients, too: up to a scalar factor they are known as soon as the loss is."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, dtype):
        h = hidden.to(dtype)
        w = weight.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        is_float16 = dtype == torch.float16
        gradient_scale = FLOAT16_GRADIENT_SCALE if is_float16 else 1.0
        # Products with the scaled gradient may overflow float16.
        product_dtype = torch.float32 if is_float16 else dtype
        dhidden = torch.zeros_like(h, dtype=product_dtype) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide_dtype(weight)) if ctx.needs_input_grad[1] else None
        needs_gradient = dhidden is not None or dweight is not None
        for rows in _chunk_rows(h, w):
            logits = F.linear(h[rows], w)
            loss += cross_entropy_(logits, targets[rows], z_loss, needs_gradient, gradient_scale).sum()
            # cross_entropy_ has replaced the logits by their gradient.
            if dhidden is not None:
                _add_product(dhidden[rows], logits, w)
            if dweight is not None:
                _add_product(dweight, logits.T, h[rows])
        count = (targets != IGNORE_INDEX).sum().clamp(min=1)
        ctx.save_for_backward(dhidden, dweight, count, hidden, weight)
        ctx.gradient_scale = gradient_scale
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dhidden, dweight, count, *inputs = ctx.saved_tensors
        with torch.no_grad():
            # As a 0-dimensional tensor the factor would be rounded to bfloat16 with dhidden.
            scale = (grad / (count * ctx.gradient_scale)).view(1, 1)
            dhidden = None if dhidden is None else (dhidden * scale).to(ctx.dtypes[0])
            dweight = None if dweight is None else (dweight * scale).to(ctx.dtypes[1])
        grads = refuse_double_backward("linear_cross_entropy", (dhidden, dweight), (*inputs, grad), ALTERNATIVE)
        return *grads, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to total in place, in the precision of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
