"""The gated RMSNorm on a GPU: one kernel forward, and one backward that reads every input once.

With n = x r, r = 1 / sqrt(mean x^2 + eps) and a = activation(gate), y = n weight a. Backward, with d = dy a,

    dgate = dy n weight a',   dweight = sum over rows of d n,   dx = r (d weight - n mean(d weight n))

A program holds whole rows in registers, in tiles [ROWS, width] of TILE numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glalm.kernels.triton.launch import launch, multiprocessors
from glalm.kernels.triton.tiles import LOG2E, flushed_exp2, reciprocal

TILE = 2048
WARPS = 4
PROGRAMS = 4  # of the backward kernel on a multiprocessor, as many as its registers hold


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """Return y. Shapes as for glalm.kernels.gated_norm.gated_rms_norm."""
    y = torch.empty(x.shape, device=x.device, dtype=torch.promote_types(x.dtype, gate.dtype))
    rows, constants = cut_rows(x, activation)
    args = (x.contiguous(), gate.contiguous(), weight.float().contiguous(), y, rows, float(eps))
    launch(gated_norm_kernel, triton.cdiv(rows, constants["ROWS"]), args, constants, {"num_warps": WARPS})
    return y


def backward(
    x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate and weight."""
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    dgate = torch.empty(gate.shape, device=x.device, dtype=gate.dtype)
    rows, constants = cut_rows(x, activation)
    programs = min(triton.cdiv(rows, constants["ROWS"]), PROGRAMS * multiprocessors(x.device))
    shares = torch.empty((programs, len(weight)), device=x.device, dtype=torch.float32)
    args = (
        x.contiguous(), gate.contiguous(), weight.float().contiguous(), dy.contiguous(), dx, dgate, shares, rows,
        float(eps),
    )  # fmt: skip
    launch(gated_norm_backward_kernel, programs, args, constants, {"num_warps": WARPS})
    return dx, dgate, shares.sum(0).to(weight.dtype)


def cut_rows(x: Tensor, activation: str) -> tuple[int, dict[str, int | bool]]:
    """Return the number of rows of x, and the kernels' constants."""
    V = x.shape[-1]
    width = triton.next_power_of_2(V)
    constants = {"V": V, "WIDTH": width, "ROWS": max(1, TILE // width), "SILU": activation == "silu"}
    return x.numel() // max(1, V), constants


@triton.jit
def load_rows(x, row, rows, V: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Load ROWS rows from `row` on as a float32 tile [ROWS, WIDTH], with zeros outside of x."""
    r = tl.arange(0, ROWS)
    v = tl.arange(0, WIDTH)
    mask = (row + r < rows)[:, None] & (v < V)[None, :]
    return tl.load(x + row * V + r[:, None] * V + v[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def store_rows(y, tile, row, rows, V: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Store the rows of a tile that y has."""
    r = tl.arange(0, ROWS)
    v = tl.arange(0, WIDTH)
    mask = (row + r < rows)[:, None] & (v < V)[None, :]
    tl.store(y + row * V + r[:, None] * V + v[None, :], tile.to(y.dtype.element_ty), mask=mask)


@triton.jit
def normalize(x, eps, V: tl.constexpr):
    """Return the rows of x divided by their root mean squares, and the reciprocals of these."""
    reciprocal_rms = 1 / tl.sqrt(tl.sum(x * x, 1) / V + eps)
    return x * reciprocal_rms[:, None], reciprocal_rms


@triton.jit
def activate(gate, SILU: tl.constexpr):
    """Return silu(gate) if SILU, else sigmoid(gate), and its derivative."""
    s = reciprocal(1 + flushed_exp2(-gate * LOG2E))
    slope = s * (1 - s)
    if SILU:
        return gate * s, s + gate * slope
    else:
        return s, slope


@triton.jit(do_not_specialize=["rows"])
def gated_norm_kernel(
    x, gate, weight, y, rows, eps, V: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Compute ROWS rows of y in each program. x, gate, y: [rows, V]; weight: float32 [V]."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    v = tl.arange(0, WIDTH)
    weights = tl.load(weight + v, mask=v < V, other=0)[None, :]
    normal, _ = normalize(load_rows(x, row, rows, V, WIDTH, ROWS), eps, V)
    gates, _ = activate(load_rows(gate, row, rows, V, WIDTH, ROWS), SILU)
    store_rows(y, normal * weights * gates, row, rows, V, WIDTH, ROWS)


@triton.jit(do_not_specialize=["rows"])
def gated_norm_backward_kernel(
    x, gate, weight, dy, dx, dgate, shares, rows, eps,
    V: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of every `programs`-th tile of rows, beginning with the program's number, and sum dweight.

    x, gate, dy, dx, dgate: [rows, V]; weight: float32 [V]; shares: float32 [programs, V]
    """
    v = tl.arange(0, WIDTH)
    weights = tl.load(weight + v, mask=v < V, other=0)[None, :]
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    for i in range(tl.cdiv(tl.cdiv(rows, ROWS) - program, programs)):
        row = (program + i * programs) * ROWS
        normal, reciprocal_rms = normalize(load_rows(x, row, rows, V, WIDTH, ROWS), eps, V)
        gates, slopes = activate(load_rows(gate, row, rows, V, WIDTH, ROWS), SILU)
        d = load_rows(dy, row, rows, V, WIDTH, ROWS)
        store_rows(dgate, d * normal * weights * slopes, row, rows, V, WIDTH, ROWS)
        d *= gates
        sums += d * normal
        d *= weights
        along_x = tl.sum(d * normal, 1) / V
        store_rows(dx, (d - normal * along_x[:, None]) * reciprocal_rms[:, None], row, rows, V, WIDTH, ROWS)
    tl.store(shares + program * V + v, tl.sum(sums, 0), mask=v < V)
