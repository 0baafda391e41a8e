"""The operator: which kernels run, in which order, over which buffers."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from glalm.kernels.gates import has_gradient
from glalm.kernels.triton.gradients import gradients_kernel
from glalm.kernels.triton.head_gate import gradients_head_kernel, prepare_head_kernel
from glalm.kernels.triton.launch import launch
from glalm.kernels.triton.launch_configs import Config, Launch, config_for
from glalm.kernels.triton.rescale import prepare_kernel
from glalm.kernels.triton.saved import Kept, operands, padded, per_head, segment_count, shapes
from glalm.kernels.triton.scan import join_kernel, scan_kernel
from glalm.kernels.triton.tiles import CHUNK, Chunks, signs

EXACT_EACH = 4  # tiles to a program that looks whether there is one for the exact path: mostly it only looks


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
    keep: bool,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """q, k: [B, T, H, K]; v: [B, T, H, V]; g: [B, T, H, K], [B, T, H], [H] or None, logits where there is a normalizer;
    states: float32 [N, H, K, V]. Returns o as v, the final state or None, and where `keep` what `backward` wants.
    """
    plan = Plan(q, k, v, g, scale, normalizer, cu_seqlens)
    kept = plan.prepare(low=keep)
    o = torch.empty_like(plan.v)
    final = plan.new_state() if output_final_state else None
    plan.scan(kept, plan.v, initial_state, final, out=o)
    return o, final, kept if keep else None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    normalizer: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Kept,
    do: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `forward`, from its inputs and `kept`: dq, dk, dv, dg or None, dinitial_state or None."""
    plan = Plan(q, k, v, g, scale, normalizer, cu_seqlens)
    do = do.contiguous()
    dv = torch.empty_like(plan.v)
    dinitial = plan.new_state() if initial_state is not None else None
    states, dstates = plan.new_states(), plan.new_states()
    plan.scan(kept, plan.v, initial_state, None, states=states)
    plan.scan(kept, do, dfinal_state, dinitial, out=dv, states=dstates, reverse=True)
    dq, dk, dg = plan.gradients(kept, do, states, dstates)
    return dq, dk, dv, dg, dinitial


def rows_of(x: Tensor, *block: int) -> TensorDescriptor:
    """Blocks of a buffer seen as rows of its last dimension."""
    width = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], list(block))


