"""Cross-entropy of logits, with its gradient computed in place."""

import torch
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.kernels.common import at_least_float32


def cross_entropy_(
    logits: Tensor, targets: Tensor, z_loss: float, gradient: bool, gradient_scale: float = 1.0
) -> Tensor:
    """Return the loss of every token, and overwrite the logits with the gradient of the losses' sum if asked to.

    The loss is -log softmax(logits)[target] + z_loss * logsumexp(logits)^2. Since the gradient takes the place of the
    logits, the caller's matmuls need no further buffer of that size.

    Args:
        logits: [N, vocabulary], contiguous.
        targets: [N], int64, tokens or IGNORE_INDEX.
        z_loss: the factor of logsumexp^2 (arXiv 2204.02311, section 5).
        gradient: whether to overwrite the logits.
        gradient_scale: a factor of the gradient, so that small values of it are not rounded to 0 in float16.

    Returns:
        float32 [N]; 0 where the target is IGNORE_INDEX. On CUDA, the loss of any other target outside the vocabulary
        is NaN, because raising an error would make the host wait for the device.

    Raises:
        RuntimeError: on the CPU, a target is outside the vocabulary and not IGNORE_INDEX.
    """
    if logits.is_cuda:
        from glalm.kernels.triton import cross_entropy  # A machine without a GPU may lack Triton.

        return cross_entropy.cross_entropy_(logits, targets, z_loss, gradient, gradient_scale)
    x = at_least_float32(logits)
    counted = targets != IGNORE_INDEX
    columns = targets.where(counted, 0)[:, None]
    lse = x.logsumexp(-1, keepdim=True)
    losses = (lse - x.gather(1, columns) + z_loss * lse**2).squeeze(1)
    if gradient:
        x.sub_(lse).exp_().mul_(1 + 2 * z_loss * lse)
        x.scatter_add_(1, columns, -torch.ones_like(lse))
        logits.copy_(x.mul_(gradient_scale).masked_fill_(~counted[:, None], 0))
    return losses.where(counted, 0).float()
