"""The cross-entropy of a linear head, chunk by chunk, with gradients that are computed in the forward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.kernels.common import at_least_float32, has_kernel, register_operator, wide_dtype

# The largest number of logits in memory: 256 MiB in bfloat16. Every chunk reads and writes the float32 gradient of the
# head once; in chunks of a tenth of this size, that would take as long as the softmax itself.
CHUNK_ELEMENTS = 2**27
# The forward pass computes the logits' gradient, when GradScaler's factor, which keeps a gradient from underflowing in
# float16, is not known yet. With this factor in its place, probabilities down to 1.5e-8 keep float16's full precision,
# and the gradient does not overflow.
FLOAT16_GRADIENT_SCALE = 2.0**12


def compute_token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    dtype: torch.dtype,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of every token, and the gradients of the losses' sum times scale_of_gradients(dtype).

    The logits and their gradient exist for one chunk of tokens at a time. As an operator, the loop is one node for
    torch.compile, which would otherwise trace it chunk by chunk.

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
    scale = scale_of_gradients(dtype)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
    for start in range(0, hidden.shape[0], rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
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


def scale_of_gradients(dtype: torch.dtype) -> float:
    """Return the factor of the gradients that compute_token_losses returns for matrix products in `dtype`."""
    return FLOAT16_GRADIENT_SCALE if dtype == torch.float16 else 1.0


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
        float32 [N]; 0 where the target is IGNORE_INDEX. On CUDA, the loss and the gradient of any other target outside
        the vocabulary are NaN, because raising an error would make the host wait for the device.

    Raises:
        IndexError: on the CPU, a target is outside the vocabulary and not IGNORE_INDEX.
    """
    if has_kernel(logits):
        from glalm.kernels.triton import cross_entropy  # A machine without a GPU may lack Triton.

        return cross_entropy.cross_entropy_(logits, targets, z_loss, gradient, gradient_scale)
    x = at_least_float32(logits)
    counted = targets != IGNORE_INDEX
    if targets.is_cpu:
        unknown = targets[counted & ((targets < 0) | (targets >= x.shape[1]))]
        if len(unknown) > 0:
            raise IndexError(
                f"a label is {unknown[0]}. Expected tokens of the vocabulary, 0 to {x.shape[1] - 1}, and "
                f"{IGNORE_INDEX} where there is nothing to predict"
            )
    columns = targets.where(counted, 0)[:, None]
    lse = x.logsumexp(-1, keepdim=True)
    losses = (lse - x.gather(1, columns) + z_loss * lse**2).squeeze(1)
    if gradient:
        x.sub_(lse).exp_().mul_(1 + 2 * z_loss * lse)
        x.scatter_add_(1, columns, -torch.ones_like(lse))
        logits.copy_(x.mul_(gradient_scale).masked_fill_(~counted[:, None], 0))
    return losses.where(counted, 0).float()


token_losses_operator = register_operator("token_losses", compute_token_losses, token_losses_fake)
