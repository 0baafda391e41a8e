"""chunk_gla on a GPU: which kernels run, in which order, over which buffers.

Forward:   rescale -> scan (carries the state and computes o)
Backward:  scan (recomputes the states) -> reverse scan (dv and the gradients of the states) -> gradients (dq, dk, dg)

Where processes share the sequences, both scans first run their segments from zero states, as they do where a sequence
is cut to fill the GPU, exchange the results between processes, and then start from the states that enter the shard.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from glalm.kernels.common import gate_has_gradient, heads_per_group, multiplies_exactly
from glalm.kernels.context_parallel import ContextShard, reverse_exchange
from glalm.kernels.triton.gradients import gradients_kernel
from glalm.kernels.triton.head_gate import gradients_head_kernel, rescale_head_kernel
from glalm.kernels.triton.launch import LaunchConfig, gla_config, launch, multiprocessors, padded_head_size
from glalm.kernels.triton.rescale import rescale_kernel
from glalm.kernels.triton.scan import scan_kernel
from glalm.kernels.triton.segments import join_segments
from glalm.kernels.triton.tiles import CHUNK, Chunks, count_chunks, running_sum_matrices

# Chunks that forget too much for the fast path (see rescale.py) are processed by a second launch, the pairwise variant.
# Few chunks need it, so each of its programs checks this many.
PAIRWISE_ITEMS = 4


class SavedForBackward(NamedTuple):
    """Buffers indexed by tile (one chunk of one head of keys). KP is K padded to a power of two.

    Each head of keys has `group` heads of queries, whose tiles are adjacent.

    With one gate per key channel, `decay` is exp(total / 2) for each channel of each tile (see rescale.py). With one
    gate a head, it is exp(total) for each tile, and `pairwise_marks` is empty.
    """

    q_hat: Tensor  # [tiles * group, CHUNK, KP]
    k_hat: Tensor  # [tiles, CHUNK, KP]
    # [tiles * group, 1 or 2, CHUNK, CHUNK]; the second part is the residual of rounding the first to bfloat16
    scores: Tensor
    decay: Tensor  # float32 [tiles, KP] or [tiles]
    pairwise_marks: Tensor  # int32 [tiles], 1 where the chunk takes the pairwise path
    segment_starts: Tensor  # float32 [B, segments, H, K, V]; empty with one segment or packed sequences


def saved_shapes(
    q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, with_residual: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each field of SavedForBackward, without reading a value.

    With `with_residual`, bfloat16 scores have two parts; float32 scores need no second one.
    """
    B, T, heads, K = q.shape
    H, V = v.shape[2:]
    KP = padded_head_size(K)
    dtype = operand_dtype(q)
    chunks = count_chunks(B, T, cu_seqlens)
    tiles = chunks * H
    segments = 1
    if cu_seqlens is None:
        config = gla_config(q.device, KP, padded_head_size(V), dtype.itemsize * 8)
        segments = count_segments(config.scan_forward, B, H, V, chunks, q.device)
    score_parts = 2 if with_residual and dtype == torch.bfloat16 else 1
    scalar_decay = g is None or g.dim() < 4  # as in LaunchPlan
    return [
        ((chunks * heads, CHUNK, KP), dtype),
        ((tiles, CHUNK, KP), dtype),
        ((chunks * heads, score_parts, CHUNK, CHUNK), dtype),
        ((tiles,) if scalar_decay else (tiles, KP), torch.float32),
        ((0,) if scalar_decay else (tiles,), torch.int32),
        ((0,) if segments == 1 else (B, segments, H, K, V), torch.float32),
    ]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    normalizer: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor | None, SavedForBackward | None]:
    """Return the outputs, the final state if `output_final_state`, and what `backward` needs if `save_for_backward`.

    Args:
        q: [B, T, H * group, K]; head h of k, v, g and the states serves the heads h * group, ..., (h + 1) * group - 1
        k: [B, T, H, K]
        v: [B, T, H, V]
        g: [B, T, H, K], [B, T, H], [H], or None for no gate: log gates or, with a normalizer, logits of the log gates
            logsigmoid(g) / normalizer
        initial_state: float32 [N, H, K, V] or None, for N sequences

    Returns o, [B, T, H * group, V]; the final state, float32 [N, H, K, V], or None; and SavedForBackward or None.
    """
    plan = LaunchPlan(q, k, v, g, scale, normalizer, cu_seqlens)
    saved = plan.rescale(with_residual=save_for_backward)
    o = v.new_empty(*q.shape[:3], v.shape[3])
    final_state = plan.allocate_state() if output_final_state else None
    plan.scan(saved, plan.v, initial_state, final_state, out=o)
    return o, final_state, saved if save_for_backward else None


