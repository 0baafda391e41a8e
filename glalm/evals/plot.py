"""Figures from results' JSON files, in the size and the type of a paper's column. Nothing here needs the model.

Every function writes PATH.png and PATH.svg, whatever the suffix it is given, and returns these two paths. A result is
what an evaluator writes, loaded or as the path of its file.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, NullLocator

from glalm.data.files import atomic_write
from glalm.evals.result_files import read_json, read_metrics, tokens_of

Result = dict | str | Path

# Okabe and Ito's palette, told apart in every form of colour blindness, less its yellow, which is too pale on white;
# and five more, which markers help to tell from it.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#332288", "#8C510A", "#888888"),
)
MARKERS = "os^Dvp*X<>P"  # one less than there are colours: 132 models before two are drawn alike
STYLE = {
    "figure.figsize": (4.5, 2.9),  # inches: fits a paper's column, and its type can be read on a phone
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
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
    "svg.fonttype": "path",  # looks the same where the font is missing
    "svg.hashsalt": "glalm",  # the same figure is the same file
}
WIDTH, HEIGHT = STYLE["figure.figsize"]
GREY = "#555555"
ABOVE = 4  # entries of a legend that stand above the axes
OTHER_CONTEXTS = {  # the line of a context that is not a figure's first, and what it is
    "stateful": ("-.", "state carried"),
    "sliding_window": ("--", "window of the training length"),
    "reset": (":", "state reset every training length"),
}


@matplotlib.rc_context(STYLE)
def plot_extrapolation(results: Sequence[Result], path: str | Path) -> list[Path]:
    """Perplexity against position for one or more models.

    results: extrapolation.json of each. A point is a bucket of positions, drawn at its end; the band is one standard
    error over documents; buckets that no document fills are not drawn. A model's first context is solid, its others
    are in OTHER_CONTEXTS' lines. Raises ValueError when there is none, or a file is missing.
    """
    results = _load(results, "extrapolation")
    ax = Figure().subplots()
    others = [name for i, result in enumerate(results) for name in _curves(ax, result, i)]
    buckets = [b for r in results for c in r["results"]["contexts"].values() for b in _filled(c)]
    lengths = sorted({r["results"]["train_length"] for r in results})
    _positions(ax, lengths, last=max(b["end"] for b in buckets))
    _perplexities(ax, [b["perplexity"] for b in buckets])
    ax.set_xlabel("position in document (tokens)")
    ax.set_ylabel("perplexity")
    _legend(ax, others)
    return _save(ax.figure, path)


@matplotlib.rc_context(STYLE)
def plot_ratios(results: Sequence[Result], path: str | Path) -> list[Path]:
    """Perplexity at n training lengths over that at one, against n, for one or more models: their first contexts.

    The band is one standard error of the paired difference over documents. Raises as plot_extrapolation does.
    """
    results = _load(results, "extrapolation")
    ax = Figure().subplots()
    values, largest = [1.0], 2
    for i, result in enumerate(results):
        name, context = next(iter(result["results"]["contexts"].items()))
        points = [(int(n), r) for n, r in context["ratios"].items() if r["documents"]]
        at = [1, *(n for n, _ in points)]
        ratios = [1, *(r["ratio"] for _, r in points)]
        [line] = ax.plot(at, ratios, **_style(i), label=_label(result, name))
        _band(line, [(1, 1), *((r["low"], r["high"]) for _, r in points)])
        values, largest = values + ratios, max(largest, *at)
    for line in (ax.axhline, ax.axvline):
        line(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    ax.set_xscale("log", base=2)
    _ticks(ax, {n: "training\nlength" if n == 1 else f"{n}×" for n in powers_of_two(1, largest)})
    _perplexities(ax, values)
    ax.set_xlabel("position in document")
    ax.set_ylabel("perplexity / at the training length")
    _legend(ax)
    return _save(ax.figure, path)


@matplotlib.rc_context(STYLE)
def plot_training(metrics: str | Path, path: str | Path) -> list[Path]:
    """Training and validation loss against tokens, from a metrics.jsonl.

    Raises ValueError when the file is missing or has no loss.
    """
    training, validation = (_curve(metrics, key) for key in ("loss", "val_loss"))
    if not training and not validation:
        raise ValueError(f"{metrics} is missing or holds no loss: train the run first")
    ax = Figure().subplots()
    if training:
        ax.plot(*zip(*training, strict=True), color=COLOURS[5], label="training", linewidth=1)
    if validation:
        ax.plot(*zip(*validation, strict=True), **_style(0), label="validation")
    _losses(ax, "loss (nats per token)")
    ax.legend(loc="upper right")
    return _save(ax.figure, path)


@matplotlib.rc_context(STYLE)
def plot_losses(metrics: dict[str, Path], path: str | Path) -> list[Path]:
    """Validation loss against tokens of several runs: {name: metrics.jsonl}. Raises ValueError when none has any."""
    curves = {name: points for name, file in metrics.items() if (points := _curve(file, "val_loss"))}
    if not curves:
        raise ValueError(f"{', '.join(map(str, metrics.values())) or 'metrics'}: no validation loss in any")
    ax = Figure().subplots()
    for i, (name, points) in enumerate(curves.items()):
        ax.plot(*zip(*points, strict=True), **_style(i), label=name)
    _losses(ax, "validation loss (nats per token)")
    _legend(ax)
    return _save(ax.figure, path)


@matplotlib.rc_context(STYLE)
def plot_mqar(results: Sequence[Result], path: str | Path) -> list[Path]:
    """Accuracy of multi-query associative recall against width, a panel a length, a curve a mixer (arXiv 2312.04927,
    figure 2): the best over learning rates. results: those of scripts/mqar.py, one a trained model.
    """
    rows = [r["results"] for r in _load(results, "mqar")]
    lengths = sorted({(r["length"], r["pairs"]) for r in rows})
    mixers = list(dict.fromkeys(r["mixer"] for r in rows))
    figure = Figure(figsize=(max(WIDTH, 1.9 * len(lengths)), 2.6))
    axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for ax, (tokens, pairs) in zip(axes, lengths, strict=True):
        for i, mixer in enumerate(mixers):
            best = {}
            for r in rows:
                if (r["length"], r["pairs"], r["mixer"]) == (tokens, pairs, mixer):
                    best[r["width"]] = max(r["accuracy"], best.get(r["width"], 0))
            widths = sorted(best)
            ax.plot(widths, [best[w] for w in widths], **_style(i), label=mixer)
        ax.set_title(f"{tokens} tokens, {pairs} pairs", fontsize=8)
        ax.set_xscale("log", base=2)
        _ticks(ax, {w: str(w) for w in sorted({r["width"] for r in rows})})
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("width")
    axes[0].set_ylabel("accuracy")
    _legend(axes[0])
    return _save(figure, path)


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def plot_needle(result: Result, path: str | Path) -> list[Path]:
    """Accuracy of the needle's answer by length (across) and depth (down), as a heat map, for one model."""
    [result] = _load([result], "needle")
    cells = result["results"]["cells"]
    lengths, depths = (sorted({c[key] for c in cells}) for key in ("length", "depth"))
    grid = np.full((len(depths), len(lengths)), np.nan)
    for c in cells:
        grid[depths.index(c["depth"]), lengths.index(c["length"])] = c["token_accuracy"]
    ax = Figure().subplots()
    image = ax.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        colour = "black" if value > 0.6 else "white"
        ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7)
    ax.set_xticks(range(len(lengths)), [length(n) for n in lengths])
    ax.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths])
    ax.set_xlabel("length (tokens)")
    ax.set_ylabel("depth of the needle")
    ax.set_title(_label(result), fontsize=9)
    ax.figure.colorbar(image, label="accuracy of the answer's tokens", format=lambda x, _: f"{100 * x:.0f}%")
    return _save(ax.figure, path)


