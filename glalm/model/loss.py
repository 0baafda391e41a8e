"""Cross-entropy of a linear head without the [tokens, vocabulary] logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not scored, as everywhere in PyTorch
CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MiB in float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of softmax(hidden weight^T) over the targets that are not IGNORE.

    hidden: [..., d]; weight: [vocabulary, d]; targets: [...] int64. Returns a float32 scalar (0 when nothing is
    scored). The logits are made a chunk of tokens at a time, and the gradient with them, so that the memory beyond
    the inputs and their gradients does not grow with tokens times vocabulary.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if _autocast(hidden) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2).to(dtype), weight.to(dtype), targets.flatten())


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each token, [...] float32, without gradient; 0 where the target is IGNORE."""
    with torch.no_grad():
        flat, goal = hidden.flatten(0, -2), targets.flatten()
        losses = [
            F.cross_entropy(F.linear(flat[c], weight).float(), goal[c], reduction="none", ignore_index=IGNORE)
            for c in _chunks(flat, weight)
        ]
        return torch.cat(losses).view(targets.shape)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(i, i + size) for i in range(0, hidden.shape[0], size)]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is known as soon as the loss is (up to the scalar that comes back), so it is made in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        count = (targets != IGNORE).sum().clamp(min=1)
        loss = hidden.new_zeros((), dtype=torch.float32)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for c in _chunks(hidden, weight):
            logits = F.linear(hidden[c], weight).float()
            loss += F.cross_entropy(logits, targets[c], ignore_index=IGNORE, reduction="sum")
            if dhidden is None and dweight is None:
                continue
            scored = (targets[c] != IGNORE)[:, None]
            dlogits = logits.softmax(-1)
            dlogits.scatter_add_(1, targets[c].clamp(min=0)[:, None], -torch.ones_like(dlogits[:, :1]))
            dlogits = (dlogits * scored / count).to(hidden.dtype)
            if dhidden is not None:
                dhidden[c] = dlogits @ weight
            if dweight is not None:
                dweight += dlogits.T @ hidden[c]
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else dhidden * grad.to(dhidden.dtype),
            None if dweight is None else (dweight * grad).to(ctx.weight_dtype),
            None,
        )
