"""Muon (Jordan 2024): momentum whose updates are orthogonalized; with NorMuon and Polar Express as options.

An update U S V^T becomes about U V^T by five iterations X <- a X + b (X X^T) X + c (X X^T)^2 X in bfloat16, whose
coefficients bring every singular value near 1.
"""

import math
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

Coefficients = tuple[tuple[float, float, float], ...]

ITERATIONS = 5
EPS = 1e-7
# Jordan's coefficients, the same in each iteration, leave singular values between 0.7 and 1.2.
NEWTON_SCHULZ: Coefficients = ((3.4445, -4.7750, 2.0315),) * ITERATIONS
# The root mean square of AdamW's usual updates, to which Muon's are scaled (Liu et al., arXiv 2502.16982).
UPDATE_RMS = 0.2


class Muon(Optimizer):
    """Muon for matrices, with Nesterov momentum, decoupled weight decay, and updates of the size of AdamW's:

        M_t = momentum M_{t-1} + (1 - momentum) G_t,   O_t = orthogonalize((1 - momentum) G_t + momentum M_t)
        W_t = (1 - lr decay) W_{t-1} - lr 0.2 sqrt(max(rows, columns)) O_t

    With `neuron_beta` it is NorMuon (Li et al., arXiv 2510.05491): every row of O, which belongs to one output neuron,
    is divided by the root of a moving average of its mean square, and O is scaled to the norm of an orthogonal matrix.

    Parameters may be DTensors that are sharded by rows. The matrices are then divided among the processes: each gathers
    its matrices whole, orthogonalizes them and sends the rows back. Muon's result equals that of one process bit for
    bit, NorMuon's up to the rounding of its norms.

    Args:
        params: Matrices, or groups of them. In a group all are sharded over the same processes, or none is.
        orthogonalization: The coefficients: Jordan's ("newton_schulz") or those of `polar_express`.
        neuron_beta: The decay of the moving average, or None.

    Attributes:
        state_keys: What it holds of each parameter.

    Raises:
        ValueError: A parameter is no matrix or is not sharded by its rows, or those of a group are sharded differently.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float,
        momentum: float,
        orthogonalization: str = "newton_schulz",
        neuron_beta: float | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.coefficients = {"newton_schulz": NEWTON_SCHULZ, "polar_express": polar_express()}[orthogonalization]
        self.neuron_beta = neuron_beta
        self.state_keys = {"momentum_buffer"} if neuron_beta is None else {"momentum_buffer", "mean_square"}
        for group in self.param_groups:
            processes = set()
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon takes matrices, not a parameter of shape {list(parameter.shape)}.")
                # Several groups may have the same processes: torch gives a parameter the mesh of an earlier model in
                # this process if the two meshes are equal and a parameter of that model had the same shape.
                shard_group = find_shard_group(parameter)
                processes.add(shard_group and tuple(distributed.get_process_group_ranks(shard_group)))
            if len(processes) > 1:
                raise ValueError("The parameters of a group of Muon must be sharded over the same processes.")

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have gradients. Return what `closure`, which computes them, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            updates = [self._advance_momentum(parameter, group["momentum"]) for parameter in parameters]
            directions = orthogonalize_all(updates, self.coefficients)
            if self.neuron_beta is not None:
                directions = self._normalize_neurons(parameters, directions, self.neuron_beta)
            for parameter, direction in zip(parameters, directions, strict=True):
                weight = local_rows(parameter)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-group["lr"] * UPDATE_RMS * math.sqrt(max(parameter.shape)))
        return loss

    def _advance_momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update the parameter's moving average of gradients, and return the update to orthogonalize."""
        gradient = parameter.grad
        assert gradient is not None  # `step` leaves out the others.
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum)

    def _normalize_neurons(self, parameters: list[Tensor], directions: list[Tensor], beta: float) -> list[Tensor]:
        """Return the directions, of which this process has some rows, with rows of like size.

        Each has the norm sqrt(min(rows, columns)) of an orthogonal matrix.
        """
        normalized = []
        for parameter, direction in zip(parameters, directions, strict=True):
            state = self.state[parameter]
            if "mean_square" not in state:
                state["mean_square"] = torch.zeros_like(parameter[:, :1], dtype=torch.float32)
            mean_square = local_rows(state["mean_square"])
            mean_square.lerp_(direction.float().square().mean(1, keepdim=True), 1 - beta)
            normalized.append(direction.float() / (mean_square.sqrt() + EPS))
        squares = torch.stack([x.square().sum() for x in normalized])
        if (group := find_shard_group(parameters[0])) is not None:
            distributed.all_reduce(squares, group=group)
        norms = squares.sqrt().clamp(min=EPS)  # An update of zeros stays one.
        sizes = (math.sqrt(min(parameter.shape)) for parameter in parameters)
        return [x * (size / norm) for x, size, norm in zip(normalized, sizes, norms, strict=True)]


def orthogonalize(matrix: Tensor, coefficients: Coefficients) -> Tensor:
    """Return about U V^T for matrix = U S V^T, in bfloat16."""
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=EPS)  # Now no singular value is above 1, up to rounding.
    for a, b, c in coefficients:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