@matplotlib.rc_context(STYLE)
def plot_decoding(results: Sequence[Result], path: str | Path) -> list[Path]:
    """Decoding tokens a second, and the bytes that a sequence's state takes, against length, for one or more models."""
    results = _load(results, "decode_speed")
    figure = Figure(figsize=(1.25 * WIDTH, HEIGHT))
    speed, memory = figure.subplots(1, 2)
    for i, result in enumerate(results):
        rows = result["results"]["lengths"]
        style = _style(i) | {"label": _label(result)}
        at = [r["length"] for r in rows]
        speed.plot(at, [r["tokens_per_second"] for r in rows], **style)
        memory.plot(at, [r["state_bytes"] / r["batch_size"] for r in rows], **style)
    for ax in (speed, memory):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: length(x))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("tokens behind (length)")
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens per second")
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter(lambda y, _: bytes_of(y))
    memory.set_ylabel("state of a sequence")
    _legend(speed)
    return _save(figure, path)


# ---------------------------------------------------------------------------------------------------- the elements


def _load(results: Sequence[Result], evaluator: str) -> list[dict]:
    if not results:
        raise ValueError(f"results is empty: give the {evaluator}.json of at least one run")
    return [r if isinstance(r, dict) else existing(Path(r), evaluator) for r in results]


def existing(path: Path, evaluator: str) -> dict:
    """An evaluator's file. Raises ValueError, with the command that makes it, when it is missing."""
    result = read_json(path)
    if result is None:
        raise ValueError(f"{path} is missing: python eval.py evals=[{evaluator}] writes it")
    return result


