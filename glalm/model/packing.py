"""Packed sequences [1, T, ...] as a batch padded on the left, and back."""

import torch
import torch.nn.functional as F
from torch import Tensor


def unpack(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """[1, T, ...] to [N, longest, ...] with zeros on the left, and the mask [N, longest, 1] that is 0 there.

    Reads cu_seqlens on the host.
    """
    lengths = cu_seqlens.diff().tolist()
    longest = max(lengths)

    def left_padded(y: Tensor) -> Tensor:
        return F.pad(y, (0, 0) * (y.dim() - 1) + (longest - len(y), 0))

    rows = [left_padded(y) for y in x[0].split(lengths)]
    live = [left_padded(x.new_ones(n, 1)) for n in lengths]
    return torch.stack(rows), torch.stack(live)


def repack(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The inverse of unpack: [N, longest, ...] to [1, T, ...]."""
    return torch.cat([row[len(row) - n :] for row, n in zip(x, cu_seqlens.diff().tolist(), strict=True)])[None]
