"""Cross-entropy of logits, and its gradient in their place."""

import torch
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.kernels.common import at_least_float32


def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float, gradient: bool) -> Tensor:
    """Each token's -log softmax(logits)[target] + z_loss * logsumexp(logits)^2, float32 [N]; 0 for IGNORE_INDEX.

    logits: [N, vocabulary], contiguous; targets: [N] int64. With `gradient`, the logits are overwritten with the
    derivative of the sum of what is returned: the caller's matmuls need no third buffer of that size. A target that
    is neither a token nor IGNORE_INDEX is a RuntimeError on the CPU; on CUDA, where finding it would wait for the
    device, its loss is NaN.
    """
    if logits.is_cuda:
        from glalm.kernels.triton.cross_entropy import cross_entropy_ as fused  # Triton is not on every machine

        return fused(logits, targets, z_loss, gradient)
    x = at_least_float32(logits)
    scored = targets != IGNORE_INDEX
    goal = targets.where(scored, 0)[:, None]
    lse = x.logsumexp(-1, keepdim=True)
    losses = (lse - x.gather(1, goal) + z_loss * lse**2).squeeze(1)
    if gradient:
        x.sub_(lse).exp_().mul_(1 + 2 * z_loss * lse)
        x.scatter_add_(1, goal, -torch.ones_like(lse))
        logits.copy_(x.masked_fill_(~scored[:, None], 0))
    return losses.where(scored, 0).float()
