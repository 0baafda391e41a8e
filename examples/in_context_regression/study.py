"""Test on a CPU whether linear transformers train as transformers do, with intervals over seeds (arXiv 2310.01082).

    python examples/in_context_regression/study.py --out runs/in_context_regression

It trains linear transformers by SGD and by Adam on regression in context, from the same initial weights, with normal
and with heavy-tailed inputs. It writes a figure for each claim of the paper and all numbers as results.json.
docs/in_context_regression.md discusses them.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from linear_transformer import draw_tasks, gradient_descent_weights, mean_squared_error
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from glalm.evals.plot import COLORS, STYLE

INPUTS = {"normal": False, "heavy-tailed": True}  # the name of a distribution of x: whether it has heavy tails
OPTIMIZERS = {  # the paper's momenta, with the learning rates to choose from
    "SGD": (partial(torch.optim.SGD, momentum=0.9), [0.03, 0.1, 0.3]),
    "Adam": (partial(torch.optim.Adam, betas=(0.9, 0.9)), [0.01, 0.03, 0.1]),
}
LAYERS = 3
WIDTH = 5  # d, of the inputs
INITIAL_STD = 0.05
MAX_GRADIENT_NORM = 1.0
# The quantiles 97.5 % of Student's t distribution with 1, 2, ... degrees of freedom.
T_QUANTILES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


@dataclass
class Training:
    """The course of the models of one optimizer at its best learning rate."""

    rate: float
    steps: list[int]  # at which the others are known
    weights: Tensor  # [points, seeds, layers, 2, d, d]
    updates: Tensor  # of the same shape: the change of the weights in the next step
    losses: Tensor  # [points, seeds], on tasks that are not trained on


def interval(values: Tensor) -> dict[str, float]:
    """Return the mean of one number per seed, and its interval of 95 % confidence."""
    half = T_QUANTILES[len(values) - 2] * values.std().item() / len(values) ** 0.5
    mean = values.mean().item()
    return {"mean": mean, "low": mean - half, "high": mean + half}


def train(optimizer: str, initial: Tensor, heavy_tails: bool, args: argparse.Namespace) -> Training:
    """Train models from `initial` [seeds, ...] at each learning rate. Return the training at the best one."""
    build, rates = OPTIMIZERS[optimizer]
    rates = [args.rate] if args.rate else rates
    parameters = [initial.clone().requires_grad_() for _ in rates]
    stepper = build([{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)])
    random = np.random.default_rng(1)
    held_out = draw_tasks(1, 4000, np.random.default_rng(2), heavy_tails=heavy_tails)
    every = max(1, args.steps // args.points)
    weights, updates, losses = [], [], []
    for step in range(every * args.points + 1):
        before = torch.stack([p.detach().clone() for p in parameters])
        tasks = draw_tasks(len(initial), args.batch, random, heavy_tails=heavy_tails)
        stepper.zero_grad()
        for p in parameters:
            mean_squared_error(p, tasks).sum().backward()
            norm = p.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
            p.grad *= (MAX_GRADIENT_NORM / norm).clamp(max=1)
        stepper.step()
        if step % every == 0:
            weights.append(before)
            updates.append(torch.stack([p.detach() for p in parameters]) - before)
            with torch.no_grad():
                losses.append(torch.stack([mean_squared_error(w, held_out.expand(len(w))) for w in before]))
    losses = torch.stack(losses)  # [points, rates, seeds]
    best = int(losses[-args.points // 5 :].mean((0, 2)).nan_to_num(torch.inf).argmin())
    steps = list(range(0, every * args.points + 1, every))
    return Training(rates[best], steps, torch.stack(weights)[:, best], torch.stack(updates)[:, best], losses[:, best])


def best_gradient_descent(heavy_tails: bool) -> float:
    """Return the least loss of gradient descent with one step per layer, of one size for all tasks."""
    tasks = draw_tasks(1, 4000, np.random.default_rng(2), heavy_tails=heavy_tails)
    sizes = torch.linspace(0.01, 1, 100).tolist()
    losses = [mean_squared_error(gradient_descent_weights(eta, LAYERS, WIDTH), tasks).item() for eta in sizes]
    return min(losses)


def gradient_noise(initial: Tensor, heavy_tails: bool, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the norms of the noise of stochastic gradients, and of normal noise of its covariance, [seeds, draws]."""
    random = np.random.default_rng(3)
    generator = torch.Generator().manual_seed(3)
    norms, normal_norms = [], []
    for weights in initial:
        gradients = []
        for _ in range(args.draws // 20):
            copies = weights.expand(20, *weights.shape).clone().requires_grad_()
            tasks = draw_tasks(20, args.batch, random, heavy_tails=heavy_tails)
            mean_squared_error(copies, tasks).sum().backward()
            gradients.append(copies.grad.flatten(1))
        noise = torch.cat(gradients)
        noise -= noise.mean(0)
        # A random combination of the draws has their covariance, and is normal.
        mixed = torch.randn(len(noise), len(noise), generator=generator) @ noise / len(noise) ** 0.5
        norms.append(noise.norm(dim=1))
        normal_norms.append(mixed.norm(dim=1))
    return torch.stack(norms), torch.stack(normal_norms)


def tail(norms: Tensor) -> Tensor:
    """Return the 99th percentile over the median, for each seed."""
    return norms.quantile(0.99, dim=1) / norms.median(1).values


def hessian_product(weights: Tensor, vectors: Tensor, heavy_tails: bool, tasks: int) -> tuple[Tensor, Tensor]:
    """Return the gradients and the Hessians' products with `vectors`, for weights and vectors [models, ...]."""
    weights = weights.clone().requires_grad_()
    held_out = draw_tasks(1, tasks, np.random.default_rng(4), heavy_tails=heavy_tails)
    loss = mean_squared_error(weights, held_out.expand(len(weights))).sum()
    [gradient] = torch.autograd.grad(loss, weights, create_graph=True)
    [product] = torch.autograd.grad((gradient * vectors).sum(), weights)
    return gradient.detach(), product


def condition_numbers(training: Training, heavy_tails: bool, args: argparse.Namespace) -> tuple[list[int], Tensor]:
    """Return steps, and there the robust condition numbers [points, seeds]: max |H_ii| / median |H_ii|."""
    chosen = torch.linspace(0, args.points, args.curvature_points).long()
    weights = training.weights[chosen].flatten(0, 1)
    diagonal = []
    for unit in torch.eye(weights[0].numel()):
        vector = unit.view(weights[0].shape)
        _, product = hessian_product(weights, vector, heavy_tails, args.curvature_tasks)
        diagonal.append((product * vector).flatten(1).sum(1).abs())
    diagonal = torch.stack(diagonal)
    numbers = diagonal.max(0).values / diagonal.median(0).values
    return [training.steps[i] for i in chosen], numbers.view(len(chosen), -1)


def smoothness(training: Training, heavy_tails: bool, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the gradient norms and the curvatures in the direction of the update, [points, seeds].

    Far from the optimum, the curvature may be negative.
    """
    weights = training.weights[:-1].flatten(0, 1)
    updates = training.updates[:-1].flatten(0, 1)
    direction = updates / updates.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1, 1)
    gradient, product = hessian_product(weights, direction, heavy_tails, args.curvature_tasks)
    shape = training.losses[:-1].shape
    return gradient.flatten(1).norm(dim=1).view(shape), (product * direction).flatten(1).sum(1).view(shape)


def correlate(norms: Tensor, curvatures: Tensor) -> Tensor:
    """Return the correlation of the logarithms for each seed, over the points of positive curvature."""
    correlations = []
    for x, y in zip(norms.T, curvatures.T, strict=True):
        both = torch.stack([x, y])[:, y > 0].log()
        correlations.append(torch.corrcoef(both)[0, 1])
    return torch.stack(correlations)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures and results.json")
    parser.add_argument("--seeds", type=int, default=6, choices=range(2, 11), help="models of each kind")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--points", type=int, default=50, help="steps at which a training is measured")
    parser.add_argument("--batch", type=int, default=200, help="tasks per step; the paper's code has 1000")
    parser.add_argument("--rate", type=float, help="learning rate of both optimizers; default: the best of each one's")
    parser.add_argument("--draws", type=int, default=1000, help="stochastic gradients of each model")
    parser.add_argument("--curvature-points", type=int, default=6, help="steps at which Hessians are computed")
    parser.add_argument("--curvature-tasks", type=int, default=250)
    return parser.parse_args()


def run_study(args: argparse.Namespace) -> tuple[dict, dict]:
    """Return everything that is measured, by the inputs' distribution, and the claims' numbers with their intervals."""
    initial = INITIAL_STD * torch.randn(args.seeds, LAYERS, 2, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    measured = {}
    claims = {}
    for name, heavy_tails in INPUTS.items():
        runs = {optimizer: train(optimizer, initial, heavy_tails, args) for optimizer in OPTIMIZERS}
        noise = gradient_noise(initial, heavy_tails, args)
        conditions = {optimizer: condition_numbers(run, heavy_tails, args) for optimizer, run in runs.items()}
        smooth = {optimizer: smoothness(run, heavy_tails, args) for optimizer, run in runs.items()}
        measured[name] = {
            "runs": runs,
            "gradient_descent": best_gradient_descent(heavy_tails),
            "noise": noise,
            "conditions": conditions,
            "smoothness": smooth,
        }
        last = -args.points // 5  # the last fifth of the training
        logs = {optimizer: run.losses[last:].mean(0).log10() for optimizer, run in runs.items()}
        robust = {optimizer: numbers[1:].log10().mean(0) for optimizer, (_, numbers) in conditions.items()}
        claims[name] = {
            "learning_rates": {optimizer: run.rate for optimizer, run in runs.items()},
            "loss of gradient descent in context": measured[name]["gradient_descent"],
            "final loss of SGD, log10": interval(logs["SGD"]),
            "final loss of Adam, log10": interval(logs["Adam"]),
            "final loss of SGD over Adam, log10": interval(logs["SGD"] - logs["Adam"]),
            "99th percentile of the noise over its median": interval(tail(noise[0])),
            "the same of normal noise": interval(tail(noise[1])),
            "their difference": interval(tail(noise[0]) - tail(noise[1])),
            "robust condition number of SGD over Adam, log10": interval(robust["SGD"] - robust["Adam"]),
        }
        for optimizer, (norms, curvatures) in smooth.items():
            claims[name][f"correlation of log smoothness and log gradient norm, {optimizer}"] = interval(
                correlate(norms, curvatures)
            )
            claims[name][f"share of points of positive curvature, {optimizer}"] = (
                (curvatures > 0).double().mean().item()
            )
    return measured, claims


def new_figure(logarithmic: str) -> tuple[Figure, list]:
    """Return a figure with one pair of axes for each distribution of the inputs. `logarithmic` is "y" or "xy"."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    panels = figure.subplots(1, len(INPUTS))
    for axes, name in zip(panels, INPUTS, strict=True):
        axes.set_title(f"{name} inputs")
        for direction in logarithmic:
            axis = axes.yaxis if direction == "y" else axes.xaxis
            axes.set(**{f"{direction}scale": "log"})
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    return figure, list(panels)


def plot_with_interval(axes, steps: list[int], values: Tensor, color: str, label: str) -> None:
    """Plot the geometric mean over the seeds of values [points, seeds], and its interval."""
    rows = [interval(row) for row in values.log10()]
    low, mean, high = (np.array([10 ** row[key] for row in rows]) for key in ("low", "mean", "high"))
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(steps, mean, color=color, label=label)


def plot_losses(measured: dict) -> Figure:
    figure, panels = new_figure("y")
    for axes, results in zip(panels, measured.values(), strict=True):
        for color, (optimizer, run) in zip(COLORS, results["runs"].items(), strict=False):
            plot_with_interval(axes, run.steps, run.losses, color, f"{optimizer}, rate {run.rate:g}")
        axes.axhline(results["gradient_descent"], color="black", linestyle=":", label="gradient descent in context")
        axes.set(xlabel="training steps", ylabel="loss")
        axes.legend()
    return figure


def plot_noise(measured: dict) -> Figure:
    figure, panels = new_figure("xy")
    for axes, results in zip(panels, measured.values(), strict=True):
        for color, norms, label in zip(COLORS, results["noise"], ("stochastic gradients", "normal"), strict=False):
            relative = (norms / norms.median(1, keepdim=True).values).flatten().sort().values
            exceeding = 1 - np.arange(len(relative)) / len(relative)
            axes.plot(relative, exceeding, color=color, label=label)
        axes.set(xlabel="norm of the noise / its median", ylabel="share of larger norms")
        axes.legend()
    return figure


def plot_condition_numbers(measured: dict) -> Figure:
    figure, panels = new_figure("y")
    for axes, results in zip(panels, measured.values(), strict=True):
        for color, (optimizer, (steps, numbers)) in zip(COLORS, results["conditions"].items(), strict=False):
            plot_with_interval(axes, steps, numbers, color, optimizer)
        axes.set(xlabel="training steps", ylabel="max |Hii| / median |Hii|")
        axes.legend()
    return figure


def plot_smoothness(measured: dict) -> Figure:
    figure, panels = new_figure("xy")
    for axes, results in zip(panels, measured.values(), strict=True):
        for color, (optimizer, (norms, curvatures)) in zip(COLORS, results["smoothness"].items(), strict=False):
            convex = curvatures > 0
            axes.scatter(norms[convex], curvatures[convex], s=4, color=color, label=optimizer, linewidth=0, alpha=0.6)
        axes.set(xlabel="gradient norm", ylabel="smoothness")
        axes.legend()
    return figure


FIGURES = {
    "adam_and_sgd": plot_losses,
    "gradient_noise": plot_noise,
    "condition_number": plot_condition_numbers,
    "smoothness": plot_smoothness,
}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # Threads cost more than they save on matrices of 5 x 5.
    args.out.mkdir(parents=True, exist_ok=True)
    measured, claims = run_study(args)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    (args.out / "results.json").write_text(json.dumps({"settings": settings, "claims": claims}, indent=2) + "\n")
    for name, plot in FIGURES.items():
        with style.context(STYLE):
            plot(measured).savefig(args.out / f"in_context_{name}.png", dpi=100)
    print(json.dumps(claims, indent=2))


if __name__ == "__main__":
    main()