class Plan:
    """One call's sizes, chunks, precision and tile sizes, and the launches as methods."""

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
        self.q, self.k, self.v = (x.contiguous() for x in (q, k, v))
        self.g = None if g is None else g.contiguous()
        self.per_head, self.fixed = per_head(g), g is not None and not has_gradient(g)
        self.scale, self.logits = float(scale), normalizer is not None  # a kernel would be compiled for an integer
        self.inverse = 1.0 / normalizer if self.logits else 1.0
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.KP, self.VP = padded(self.K), padded(self.V)
        self.chunks = Chunks.of(self.B, self.T, cu_seqlens)
        self.tiles = self.chunks.count * self.H
        self.dtype = operands(q)
        precise = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        self.precision = "tf32x3" if precise else "tf32"
        bits = None if g is None else g.dtype if not self.logits else torch.float32
        self.gate_parts = 1 if bits == torch.bfloat16 else 2 if self.dtype == torch.bfloat16 else 3
        self.config: Config = config_for(q.device, self.KP, self.VP, self.dtype.itemsize * 8)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.q.device, dtype=dtype or self.dtype)

    def new_state(self, segments: int = 1) -> Tensor:
        return self.empty(self.chunks.sequences * segments, self.H, self.K, self.V, dtype=torch.float32)

    def new_states(self) -> Tensor:
        return self.empty(self.tiles, self.VP, self.KP)

    def prepare(self, low: bool) -> Kept:
        kept = Kept(*(self.empty(*n, dtype=d) for n, d in shapes(self.q, self.v, self.g, self.chunks.cu_seqlens, low)))
        common = dict(
            H=self.H, K=self.K, KP=self.KP, BK=self.config.prepare.tile["BK"], C=CHUNK, LOGITS=self.logits,
            GATE_PARTS=self.gate_parts, PRECISION=self.precision, LOW=kept.scores.shape[1] == 2,
        )  # fmt: skip
        last = *self.chunks.table, self.scale, self.inverse, self.chunks.sequences, self.T
        if self.per_head:
            args = self.q, self.k, self.g, signs(self.q.device), kept.q, kept.k, kept.scores, kept.decay, *last
            launch(prepare_head_kernel, self.tiles, args, common | {"FIXED": self.fixed}, self.config.prepare.options)
            return kept
        args = self.q, self.k, self.g, signs(self.q.device), *kept[:5], *last, self.tiles
        for exact, config in ((False, self.config.prepare), (True, self.config.prepare_exact)):
            each = EXACT_EACH if exact else 1
            constants = {**common, "BK": config.tile["BK"], "EXACT": exact, "EACH": each}
            launch(prepare_kernel, triton.cdiv(self.tiles, each), args, constants, config.options)
        return kept

    def scan(
        self,
        kept: Kept,
        w: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        out: Tensor | None = None,
        states: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """Carry the state through every sequence; long ones are cut into segments when there is little else to do."""
        if self.tiles == 0:  # no token: the state stays what it was
            if final is not None:
                final.zero_() if initial is None else final.copy_(initial)
            return
        initial = None if initial is None else initial.contiguous()
        config = self.config.reverse if reverse else self.config.states if out is None else self.config.forward
        segments = self.segments(reverse)
        if segments == 1:
            return self.scan_segments(1, config, kept, w, initial, final, out, states, reverse)
        keeps = not reverse and self.chunks.cu_seqlens is None
        starts = kept.starts if keeps else self.new_state(segments)
        if not (keeps and out is None):  # the forward pass has made them
            self.find_starts(starts, segments, kept, w, initial, final, reverse)
        self.scan_segments(segments, config, kept, w, starts, None, out, states, reverse)

    def find_starts(self, starts: Tensor, segments: int, kept: Kept, w: Tensor, initial, final, reverse: bool) -> None:
        """The state that each segment starts from, and the last one's end: each by itself from zero, then in turn."""
        decay = self.empty(self.chunks.sequences * segments, self.H, self.KP, dtype=torch.float32)
        self.scan_segments(segments, self.config.starts, kept, w, None, starts, None, None, reverse, decay)
        bk, bv = min(self.KP, 32), min(self.VP, 64)
        constants = dict(H=self.H, K=self.K, KP=self.KP, V=self.V, VP=self.VP, BK=bk, BV=bv, REVERSE=reverse)
        programs = self.chunks.sequences * self.H * (self.KP // bk) * (self.VP // bv)
        launch(join_kernel, programs, (starts, decay, initial, final, segments), constants, {})

    def scan_segments(
        self, segments: int, config: Launch, kept: Kept, w, initial, final, out, states, reverse: bool, decay=None
    ) -> None:
        x, y = (kept.k, kept.q) if reverse else (kept.q, kept.k)
        bv, parts = config.tile["BV"], config.tile["PARTS"]
        args = (
            None if out is None else rows_of(x, CHUNK, self.KP),
            rows_of(y, CHUNK, self.KP),
            w,
            None if out is None else rows_of(kept.scores, CHUNK, CHUNK),
            None if self.g is None else kept.decay,
            out,
            None if states is None else rows_of(states, bv, self.KP // parts),
            initial,
            final,
            decay,
            *self.chunks.table,
            self.chunks.sequences,
            self.T,
            segments,
        )
        constants = dict(
            H=self.H, K=self.K, KP=self.KP, V=self.V, VP=self.VP, BV=bv, C=CHUNK, PARTS=parts,
            A_PARTS=kept.scores.shape[1], HEAD=self.per_head, REVERSE=reverse, PRECISION=self.precision,
            PREFETCH=config.tile["PREFETCH"],
        )  # fmt: skip
        blocks = triton.cdiv(self.V if states is None else self.VP, bv)
        programs = self.chunks.sequences * self.H * segments * blocks
        launch(scan_kernel, programs, args, constants, config.options)

    def segments(self, reverse: bool) -> int:
        config, N = self.config.reverse if reverse else self.config.forward, self.chunks.sequences
        return segment_count(config, N, self.H, self.V, self.chunks.count, self.q.device)

    def gradients(
        self, kept: Kept, do: Tensor, states: Tensor, dstates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dq, dk = torch.empty_like(self.q), torch.empty_like(self.k)
        first = self.q, self.k, self.g, self.v, do, signs(self.q.device)
        middle = states, dstates, dq, dk
        last = *self.chunks.table, self.scale, self.inverse, self.chunks.sequences, self.T
        common = dict(
            H=self.H, K=self.K, KP=self.KP, V=self.V, VP=self.VP, C=CHUNK,
            LOGITS=self.logits, GATE_PARTS=self.gate_parts, PRECISION=self.precision,
        )  # fmt: skip
        if self.per_head:
            wanted = has_gradient(self.g)
            config = self.config.gradients if wanted else self.config.gradients_fixed
            blocks = self.KP // config.tile["BK"]
            dg = self.empty(blocks, *self.g.shape, dtype=torch.float32) if wanted else None
            args = *first, kept.decay, *middle, dg, *last, self.B * self.T
            constants = {**common, **config.tile, "FIXED": self.fixed}
            launch(gradients_head_kernel, self.tiles * blocks, args, constants, config.options)
            return dq, dk, dg.sum(0).to(self.g.dtype) if wanted else None
        dg = torch.empty_like(self.g)
        sum_parts = 2 if self.dtype == torch.bfloat16 else 3
        for exact, config in ((False, self.config.gradients), (True, self.config.gradients_exact)):
            items, each = self.tiles * (self.KP // config.tile["BK"]), EXACT_EACH if exact else 1
            args = *first, kept.exact, *middle, dg, *last, items
            constants = {**common, **config.tile, "SUM_PARTS": sum_parts, "EXACT": exact, "EACH": each}
            launch(gradients_kernel, triton.cdiv(items, each), args, constants, config.options)
        return dq, dk, dg
