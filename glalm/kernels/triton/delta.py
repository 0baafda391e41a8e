"""The delta rule on a GPU: which kernels run, in which order, over which buffers.

Forward:   prepare (the triangular systems and the scores of all chunks) -> scan (carries the state and computes o)
Backward:  scan (recomputes the states and the updates u) -> reverse scan (dv and the gradients of the states)
           -> gradients (dq, dk, dbeta, dg)
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from glalm.kernels.common import multiplies_exactly
from glalm.kernels.triton.delta_channel_gate import (
    ITEMS,
    delta_channel_gradients_kernel,
    gate_sum_matrices,
    prepare_channel_kernel,
)
from glalm.kernels.triton.delta_gradients import delta_gradients_kernel
from glalm.kernels.triton.delta_prepare import prepare_kernel
from glalm.kernels.triton.delta_scan import delta_reverse_scan_kernel, delta_scan_kernel
from glalm.kernels.triton.gla import operand_dtype
from glalm.kernels.triton.launch import LaunchConfig, delta_config, launch, padded_head_size
from glalm.kernels.triton.tiles import CHUNK, Chunks, count_chunks, running_sum_matrices


class SavedForBackward(NamedTuple):
    """Buffers indexed by tile (one chunk of one head), some of them empty. KP is K padded, see padded_size."""

    resolvent: Tensor  # [tiles, CHUNK, CHUNK], R of delta_prepare.py
    scores: Tensor  # [tiles, CHUNK, CHUNK], A of delta_prepare.py
    factors: Tensor  # float32 [tiles, 3, CHUNK], see prepare_kernel; with one gate per head or normalization
    decay: Tensor  # float32 [tiles], exp of the sum of the chunk's gates, or [tiles, KP], of half of it; with gates
    marks: Tensor  # int32 [tiles], 1 where the chunk forgets much; with one gate per channel
    norms: Tensor  # float32 [tiles, 2, CHUNK], 1 / |q| and 1 / |k|; with normalization
    hats: Tensor  # [3, tiles, CHUNK, KP], q_hat, k_read and k_write of delta_channel_gate.py; with one gate per channel


def padded_size(n: int, dtype: torch.dtype) -> int:
    """Return a head size padded to a power of two, of at least 64 for bfloat16 operands.

    Triton 3.6 compiles Hopper's wgmma wrongly for narrower tiles.
    """
    return max(64 if dtype == torch.bfloat16 else 16, padded_head_size(n))


def saved_shapes(
    q: Tensor, g: Tensor | None, normalize: bool, cu_seqlens: Tensor | None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each field of SavedForBackward, without reading a value."""
    B, T, H, K = q.shape
    dtype = operand_dtype(q)
    KP = padded_size(K, dtype)
    tiles = count_chunks(B, T, cu_seqlens) * H
    per_channel = g is not None and g.dim() == 4
    per_head = g is not None and g.dim() == 3
    return [
        ((tiles, CHUNK, CHUNK), dtype),
        ((tiles, CHUNK, CHUNK), dtype),
        ((tiles, 3, CHUNK) if per_head or (normalize and g is None) else (0,), torch.float32),
        ((tiles, KP) if per_channel else (tiles,) if per_head else (0,), torch.float32),
        ((tiles,) if per_channel else (0,), torch.int32),
        ((tiles, 2, CHUNK) if normalize else (0,), torch.float32),
        ((3, tiles, CHUNK, KP) if per_channel else (0,), dtype),
    ]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None, SavedForBackward]:
    """Return the outputs, the final state if `output_final_state`, and what `backward` needs.

    Args:
        q, k: [B, T, H, K]
        v: [B, T, H, V]
        beta: [B, T, H]
        g: log gates [B, T, H, K] or [B, T, H], or None
        normalize: whether to divide the rows of q and k by their L2 norms
        initial_state: float32 [N, H, K, V] or None, for N sequences

    Returns o, shaped like v; the final state, float32 [N, H, K, V], or None; and SavedForBackward.
    """
    plan = LaunchPlan(q, k, v, beta, g, scale, normalize, cu_seqlens)
    saved = plan.prepare()
    o = torch.empty_like(plan.v)
    final_state = plan.allocate_state() if output_final_state else None
    plan.scan(plan.config.scan_forward, saved, initial_state, final_state, out=o)
    return o, final_state, saved


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: SavedForBackward,
    do: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv, dbeta, dg (None without gates) and dinitial_state (None without an initial state)."""
    plan = LaunchPlan(q, k, v, beta, g, scale, normalize, cu_seqlens)
    do = do.contiguous()
    # The gradient of beta is dv u / beta^2, whose factors float16 could not represent for a small beta.
    wide = torch.float32 if v.dtype == torch.float16 else v.dtype
    updates = torch.empty_like(plan.v, dtype=wide)
    states = plan.allocate_chunk_states()
    plan.scan(plan.config.scan_states, saved, initial_state, None, updates=updates, states=states)
    dv = torch.empty_like(plan.v, dtype=wide)
    dstates = plan.allocate_chunk_states()
    dinitial_state = None if initial_state is None else plan.allocate_state()
    plan.scan_back(saved, do, dv, dstates, dfinal_state, dinitial_state)
    dq, dk, dbeta, dg = plan.compute_gradients(saved, do, updates, dv, states, dstates)
    return dq, dk, dv.to(v.dtype), dbeta, dg, dinitial_state


class LaunchPlan:
    """The sizes, precision and tile sizes of one call. Each method launches one stage.

    H, K, V are the heads and their key and value sizes; KP and VP are K and V padded, see padded_size. A tile is
    one chunk of one head.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        scale: float,
        normalize: bool,
        cu_seqlens: Tensor | None,
    ):
        self.q = q.contiguous()
        self.k = k.contiguous()
        self.v = v.contiguous()
        self.beta = beta.contiguous()
        self.g = None if g is None else g.contiguous()
        self.scale = float(scale)  # Triton would compile another kernel for the integer 1.
        self.normalize = normalize
        self.dtype = operand_dtype(q)
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.KP = padded_size(self.K, self.dtype)
        self.VP = padded_size(self.V, self.dtype)
        self.cu_seqlens = cu_seqlens
        self.chunks = Chunks.locate(self.B, self.T, cu_seqlens)
        self.tiles = self.chunks.count * self.H
        self.precision = "tf32x3" if multiplies_exactly(q) else "tf32"
        self.per_channel = g is not None and g.dim() == 4
        # The running sums of gates per channel are matmuls of this many bfloat16 parts (see exact_dot).
        bfloat16_gates = g is not None and g.dtype == torch.bfloat16
        self.gate_parts = 1 if bfloat16_gates else 2 if self.dtype == torch.bfloat16 else 3
        self.config = delta_config(q.device, self.KP, self.VP, self.dtype.itemsize * 8, self.per_channel)

    def allocate(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.q.device, dtype=dtype or self.dtype)

    def allocate_state(self) -> Tensor:
        """Return a buffer for one state of every sequence, float32 [N, H, K, V]."""
        return self.allocate(self.chunks.sequences, self.H, self.K, self.V, dtype=torch.float32)

    def allocate_chunk_states(self) -> Tensor:
        """Return a buffer for the transposed state of every tile, [tiles, VP, KP]."""
        return self.allocate(self.tiles, self.VP, self.KP)

    def prepare(self) -> SavedForBackward:
        """Compute R and A of every tile, and the factors of the rows of q and k."""
        shapes = saved_shapes(self.q, self.g, self.normalize, self.cu_seqlens)
        saved = SavedForBackward(*(self.allocate(*shape, dtype=dtype) for shape, dtype in shapes))
        inputs = self.q, self.k, self.beta, self.g
        norms = saved.norms if self.normalize else None
        common = *self.chunks.device_tables, self.scale, self.chunks.sequences, self.T
        config = self.config.prepare
        constants = dict(H=self.H, K=self.K, KP=self.KP, **config.tile, C=CHUNK, PRECISION=self.precision)
        if self.per_channel:
            outputs = *saved.hats.unbind(), saved.resolvent, saved.scores, saved.decay, saved.marks, norms
            args = *inputs, gate_sum_matrices(self.q.device), *outputs, *common, self.tiles
            constants["GATE_PARTS"] = self.gate_parts
            self.launch_by_marks(prepare_channel_kernel, self.tiles, args, constants, config)
        else:
            outputs = saved.resolvent, saved.scores, *self.factors_and_decay(saved), norms
            args = *inputs, *outputs, *common
            launch(prepare_kernel, self.tiles, args, constants, config.options)
        return saved

    def keys(self, saved: SavedForBackward) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, and k where it reads the state and where it is written, as the scans take them."""
        return saved.hats.unbind() if self.per_channel else (self.q, self.k, self.k)

    def factors_and_decay(self, saved: SavedForBackward) -> tuple[Tensor | None, Tensor | None]:
        """Return these two, with None for an empty one."""
        return tuple(x if x.numel() else None for x in (saved.factors, saved.decay))

    def scan(
        self,
        config: LaunchConfig,
        saved: SavedForBackward,
        initial: Tensor | None,
        final: Tensor | None,
        out: Tensor | None = None,
        updates: Tensor | None = None,
        states: Tensor | None = None,
    ) -> None:
        """Carry the state through every sequence; see delta_scan_kernel for the arguments."""
        initial = None if initial is None else initial.contiguous()
        args = (
            *self.keys(saved), self.v, saved.resolvent, saved.scores, *self.factors_and_decay(saved),
            out, updates, states, initial, final,
            *self.chunks.device_tables, self.scale, self.chunks.sequences, self.T,
        )  # fmt: skip
        column_blocks = triton.cdiv(self.V if states is None else self.VP, config.tile["BV"])
        self.launch_scan(delta_scan_kernel, column_blocks, args, config)

    def scan_back(
        self,
        saved: SavedForBackward,
        do: Tensor,
        dv: Tensor,
        dstates: Tensor,
        dfinal: Tensor | None,
        dinitial: Tensor | None,
    ) -> None:
        """Carry the gradient of the state back through every sequence; see delta_reverse_scan_kernel."""
        dfinal = None if dfinal is None else dfinal.contiguous()
        config = self.config.scan_backward
        args = (
            *self.keys(saved), do, saved.resolvent, saved.scores, *self.factors_and_decay(saved),
            dv, dstates, dfinal, dinitial,
            *self.chunks.device_tables, self.scale, self.chunks.sequences, self.T,
        )  # fmt: skip
        self.launch_scan(delta_reverse_scan_kernel, self.VP // config.tile["BV"], args, config)

    def launch_scan(self, kernel, column_blocks: int, args: tuple, config: LaunchConfig) -> None:
        constants = dict(
            H=self.H, K=self.K, KP=self.KP, V=self.V, VP=self.VP, **config.tile, C=CHUNK,
            RESCALED=self.per_channel, PRECISION=self.precision,
        )  # fmt: skip
        launch(kernel, self.chunks.sequences * self.H * column_blocks, args, constants, config.options)

    def launch_by_marks(self, kernel, items: int, args: tuple, constants: dict, config: LaunchConfig) -> None:
        """Launch the variants of a kernel for the chunks that are not marked and for those that are."""
        launch(kernel, items, args, constants | {"MARKED": False}, config.options)
        launch(kernel, triton.cdiv(items, ITEMS.value), args, constants | {"MARKED": True}, config.options)

    def compute_gradients(
        self, saved: SavedForBackward, do: Tensor, updates: Tensor, dv: Tensor, states: Tensor, dstates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Compute dq, dk, dbeta and dg from what the two scans stored."""
        dq = torch.empty_like(self.q)
        dk = torch.empty_like(self.k)
        dbeta = torch.empty_like(self.beta)
        config = self.config.gradients_normalized if self.normalize else self.config.gradients
        inputs = self.q, self.k, self.beta, self.g, do, updates, dv
        norms = saved.norms if self.normalize else None
        common = *self.chunks.device_tables, self.scale, self.chunks.sequences, self.T
        constants = dict(
            H=self.H, K=self.K, KP=self.KP, V=self.V, VP=self.VP, **config.tile, C=CHUNK,
            PRECISION=self.precision,
        )  # fmt: skip
        if self.per_channel:
            dg = torch.empty_like(self.g)
            matrices = gate_sum_matrices(self.q.device), running_sum_matrices(self.q.device)[1]
            args = *inputs, *matrices, saved.decay, saved.marks
            args += norms, states, dstates, dq, dk, dbeta, dg, *common, self.tiles
            if self.normalize:
                constants["BK"] = self.KP
            constants |= {"GATE_PARTS": self.gate_parts, "SUM_PARTS": 2 if self.dtype == torch.bfloat16 else 3}
            items = self.tiles * (self.KP // constants["BK"])
            self.launch_by_marks(delta_channel_gradients_kernel, items, args, constants, config)
            return dq, dk, dbeta, dg
        dg = None if self.g is None else torch.empty_like(self.g)
        args = *inputs, *self.factors_and_decay(saved), norms, states, dstates, dq, dk, dbeta, dg, *common
        launch(delta_gradients_kernel, self.tiles, args, constants, config.options)
        return dq, dk, dbeta, dg