@cache
def polar_express(smallest: float = 1e-3, cushion: float = 0.02407327424182761, safety: float = 1.01) -> Coefficients:
    """Return the coefficients of Polar Express (Amsel et al., arXiv 2505.16932).

    Each iteration's polynomial is the one that is nearest to 1 on the interval in which the singular values then lie.

    Args:
        smallest: The smallest singular value that the iterations bring near 1.
        cushion: Polynomials are fitted as if the lower end of the interval were at least this part of its upper end,
            which keeps rounding errors small.
        safety: The polynomials of all iterations but the last are stretched by this factor, because rounding to
            bfloat16 can lift values above the interval.
    """
    lower = smallest
    upper = 1.0
    found = []
    for iteration in range(ITERATIONS):
        a, b, c = fit_quintic(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            # It was fitted to a shorter interval. Center its values on the whole one at 1.
            scale = 2 / (evaluate_quintic(a, b, c, lower) + evaluate_quintic(a, b, c, upper))
            a, b, c = a * scale, b * scale, c * scale
        lower = evaluate_quintic(a, b, c, lower)
        upper = 2 - lower  # The best polynomial deviates from 1 as much upwards as downwards.
        expected = safety if iteration < ITERATIONS - 1 else 1.0
        found.append((a / expected, b / expected**3, c / expected**5))
    return tuple(found)


def evaluate_quintic(a: float, b: float, c: float, x: float) -> float:
    return a * x + b * x**3 + c * x**5


def fit_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """Return the a, b, c for which a x + b x^3 + c x^5 is nearest to 1 on [lower, upper] at its worst point.

    By Remez' algorithm: the error of the best polynomial is equal and of alternating sign at the ends and at the two
    extrema between them.
    """
    if upper - lower < 1e-5 * upper:  # The error is that of rounding: take the Taylor polynomial at `upper`.
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    points = torch.tensor([lower, (3 * lower + upper) / 4, (lower + 3 * upper) / 4, upper], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for _ in range(30):
        system = torch.stack([points, points**3, points**5, signs], 1)
        a, b, c, _ = torch.linalg.solve(system, torch.ones_like(points)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        extrema = sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        points[1:3] = torch.tensor(extrema, dtype=torch.float64)
    return a, b, c


# Matrices that are sharded over processes ------------------------------------------------------------------


def local_rows(x: Tensor) -> Tensor:
    """Return this process's rows of a tensor that may be sharded, as a view."""
    return x.to_local() if isinstance(x, DTensor) else x


def find_shard_group(x: Tensor) -> ProcessGroup | None:
    """Return the processes that share the rows of x, or None if this process has all of them.

    Raises:
        ValueError: x is sharded by something else than its rows.
    """
    if not isinstance(x, DTensor):
        return None
    dims = [dim for dim, placement in enumerate(x.placements) if not placement.is_replicate()]
    if not dims:
        return None
    if len(dims) > 1 or x.placements[dims[0]] != Shard(0):
        raise ValueError(f"Muon takes parameters that are sharded by rows over one mesh dimension, not {x.placements}")
    return x.device_mesh.get_group(dims[0])


def orthogonalize_all(updates: list[Tensor], coefficients: Coefficients) -> list[Tensor]:
    """Return this process's rows of all updates, orthogonalized, in bfloat16.

    Where n processes share the rows, process i orthogonalizes the matrices i, i + n, i + 2n, ...
    """
    group = find_shard_group(updates[0]) if updates else None
    if group is None:
        return [orthogonalize(local_rows(update), coefficients) for update in updates]
    count = distributed.get_world_size(group)
    results = []
    for start in range(0, len(updates), count):
        results += _orthogonalize_one_each(updates[start : start + count], coefficients, group)
    return results


def _orthogonalize_one_each(updates: list[Tensor], coefficients: Coefficients, group: ProcessGroup) -> list[Tensor]:
    """Return this process's rows of at most n updates for n processes, of which process i orthogonalizes the i-th."""
    count = distributed.get_world_size(group)
    rank = distributed.get_rank(group)
    mine = [local_rows(update).bfloat16() for update in updates]
    sizes = [rows.numel() for rows in mine] + [0] * (count - len(mine))
    owned = updates[rank] if rank < len(updates) else None
    owned_sizes = [0] * count
    if owned is not None:
        # All shards but the last ones have the same number of rows.
        rows, columns = owned.shape
        shard_rows = -(-rows // count)
        owned_sizes = [columns * max(0, min(shard_rows, rows - index * shard_rows)) for index in range(count)]
    sent = torch.cat([rows.flatten() for rows in mine])
    received = sent.new_empty(sum(owned_sizes))
    distributed.all_to_all_single(received, sent, owned_sizes, sizes, group)
    if owned is not None:
        received = orthogonalize(received.view(owned.shape), coefficients).flatten()
    distributed.all_to_all_single(sent, received, sizes, owned_sizes, group)
    return [part.view_as(rows) for part, rows in zip(sent.split(sizes), mine, strict=False)]
