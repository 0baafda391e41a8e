"""Figures from a run's JSON files, in the size and the type of a paper's column. Nothing here needs the model."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from glalm.evals.results import read_json, read_metrics, tokens_of

# Okabe and Ito's palette, told apart in every form of colour blindness; its yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dvp*"
STYLE = {
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "legend.frameon": False,
}
SIZE = (5.5, 3.3)  # inches: a one-column paper's text width
GREY = "#555555"


def plot_extrapolation(results: Sequence[dict | str | Path], path: str | Path) -> Path:
    """Perplexity against position for one or more runs; writes the PNG `path` and returns it.

    results: eval/extrapolation.json of each run, loaded or as paths. A point is a bucket of positions, drawn at its
    end; the band is one standard error over documents; dotted, the same text with the state reset every training
    length. Raises ValueError when there is none, or a file is missing.
    """
    results = [r if isinstance(r, dict) else _existing(Path(r)) for r in results]
    if not results:
        raise ValueError("results is empty: give the extrapolation.json of at least one run")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        ax = figure.subplots()
        for i, result in enumerate(results):
            _curve(ax, result, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        buckets = [b for r in results for b in r["results"]["buckets"]]
        lengths = sorted({r["results"]["train_length"] for r in results})
        _positions(ax, lengths, last=max(b["end"] for b in buckets))
        _perplexities(ax, [b["perplexity"] for b in buckets])
        ax.set_xlabel("position in document (tokens)")
        ax.set_ylabel("perplexity")
        figure.legend(loc="outside upper center", ncols=min(len(results), 2))
        return _save(figure, path)


def plot_training(metrics: str | Path, path: str | Path) -> Path:
    """Training and validation loss against tokens, from a metrics.jsonl; writes the PNG `path` and returns it.

    Raises ValueError when the file is missing or has no loss.
    """
    rows = read_metrics(Path(metrics))
    tokens = tokens_of(rows)
    training, validation = (
        [(t, row[key]) for t, row in zip(tokens, rows, strict=True) if key in row] for key in ("loss", "val_loss")
    )
    if not training and not validation:
        raise ValueError(f"{metrics} is missing or holds no loss: train the run first")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        ax = figure.subplots()
        if training:
            ax.plot(*zip(*training, strict=True), color=COLOURS[5], label="training", linewidth=1)
        if validation:
            ax.plot(*zip(*validation, strict=True), "o-", color=COLOURS[0], label="validation")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: quantity(x)))
        ax.set_xlabel("tokens trained on")
        ax.set_ylabel("loss (nats per token)")
        _perplexity_axis(ax)
        ax.legend(loc="upper right")
        return _save(figure, path)


# ---------------------------------------------------------------------------------------------------- the elements


def _curve(ax: Axes, result: dict, colour: str, marker: str) -> None:
    buckets = result["results"]["buckets"]
    ends = [b["end"] for b in buckets]
    label = f"{result['run']} ({quantity(result['parameters'])} parameters)"
    ax.plot(ends, [b["perplexity"] for b in buckets], color=colour, marker=marker, label=label)
    reset = [b["perplexity"] for b in result["results"]["reset"]]
    every = length(result["results"]["train_length"])
    ax.plot(ends, reset, color=colour, linestyle=":", linewidth=1, label=f"state reset every {every} tokens")
    if all(b["standard_error"] is not None for b in buckets):
        low, high = ([b[key] for b in buckets] for key in ("perplexity_low", "perplexity_high"))
        ax.fill_between(ends, low, high, color=colour, alpha=0.18, linewidth=0)


def _positions(ax: Axes, train_lengths: list[int], last: int) -> None:
    """A log2 axis with a tick at every doubling of the training length, and above it the multiples of that length."""
    shortest = train_lengths[0]
    doublings = range(-1, int(math.log2(last / shortest)) + 1)
    step = 1 + len(doublings) // 9  # at most nine labels fit
    ax.set_xscale("log", base=2)
    _ticks(ax, {shortest * 2**k: length(shortest * 2**k) for k in doublings if k % step == 0})
    marks = dict.fromkeys(train_lengths, "training\nlength")
    for at in marks:
        ax.axvline(at, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    if len(train_lengths) == 1:  # multiples of several lengths would read as one another's
        multiples = [n * 10**k for n in (2, 4, 10) for k in range(6)]  # an octave apart: their labels never touch
        marks |= {n * shortest: f"{n}×" for n in multiples if n * shortest <= last}
    top = ax.secondary_xaxis("top")
    top.spines["top"].set_visible(False)
    top.tick_params(colors=GREY, length=2)
    _ticks(top, marks)


def _ticks(ax: Axes, labels: dict[int, str]) -> None:
    ax.xaxis.set_major_locator(FixedLocator([*labels]))
    ax.xaxis.set_major_formatter(FixedFormatter([*labels.values()]))
    ax.xaxis.set_minor_locator(NullLocator())


def _perplexities(ax: Axes, values: list[float]) -> None:
    """Linear, unless one run would flatten the others."""
    if max(values) > 8 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _perplexity_axis(ax: Axes) -> None:
    """The same losses as perplexities, on the right."""
    right = ax.secondary_yaxis("right", functions=(np.exp, _log))
    right.set_ylabel("perplexity")
    right.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    right.yaxis.set_minor_formatter(NullFormatter())


def _log(perplexity: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(perplexity, 1e-9))  # matplotlib also asks about perplexities of 0


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    figure.savefig(partial, format="png", dpi=200)
    partial.replace(path)
    return path


def _existing(path: Path) -> dict:
    result = read_json(path)
    if result is None:
        raise ValueError(f"{path} is missing: python eval.py evals=[extrapolation] writes it")
    return result


def length(tokens: float) -> str:
    """4096 as 4K, as lengths of text are usually given; others in full."""
    tokens = round(tokens)
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def quantity(n: float) -> str:
    """1.2M, 340M, 1.37B, 15B: three digits at most."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= 0.9995 * scale:
            return f"{n / scale:.3g}{unit}"
    return f"{n:.3g}"