def forward_over_processes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    normalizer: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save_for_backward: bool,
    context: ContextShard,
) -> tuple[Tensor, Tensor, Tensor, SavedForBackward | None]:
    """Return what `forward` does, for a shard of the sequences.

    Returns o; the final state of the sequences; the state that enters the shard, which `backward` takes as its
    initial_state; and SavedForBackward or None.
    """
    plan = LaunchPlan(q, k, v, g, scale, normalizer, cu_seqlens)
    saved = plan.rescale(with_residual=save_for_backward)
    o = v.new_empty(*q.shape[:3], v.shape[3])
    entering, final_state = plan.exchange_and_scan(
        lambda local, decay: context.exchange(local, decay, initial_state), saved, plan.v, out=o
    )
    return o, final_state, entering, saved if save_for_backward else None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    normalizer: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: SavedForBackward,
    do: Tensor,
    dfinal_state: Tensor | None,
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv, dg (None without a gate or with a fixed one) and dinitial_state (None without one).

    With a context, initial_state is what enters the shard, and dinitial_state the gradient of what enters the first.
    """
    plan = LaunchPlan(q, k, v, g, scale, normalizer, cu_seqlens)
    do = do.contiguous()
    dv = torch.empty_like(plan.v)
    states = plan.allocate_chunk_states()
    dstates = plan.allocate_chunk_states()
    plan.scan(saved, plan.v, initial_state, None, states=states)
    if context is None:
        dinitial_state = plan.allocate_state() if initial_state is not None else None
        plan.scan(saved, do, dfinal_state, dinitial_state, out=dv, states=dstates, reverse=True)
    else:
        _, dinitial_state = plan.exchange_and_scan(
            lambda dentering, decay: reverse_exchange(context, dentering, decay, dfinal_state),
            saved, do, out=dv, states=dstates, reverse=True,
        )  # fmt: skip
    dq, dk, dg = plan.compute_gradients(saved, do, states, dstates)
    return dq, dk, dv, dg, dinitial_state


def describe_rows(x: Tensor, *block: int) -> TensorDescriptor:
    """Return a descriptor of `x` seen as rows of its last dimension, read and written in blocks."""
    width = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], list(block))


class LaunchPlan:
    """The sizes, precision and tile sizes of one call. Each method launches one stage.

    H, K, V are the heads of keys and values and their sizes; KP and VP are K and V padded to powers of two. `group`
    heads of queries share each of them. A tile is one chunk of one head of keys.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        scale: float,
        normalizer: float | None,
        cu_seqlens: Tensor | None,
    ):
        self.q = q.contiguous()
        self.k = k.contiguous()
        self.v = v.contiguous()
        self.g = None if g is None else g.contiguous()
        # A token's decay is one number per head, or there is none: the case of head_gate.py.
        self.scalar_decay = g is None or g.dim() < 4
        self.fixed_gate = g is not None and not gate_has_gradient(g)
        self.scale = float(scale)  # Triton would compile another kernel for the integer 1.
        self.from_logits = normalizer is not None
        self.inv_normalizer = 1.0 / normalizer if self.from_logits else 1.0
        self.B, self.T, self.H, self.K = k.shape
        self.V = v.shape[-1]
        self.group = heads_per_group(q, k)
        self.KP = padded_head_size(self.K)
        self.VP = padded_head_size(self.V)
        self.chunks = Chunks.locate(self.B, self.T, cu_seqlens)
        self.tiles = self.chunks.count * self.H
        self.dtype = operand_dtype(q)
        self.precision = "tf32x3" if multiplies_exactly(q) else "tf32"
        # The running sums of the gates are matmuls of this many bfloat16 parts (see exact_dot).
        gate_dtype = None if g is None else torch.float32 if self.from_logits else g.dtype
        self.gate_parts = 1 if gate_dtype == torch.bfloat16 else 2 if self.dtype == torch.bfloat16 else 3
        self.config = gla_config(q.device, self.KP, self.VP, self.dtype.itemsize * 8)

    def allocate(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.q.device, dtype=dtype or self.dtype)

    def allocate_state(self, segments: int = 1) -> Tensor:
        """Return a buffer for one state of every segment of every sequence, float32 [N * segments, H, K, V]."""
        return self.allocate(self.chunks.sequences * segments, self.H, self.K, self.V, dtype=torch.float32)

    def allocate_chunk_states(self) -> Tensor:
        """Return a buffer for the transposed state of every tile, [tiles, VP, KP]."""
        return self.allocate(self.tiles, self.VP, self.KP)

    def rescale(self, with_residual: bool) -> SavedForBackward:
        """Compute q_hat, k_hat, the gated scores and the chunks' decays.

        With `with_residual`, also store the rounding error of the bfloat16 scores, for the backward pass.
        """
        shapes = saved_shapes(self.q, self.v, self.g, self.chunks.cu_seqlens, with_residual)
        saved = SavedForBackward(*(self.allocate(*shape, dtype=dtype) for shape, dtype in shapes))
        constants = dict(
            H=self.H, K=self.K, KP=self.KP, BK=self.config.rescale.tile["BK"], C=CHUNK, FROM_LOGITS=self.from_logits,
            GATE_PARTS=self.gate_parts, PRECISION=self.precision, WITH_RESIDUAL=saved.scores.shape[1] == 2,
            GROUP=self.group,
        )  # fmt: skip
        tiles = self.tiles * self.group
        inputs = self.q, self.k, self.g, running_sum_matrices(self.q.device)
        outputs = saved.q_hat, saved.k_hat, saved.scores, saved.decay
        common = *self.chunks.device_tables, self.scale, self.inv_normalizer, self.chunks.sequences, self.T
        if self.scalar_decay:
            constants["FIXED_GATE"] = self.fixed_gate
            args = *inputs, *outputs, *common
            launch(rescale_head_kernel, tiles, args, constants, self.config.rescale.options)
            return saved
        args = *inputs, *outputs, saved.pairwise_marks, *common, tiles
        for pairwise, config in ((False, self.config.rescale), (True, self.config.rescale_pairwise)):
            items = PAIRWISE_ITEMS if pairwise else 1
            variant = {**constants, "BK": config.tile["BK"], "PAIRWISE": pairwise, "ITEMS": items}
            launch(rescale_kernel, triton.cdiv(tiles, items), args, variant, config.options)
        return saved

    def scan(
        self,
        saved: SavedForBackward,
        w: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        out: Tensor | None = None,
        states: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """Carry the state through every sequence; see scan_kernel for the arguments.

        When there are too few sequences and heads to fill the GPU, each sequence is cut into segments that run in
        parallel. Their starting states are computed first.
        """
        if self.tiles == 0:
            if final is not None:
                final.copy_(torch.zeros_like(final) if initial is None else initial)
            return
        initial = None if initial is None else initial.contiguous()
        segments = self.segments_of_scan(reverse)
        config = self.config.scan_forward
        if reverse:
            config = self.config.scan_backward
        elif out is None:
            config = self.config.scan_states
        if segments == 1:
            self.launch_scan(1, config, saved, w, initial, final, out, states, reverse)
            return
        # The forward pass saves the initial states of the segments if the sequences are not packed. The backward pass,
        # which asks for no output, reuses them.
        saves_starts = not reverse and self.chunks.cu_seqlens is None
        starts = saved.segment_starts if saves_starts else self.allocate_state(segments)
        already_computed = saves_starts and out is None
        if not already_computed:
            self.compute_segment_starts(starts, segments, saved, w, initial, final, reverse)
        self.launch_scan(segments, config, saved, w, starts, None, out, states, reverse)

    def exchange_and_scan(
        self,
        exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        saved: SavedForBackward,
        w: Tensor,
        out: Tensor,
        states: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Scan from the states that the sequences get in exchange for what they leave behind from zero states.

        Args:
            exchange: takes the final states [N, H, K, V] from zero states, and the factors [N, H, K, 1] by which the
                sequences multiply their initial states. It returns these initial states, and another result.

        Returns what `exchange` does.
        """
        if self.tiles == 0:
            unchanged = self.allocate(self.chunks.sequences, self.H, self.K, 1, dtype=torch.float32).fill_(1)
            return exchange(self.allocate_state().zero_(), unchanged)
        segments = self.segments_of_scan(reverse)
        # The backward pass reuses the segments' initial states, as in `scan`.
        saves_starts = not reverse and saved.segment_starts.numel() > 0
        starts = saved.segment_starts if saves_starts else self.allocate_state(segments)
        segment_decay = self.run_segments_from_zero(starts, segments, saved, w, reverse)
        local = self.allocate_state()
        decay = self.allocate(self.chunks.sequences, self.H, self.K, 1, dtype=torch.float32)
        join_segments(starts, segment_decay, segments, None, local, decay, reverse, write_starts=False)
        initial, result = exchange(local, decay)
        initial = initial.contiguous()
        join_segments(starts, segment_decay, segments, initial, None, reverse=reverse)
        config = self.config.scan_backward if reverse else self.config.scan_forward
        self.launch_scan(segments, config, saved, w, starts, None, out, states, reverse)
        return initial, result

    def compute_segment_starts(
        self, starts: Tensor, segments: int, saved: SavedForBackward, w: Tensor, initial, final, reverse: bool
    ) -> None:
        """Fill `starts` with the state each segment begins with, and `final` with the last segment's end.

        First every segment runs from a zero state, all in parallel; then join_segments chains the results.
        """
        segment_decay = self.run_segments_from_zero(starts, segments, saved, w, reverse)
        join_segments(starts, segment_decay, segments, initial, final, reverse=reverse)

    def run_segments_from_zero(
        self, ends: Tensor, segments: int, saved: SavedForBackward, w: Tensor, reverse: bool
    ) -> Tensor:
        """Fill `ends` with the states to which the segments bring zero states.

        Returns the factors by which they multiply their initial states, [N * segments, H, KP].
        """
        segment_decay = self.allocate(self.chunks.sequences * segments, self.H, self.KP, dtype=torch.float32)
        config = self.config.scan_segment_starts
        self.launch_scan(segments, config, saved, w, None, ends, None, None, reverse, segment_decay)
        return segment_decay

    def launch_scan(
        self,
        segments: int,
        config: LaunchConfig,
        saved: SavedForBackward,
        w: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        out: Tensor | None,
        states: Tensor | None,
        reverse: bool,
        segment_decay: Tensor | None = None,
    ) -> None:
        x, y = (saved.k_hat, saved.q_hat) if reverse else (saved.q_hat, saved.k_hat)
        BV = config.tile["BV"]
        bands = config.tile["STORE_BANDS"]
        args = (
            None if out is None else describe_rows(x, CHUNK, self.KP),
            describe_rows(y, CHUNK, self.KP),
            w,
            None if out is None else describe_rows(saved.scores, CHUNK, CHUNK),
            None if self.g is None else saved.decay,
            out,
            None if states is None else describe_rows(states, BV, self.KP // bands),
            initial,
            final,
            segment_decay,
            *self.chunks.device_tables,
            self.chunks.sequences,
            self.T,
            segments,
        )
        constants = dict(
            H=self.H, K=self.K, KP=self.KP, V=self.V, VP=self.VP, BV=BV, C=CHUNK, STORE_BANDS=bands,
            SCORE_PARTS=saved.scores.shape[1], SCALAR_DECAY=self.scalar_decay, REVERSE=reverse,
            PRECISION=self.precision, PREFETCH=config.tile["PREFETCH"], GROUP=self.group,
        )  # fmt: skip
        column_blocks = triton.cdiv(self.V if states is None else self.VP, BV)
        programs = self.chunks.sequences * self.H * segments * column_blocks
        launch(scan_kernel, programs, args, constants, config.options)

    def segments_of_scan(self, reverse: bool) -> int:
        """Return count_segments for the forward or the backward scan."""
        config = self.config.scan_backward if reverse else self.config.scan_forward
        return count_segments(config, self.chunks.sequences, self.H, self.V, self.chunks.count, self.q.device)

    def compute_gradients(
        self, saved: SavedForBackward, do: Tensor, states: Tensor, dstates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute dq, dk and dg from the states and their gradients, which the two scans stored."""
        dq = torch.empty_like(self.q)
        dk = torch.empty_like(self.k)
        inputs = self.q, self.k, self.g, self.v, do, running_sum_matrices(self.q.device)
        common = *self.chunks.device_tables, self.scale, self.inv_normalizer, self.chunks.sequences, self.T
        constants = dict(
            H=self.H, K=self.K, KP=self.KP, V=self.V, VP=self.VP, C=CHUNK, FROM_LOGITS=self.from_logits,
            GATE_PARTS=self.gate_parts, PRECISION=self.precision, GROUP=self.group,
        )  # fmt: skip
        if self.scalar_decay:
            wants_dg = gate_has_gradient(self.g)
            config = self.config.gradients if wants_dg else self.config.gradients_fixed_gate
            key_blocks = self.KP // config.tile["BK"]
            # Each block of key channels writes its share of dg; the shares are summed below.
            dg = self.allocate(key_blocks, *self.g.shape, dtype=torch.float32) if wants_dg else None
            args = *inputs, saved.decay, states, dstates, dq, dk, dg, *common, self.B * self.T
            constants |= {**config.tile, "FIXED_GATE": self.fixed_gate}
            launch(gradients_head_kernel, self.tiles * key_blocks, args, constants, config.options)
            return dq, dk, dg.sum(0).to(self.g.dtype) if wants_dg else None
        dg = torch.empty_like(self.g)
        constants["SUM_PARTS"] = 2 if self.dtype == torch.bfloat16 else 3
        for pairwise, config in ((False, self.config.gradients), (True, self.config.gradients_pairwise)):
            items = self.tiles * (self.KP // config.tile["BK"])
            items_per_program = PAIRWISE_ITEMS if pairwise else 1
            args = *inputs, saved.pairwise_marks, states, dstates, dq, dk, dg, *common, items
            variant = {**constants, **config.tile, "PAIRWISE": pairwise, "ITEMS": items_per_program}
            launch(gradients_kernel, triton.cdiv(items, items_per_program), args, variant, config.options)
        return dq, dk, dg


def count_segments(config: LaunchConfig, sequences: int, H: int, V: int, chunks: int, device: torch.device) -> int:
    """Return how many segments the scan cuts each sequence into.

    This is the largest number for which all programs run at once, at eight warps per multiprocessor, and for which a
    segment has at least four chunks on average.
    """
    programs = sequences * H * triton.cdiv(V, config.tile["BV"])
    programs_at_once = multiprocessors(device) * max(1, 8 // config.warps)
    chunks_per_sequence = chunks // max(1, sequences)
    return max(1, min(programs_at_once // max(1, programs), chunks_per_sequence // 4))


def operand_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of the matmuls' operands: bfloat16 for bfloat16 inputs, else float32.

    float16 has too small a range for the rescaled operands. As float32 on tensor cores (tf32) they keep float16's
    mantissa and gain float32's range.
    """
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