def _curves(ax: Axes, result: dict, i: int) -> list[str]:
    """Draws a model's contexts; returns the names of those after the first."""
    first, *others = result["results"]["contexts"].items()
    buckets = _filled(first[1])
    ends = [b["end"] for b in buckets]
    # Markers so far apart, in diagonals of the axes, that their shapes are seen; a single point would have none.
    apart = 0.03 if len(ends) > 1 else None
    y = [b["perplexity"] for b in buckets]
    [line] = ax.plot(ends, y, **_style(i), markevery=apart, label=_label(result, first[0]))
    _band(line, [(b["perplexity_low"], b["perplexity_high"]) for b in buckets])
    for name, context in others:
        buckets = _filled(context)
        x, y = [b["end"] for b in buckets], [b["perplexity"] for b in buckets]
        ax.plot(x, y, color=line.get_color(), linestyle=OTHER_CONTEXTS[name][0], linewidth=1)
    return [name for name, _ in others]


def _filled(context: dict) -> list[dict]:
    return [b for b in context["buckets"] if b["documents"]]


def _band(line: Line2D, bounds: list[tuple]) -> None:
    """Around a line from low to high, where there are both: a single document has no standard error."""
    low, high = (np.array([math.nan if b is None else b for b in side]) for side in zip(*bounds, strict=True))
    if not np.isnan(low).all():
        line.axes.fill_between(line.get_xdata(), low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def _style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def _label(result: dict, context: str = "stateful") -> str:
    where = "" if context == "stateful" else f", {OTHER_CONTEXTS[context][1]}"
    return f"{result['model']} ({quantity(result['parameters'])} parameters){where}"


def _legend(ax: Axes, others: Iterable[str] = ()) -> None:
    """What is drawn in the axes and what the lines of `others`, contexts, mean: a few above them, more beside them.

    The figure grows by it, so that the axes keep their size.
    """
    figure, (handles, labels) = ax.figure, ax.get_legend_handles_labels()
    for linestyle, meaning in dict.fromkeys(OTHER_CONTEXTS[name] for name in others):
        handles.append(Line2D([], [], color=GREY, linestyle=linestyle, linewidth=1))
        labels.append(meaning)
    if len(labels) > ABOVE:
        legend = figure.legend(handles, labels, loc="outside right upper")
        width, height = legend.get_window_extent().size / figure.dpi
        figure.set_size_inches(figure.get_figwidth() + width, max(figure.get_figheight(), height + 0.1))
        return
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 1))


def _curve(metrics: str | Path, key: str) -> list[tuple[int, float]]:
    """(tokens, value) of the rows of a metrics.jsonl that have the key."""
    rows = read_metrics(Path(metrics))
    return [(t, row[key]) for t, row in zip(tokens_of(rows), rows, strict=True) if key in row]


def _losses(ax: Axes, label: str) -> None:
    """Axes of losses against tokens, on the right the same losses as perplexities.

    They span what a run still learns after its first fifth: the fall from log(vocabulary) would leave it a line.
    """
    ax.set_xlim(left=0)
    tokens, losses = np.concatenate([np.array(line.get_data(), dtype=float) for line in ax.lines], axis=1)
    late = losses[(tokens >= tokens.max() / 5) & np.isfinite(losses)]
    if late.size and np.ptp(late) > 0:
        margin = 0.05 * np.ptp(late)
        ax.set_ylim(late.min() - margin, late.max() + margin)
    ax.xaxis.set_major_formatter(lambda x, _: quantity(x))
    ax.set_xlabel("tokens trained on")
    ax.set_ylabel(label)
    right = ax.secondary_yaxis("right", functions=(np.exp, _log))
    right.set_ylabel("perplexity")
    right.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")


def _positions(ax: Axes, train_lengths: list[int], last: int) -> None:
    """A log2 axis with a tick at every doubling of the training length, and above it the multiples of that length."""
    shortest = train_lengths[0]
    ax.set_xscale("log", base=2)
    _ticks(ax, {n: length(n) for n in [shortest / 2, *powers_of_two(shortest, last)]})
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
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def _log(perplexity: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(perplexity, 1e-9))  # matplotlib also asks about perplexities of 0


def _save(figure: Figure, path: str | Path) -> list[Path]:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in paths:
        with atomic_write(file) as content:
            kind = file.suffix[1:]
            figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return paths


def powers_of_two(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... up to `last`; of more than eight, every second or third: as many labels as fit."""
    powers = [first * 2**k for k in range(int(math.log2(last / first)) + 1)]
    return powers[:: 1 + len(powers) // 9]


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


def bytes_of(n: float) -> str:
    """1.5 MiB, 640 KiB: three digits at most."""
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= 0.9765 * scale:  # of the smaller unit there are a thousand
            return f"{n / scale:.3g} {unit}"
    return f"{n:.3g} B"
