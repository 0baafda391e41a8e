"""Cross-entropy and its gradient in one kernel, which reads each row of logits twice and writes it once.

The second reading hits the L2 cache if the rows of all running programs fit in it. With four programs on each
multiprocessor of an H100 or H200, its 50 MB hold rows of about 50,000 bfloat16 logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.kernels.triton.launch import launch

IGNORE = tl.constexpr(IGNORE_INDEX)
# Finite, so that a lane without a column computes exp(0) rather than exp(inf - inf).
LOWEST = tl.constexpr(-1e38)
BLOCK = 4096


def cross_entropy_(
    logits: Tensor, targets: Tensor, z_loss: float, gradient: bool, gradient_scale: float = 1.0
) -> Tensor:
    """Compute glalm.kernels.cross_entropy.cross_entropy_ on CUDA tensors."""
    N, V = logits.shape
    losses = torch.empty(N, device=logits.device, dtype=torch.float32)
    targets = targets.contiguous()
    constants = {"V": V, "BLOCK": min(BLOCK, triton.next_power_of_2(V)), "GRADIENT": gradient}
    arguments = (logits, targets, losses, float(z_loss), float(gradient_scale))
    launch(cross_entropy_kernel, N, arguments, constants, {"num_warps": 8})
    return losses


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, z_loss, gradient_scale, V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    """Store the loss of one token in each program and, with GRADIENT, overwrite its logits by the gradient.

    A target out of range gives a loss of NaN, and NaN gradients.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    if target == IGNORE:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
                tl.store(logits + start + columns, zeros, mask=start + columns < V)
        return
    is_in_vocabulary = (target >= 0) & (target < V)
    target_logit = tl.load(logits + target, mask=is_in_vocabulary, other=float("nan")).to(tl.float32)
    maxima = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    # Each element of the block keeps a maximum and a sum of its own. They are combined once, after the loop.
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < V, other=LOWEST).to(tl.float32)
        new_maxima = tl.maximum(maxima, x)
        total = total * tl.exp(maxima - new_maxima) + tl.exp(x - new_maxima)
        maxima = new_maxima
    maximum = tl.max(maxima, 0)
    lse = maximum + tl.log(tl.sum(total * tl.exp(maxima - maximum), 0))
    tl.store(losses + row, lse - target_logit + z_loss * lse * lse)
    if GRADIENT:
        factor = tl.where(is_in_vocabulary, 1 + 2 * z_loss * lse, float("nan"))
        for start in range(0, V, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < V, other=LOWEST).to(tl.float32)
            d = (tl.exp(x - lse) * factor - tl.where(start + columns == target, 1.0, 0.0)) * gradient_scale
            tl.store(logits + start + columns, d.to(logits.dtype.element_ty), mask=start + columns < V)
