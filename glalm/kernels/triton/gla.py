"""The operator: which kernels run, in which order, over which buffers."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from glalm.kernels.triton.blocks import CHUNK, Chunks, signs
from glalm.kernels.triton.configs import Config, Launch, config_for, multiprocessors
from glalm.kernels.triton.dscores import dscores_kernel
from glalm.kernels.triton.gradients import gradients_kernel
from glalm.kernels.triton.launch import launch
from glalm.kernels.triton.prepare import prepare_kernel
from glalm.kernels.triton.scan import join_kernel, scan_kernel


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """q, k, g: [B, T, H, K]; v: [B, T, H, V]; states: float32 [N, H, K, V]. Returns (o as v, final state or None)."""
    plan = Plan(q, k, v, g, scale, cu_seqlens)
    hats = plan.prepare(low=False)
    o = torch.empty_like(plan.v)
    final = plan.new_state() if output_final_state else None
    plan.scan(hats, plan.v, initial_state, final, out=o)
    return o, final


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`, from its inputs alone: (dq, dk, dv, dg, dinitial_state or None)."""
    plan = Plan(q, k, v, g, scale, cu_seqlens)
    hats = plan.prepare(low=True)
    do = do.contiguous()
    dv = torch.empty_like(plan.v)
    dinitial = plan.new_state() if initial_state is not None else None
    states, dstates = plan.new_states(), plan.new_states()
    plan.scan(hats, plan.v, initial_state, None, states=states)
    plan.scan(hats, do, dfinal_state, dinitial, out=dv, states=dstates, reverse=True)
    dq, dk, dg = plan.gradients(hats.exact, do, states, dstates)
    return dq, dk, dv, dg, dinitial


class Hats(NamedTuple):
    """What prepare_kernel makes, indexed by chunk and head."""

    q: Tensor  # [tiles, CHUNK, KP]
    k: Tensor
    scores: Tensor  # [tiles, 1 or 2, CHUNK, CHUNK]
    half: Tensor  # [tiles, KP], float32
    exact: Tensor  # [tiles], int32


def rows_of(x: Tensor, *block: int) -> TensorDescriptor:
    """Blocks of a buffer seen as rows of its last dimension."""
    width = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], list(block))


