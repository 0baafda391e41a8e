"""The figure of what happens inside of a model's layers during training, from the statistics in metrics.jsonl."""

import re
from collections import defaultdict
from pathlib import Path

from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from glalm.evals.plot import COLORS, SIZE, STYLE, save_figure
from glalm.train.metrics import read_metrics

Curve = list[tuple[int, float]]  # (step, value)
PANELS = {  # The statistics that have a panel each, in this order, with a line for each layer.
    "half_life": "gates: half-life (tokens)",
    "retention": "gates: mean retention",
    "saturated": "gates: saturated share",
    "state_rms": "state (RMS)",
    "output_rms": "residual stream (RMS)",
}
LINEAR = ("retention", "saturated")  # All others have a logarithmic axis.


@style.context(STYLE)
def plot_layers(metrics: Path, path: str | Path) -> list[Path]:
    """Plot each layer's gates, state and activations, and the gradient norms of groups, against steps.

    Lines go from the first layer, dark, to the last, light.

    Args:
        metrics: metrics.jsonl of a run with train.statistics_every.

    Raises:
        ValueError: The file has no such statistics.
    """
    layers, gradients = read_statistics(metrics)
    names = [name for name in PANELS if name in layers]
    if not names:
        raise ValueError(f"{metrics} has no statistics of layers; train with train.statistics_every=100")
    columns = 2
    rows = -(-(len(names) + 1) // columns)
    figure = Figure(figsize=(2 * SIZE[0], rows * SIZE[1]), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, name in zip(panels, names, strict=False):
        draw_layers(ax, name, layers[name])
    ax = panels[len(names)]
    for color, (group, curve) in zip(COLORS, gradients.items(), strict=False):
        ax.plot(*zip(*curve, strict=True), color=color, label=group)
    ax.set_ylabel("gradient norm")
    use_log_axis(ax)
    ax.legend(fontsize="small", ncols=2)
    for ax in panels[: len(names) + 1]:
        ax.set_xlabel("step")
    for ax in panels[len(names) + 1 :]:
        ax.remove()
    return save_figure(figure, path)


def read_statistics(metrics: Path) -> tuple[dict[str, dict[int, Curve]], dict[str, Curve]]:
    """Return the curves of layers, {statistic: {layer: curve}}, and of gradient norms, {group: curve}."""
    layers: dict[str, dict[int, Curve]] = defaultdict(lambda: defaultdict(list))
    gradients: dict[str, Curve] = defaultdict(list)
    rows, _ = read_metrics(metrics)
    for row in rows:
        for key, value in row.items():
            if match := re.fullmatch(r"layers/(\d+)/(\w+)", key):
                layers[match[2]][int(match[1])].append((row["step"], value))
            elif key.startswith("grad_norm/"):
                gradients[key.removeprefix("grad_norm/")].append((row["step"], value))
    return layers, gradients


def use_log_axis(ax: Axes) -> None:
    """Make the values' axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def draw_layers(ax: Axes, statistic: str, curves: dict[int, Curve]) -> None:
    """Draw the panel of a statistic: a line for each layer, of which the first and the last are named."""
    first, last = min(curves), max(curves)
    for layer, curve in sorted(curves.items()):
        shade = 0.85 * (layer - first) / max(last - first, 1)
        label = f"layer {layer}" if layer in (first, last) else None
        ax.plot(*zip(*curve, strict=True), color=colormaps["viridis"](shade), linewidth=1, label=label)
    ax.legend(fontsize="small")
    ax.set_ylabel(PANELS[statistic])
    if statistic not in LINEAR:
        use_log_axis(ax)
