"""What the forward pass of chunk_gla computes for the scan and saves for the backward pass."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from glalm.kernels.triton.launch_configs import LaunchConfig, config_for, multiprocessors
from glalm.kernels.triton.tiles import CHUNK, count_chunks


class SavedForBackward(NamedTuple):
    """Buffers indexed by tile (one chunk of one head). KP is K padded to a power of two.

    With one gate a key channel, `decay` is exp(total / 2) for each channel of each tile (see rescale.py). With one gate
    a head, it is exp(total) for each tile, and `pairwise_marks` is empty.
    """

    q_hat: Tensor  # [tiles, CHUNK, KP]
    k_hat: Tensor  # [tiles, CHUNK, KP]
    scores: Tensor  # [tiles, 1 or 2, CHUNK, CHUNK]; the second part is the residual of rounding the first to bfloat16
    decay: Tensor  # float32 [tiles, KP] or [tiles]
    pairwise_marks: Tensor  # int32 [tiles], 1 where the chunk takes the pairwise path
    segment_starts: Tensor  # float32 [B, segments, H, K, V]; empty with one segment or packed sequences


def saved_shapes(
    q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, with_residual: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each field of SavedForBackward, without reading a value.

    With `with_residual`, bfloat16 scores have two parts; float32 scores need no second one.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    KP = padded_head_size(K)
    dtype = operand_dtype(q)
    chunks = count_chunks(B, T, cu_seqlens)
    tiles = chunks * H
    segments = 1
    if cu_seqlens is None:
        config = config_for(q.device, KP, padded_head_size(V), dtype.itemsize * 8)
        segments = count_segments(config.scan_forward, B, H, V, chunks, q.device)
    score_parts = 2 if with_residual and dtype == torch.bfloat16 else 1
    gate_per_head = has_gate_per_head(g)
    return [
        ((tiles, CHUNK, KP), dtype),
        ((tiles, CHUNK, KP), dtype),
        ((tiles, score_parts, CHUNK, CHUNK), dtype),
        ((tiles,) if gate_per_head else (tiles, KP), torch.float32),
        ((0,) if gate_per_head else (tiles,), torch.int32),
        ((0,) if segments == 1 else (B, segments, H, K, V), torch.float32),
    ]


def count_segments(config: LaunchConfig, sequences: int, H: int, V: int, chunks: int, device: torch.device) -> int:
    """Return how many segments the scan cuts each sequence into.

    Enough segments to give each multiprocessor eight warps, but at least four chunks a segment on average.
    """
    programs = sequences * H * triton.cdiv(V, config.tile["BV"])
    programs_at_once = multiprocessors(device) * max(1, 8 // config.warps)
    chunks_per_sequence = chunks // max(1, sequences)
    return max(1, min(programs_at_once // max(1, programs), chunks_per_sequence // 4))


def has_gate_per_head(g: Tensor | None) -> bool:
    """Return whether the kernels in head_gate.py serve this gate: one gate a head, or none."""
    return g is None or g.dim() < 4


def operand_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of the matmuls' operands: bfloat16 for bfloat16 inputs, else float32.

    float16 has too small a range for the rescaled operands. As float32 on tensor cores (tf32) they keep float16's
    mantissa and gain float32's range.
    """
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def padded_head_size(n: int) -> int:
    """Return a head size rounded up to a power of two of at least 16, as the kernels' tiles need it."""
    return max(16, triton.next_power_of_2(n))
