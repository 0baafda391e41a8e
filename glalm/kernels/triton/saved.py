"""What the forward pass makes for both passes: every kernel after prepare.py and head_gate.py works on this."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from glalm.kernels.triton.launch_configs import Launch, config_for, multiprocessors
from glalm.kernels.triton.tiles import CHUNK, chunk_count


class Kept(NamedTuple):
    """Indexed by tile, a chunk and a head. KP: K padded to a power of two."""

    q: Tensor  # q_hat [tiles, CHUNK, KP]
    k: Tensor
    scores: Tensor  # A [tiles, 1 or 2, CHUNK, CHUNK]; second, for the backward pass, what rounding took from it
    decay: Tensor  # float32; one gate a key channel: half [tiles, KP]; one a head: exp(total) [tiles]
    exact: Tensor  # int32 [tiles], one gate a key channel: whether the chunk takes the pairwise path
    starts: Tensor  # float32 [B, segments, H, K, V], the states they start from; of one segment or packed ones none


def shapes(
    q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, low: bool
) -> list[tuple[tuple, torch.dtype]]:
    """Shape and dtype of each, from shapes alone. low: keep A in two parts, where the second is not 0."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    chunks = chunk_count(B, T, cu_seqlens)
    tiles, cut = chunks * H, 1
    if cu_seqlens is None:
        config = config_for(q.device, padded(K), padded(V), operands(q).itemsize * 8)
        cut = segment_count(config.forward, B, H, V, chunks, q.device)
    KP, dtype, a_head = padded(K), operands(q), per_head(g)
    return [
        ((tiles, CHUNK, KP), dtype),
        ((tiles, CHUNK, KP), dtype),
        ((tiles, 2 if low and dtype == torch.bfloat16 else 1, CHUNK, CHUNK), dtype),
        ((tiles,) if a_head else (tiles, KP), torch.float32),
        ((0,) if a_head else (tiles,), torch.int32),
        ((0,) if cut == 1 else (B, cut, H, K, V), torch.float32),
    ]


def segment_count(config: Launch, sequences: int, H: int, V: int, chunks: int, device: torch.device) -> int:
    """What a scan cuts each sequence into: as many as give each multiprocessor eight warps, but none shorter than four
    chunks on average."""
    programs = sequences * H * triton.cdiv(V, config.tile["BV"])
    slots = multiprocessors(device) * max(1, 8 // config.warps)
    return max(1, min(slots // max(1, programs), chunks // max(1, sequences) // 4))


def per_head(g: Tensor | None) -> bool:
    """Whether the kernels of head_gate.py serve this gate: one a head, or none."""
    return g is None or g.dim() < 4


def operands(q: Tensor) -> torch.dtype:
    """The dtype of the matmuls' operands. float16 has too few exponents for the rescaled ones, tf32 has its mantissa
    and float32's exponents."""
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def padded(n: int) -> int:
    """A head size as the kernels' tiles have it."""
    return max(16, triton.next_power_of_2(n))