class Plan:
    """One call's sizes, chunks, precision and tile sizes, and the launches as methods."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cu_seqlens: Tensor | None):
        self.q, self.k, self.v, self.g = (x.contiguous() for x in (q, k, v, g))
        self.scale = scale
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.KP, self.VP = (max(16, triton.next_power_of_2(n)) for n in (self.K, self.V))
        self.chunks = Chunks.of(self.B, self.T, cu_seqlens)
        self.tiles = self.chunks.count * self.H
        # float16 has too few exponents for the rescaled operands, tf32 has its mantissa and float32's exponents.
        self.dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        precise = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        self.precision = "tf32x3" if precise else "tf32"
        self.gate_parts = 1 if g.dtype == torch.bfloat16 else 3
        self.config: Config = config_for(q.device, self.KP, self.VP, self.dtype.itemsize * 8)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.q.device, dtype=dtype or self.dtype)

    def new_state(self, segments: int = 1) -> Tensor:
        return self.empty(self.chunks.sequences * segments, self.H, self.K, self.V, dtype=torch.float32)

    def new_states(self) -> Tensor:
        return self.empty(self.tiles, self.VP, self.KP)

    def prepare(self, low: bool) -> Hats:
        """low: keep the scores in two parts."""
        low = low and self.dtype == torch.bfloat16
        hats = Hats(
            self.empty(self.tiles, CHUNK, self.KP),
            self.empty(self.tiles, CHUNK, self.KP),
            self.empty(self.tiles, 1 + low, CHUNK, CHUNK),
            self.empty(self.tiles, self.KP, dtype=torch.float32),
            self.empty(self.tiles, dtype=torch.int32),
        )
        args = (self.q, self.k, self.g, signs(self.q.device), *hats, *self.chunks.table, self.scale)
        args += self.chunks.sequences, self.T
        for exact, config in ((False, self.config.prepare), (True, self.config.prepare_exact)):
            constants = dict(
                H=self.H, K=self.K, KP=self.KP, BK=config.tile["BK"], C=CHUNK, GATE_PARTS=self.gate_parts,
                PRECISION=self.precision, LOW=low, EXACT=exact,
            )  # fmt: skip
            launch(prepare_kernel, self.tiles, args, constants, config.options)
        return hats

    def scan(
        self,
        hats: Hats,
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
        config = self.config.reverse if reverse else self.config.states if out is None else self.config.forward
        segments = self.segments(config)
        if segments == 1:
            return self.scan_segments(1, config, hats, w, initial, final, out, states, reverse)
        heads = self.chunks.sequences * self.H
        local = self.new_state(segments)
        decay = self.empty(self.chunks.sequences * segments, self.H, self.KP, dtype=torch.float32)
        self.scan_segments(segments, self.config.states, hats, w, None, local, None, None, reverse, decay)
        bk, bv = min(self.KP, 32), min(self.VP, 64)
        constants = dict(H=self.H, K=self.K, KP=self.KP, V=self.V, VP=self.VP, BK=bk, BV=bv, REVERSE=reverse)
        programs = heads * (self.KP // bk) * (self.VP // bv)
        launch(join_kernel, programs, (local, decay, initial, final, segments), constants, {})
        self.scan_segments(segments, config, hats, w, local, None, out, states, reverse)

    def scan_segments(
        self, segments: int, config: Launch, hats: Hats, w, initial, final, out, states, reverse: bool, decay=None
    ) -> None:
        x, y = (hats.k, hats.q) if reverse else (hats.q, hats.k)
        bv, parts = config.tile["BV"], config.tile["PARTS"]
        args = (
            None if out is None else rows_of(x, CHUNK, self.KP),
            rows_of(y, CHUNK, self.KP),
            w,
            None if out is None else rows_of(hats.scores, CHUNK, CHUNK),
            hats.half,
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
            LOW=hats.scores.shape[1] == 2, REVERSE=reverse, PRECISION=self.precision,
        )  # fmt: skip
        programs = self.chunks.sequences * self.H * segments * triton.cdiv(self.V, bv)
        launch(scan_kernel, programs, args, constants, config.options)

    def segments(self, config: Launch) -> int:
        """As many as give each multiprocessor eight warps, but none shorter than four chunks on average."""
        programs = self.chunks.sequences * self.H * triton.cdiv(self.V, config.tile["BV"])
        slots = multiprocessors(self.q.device) * max(1, 8 // config.warps)
        mean = self.chunks.count // max(1, self.chunks.sequences)
        return max(1, min(slots // max(1, programs), mean // 4))

    def gradients(self, exact: Tensor, do: Tensor, states: Tensor, dstates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dg = torch.empty_like(self.q), torch.empty_like(self.k), torch.empty_like(self.g)
        args = (
            self.q, self.k, self.g, self.v, do, signs(self.q.device), exact, self.dscores(do), states, dstates,
            dq, dk, dg, *self.chunks.table, self.scale, self.chunks.sequences, self.T,
        )  # fmt: skip
        for exact_path, config in ((False, self.config.gradients), (True, self.config.gradients_exact)):
            bk = config.tile["BK"]
            constants = dict(
                H=self.H, K=self.K, KP=self.KP, V=self.V, VP=self.VP, BK=bk, BV=config.tile["BV"], C=CHUNK,
                GATE_PARTS=self.gate_parts, SUM_PARTS=2 if self.dtype == torch.bfloat16 else 3,
                PRECISION=self.precision, EXACT=exact_path,
            )  # fmt: skip
            launch(gradients_kernel, self.tiles * (self.KP // bk), args, constants, config.options)
        return dq, dk, dg

    def dscores(self, do: Tensor) -> Tensor | None:
        """None where one program of gradients_kernel sees all of K and may as well compute dA itself."""
        if self.config.gradients.tile["BK"] == self.config.gradients_exact.tile["BK"] == self.KP:
            return None
        dscores, config = self.empty(self.tiles, 2, CHUNK, CHUNK), self.config.dscores
        args = do, self.v, dscores, *self.chunks.table, self.chunks.sequences, self.T
        constants = dict(
            H=self.H, V=self.V, VP=self.VP, BV=config.tile["BV"], C=CHUNK, PRECISION=self.precision
        )  # fmt: skip
        launch(dscores_kernel, self.tiles, args, constants, config.options)
        return dscores
