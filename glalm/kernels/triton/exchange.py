"""The fold of context parallelism: the state that enters a process's tokens, from the summaries of all processes.

For each process of the group, the fold does a few operations on a state of about a megabyte. As PyTorch operators they
would be so many small kernels that the fold would take longer than the scan of a shard.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glalm.kernels.triton.launch import launch

BLOCK = 512


def fold_summaries(
    messages: Tensor, shape: torch.Size, decay_size: int, initial: Tensor | None, rank: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Fold S <- decay * S + local over the processes, in their order or in reverse.

    Args:
        messages: float32 [processes, N, L + D]: for each process and row, the L numbers of `local`, then the D numbers
            of `decay`. Each number of `decay` multiplies L / D neighbouring numbers of S.
        shape: the shape of S, [N, ...] with L numbers in a row.
        decay_size: D.
        initial: [N, ...], S before the first process that is folded, or None for zeros.
        rank: the rank of this process.
        reverse: fold from the last process to the first.

    Returns:
        S before this process, and S after all of them, float32 [N, ...].
    """
    size, N, _ = messages.shape
    entering, final = (torch.empty(shape, device=messages.device, dtype=torch.float32) for _ in range(2))
    initial = None if initial is None else initial.float().contiguous()
    L = shape[1:].numel()
    constants = dict(L=L, D=decay_size, BLOCK=BLOCK, REVERSE=reverse)
    args = messages.contiguous(), initial, entering, final, N, rank, size
    launch(fold_summaries_kernel, triton.cdiv(N * L, BLOCK), args, constants, {})
    return entering, final


@triton.jit(do_not_specialize=["N", "rank", "size"])
def fold_summaries_kernel(
    messages, initial, entering, final, N, rank, size,
    L: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK numbers of `entering` and `final`; see fold_summaries for the arguments."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = i // L
    mask = n < N
    p = i % L
    S = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        S = tl.load(initial + i, mask=mask, other=0)
    for step in tl.range(0, size, num_stages=4):  # The summaries of the next processes are loaded meanwhile.
        r = size - 1 - step if REVERSE else step
        row = messages + (r * N + n) * (L + D)
        local = tl.load(row + p, mask=mask, other=0)
        decay = tl.load(row + L + p // (L // D), mask=mask, other=0)
        if r == rank:
            tl.store(entering + i, S, mask=mask)
        S = S * decay + local
    tl.store(final + i, S, mask=mask)
