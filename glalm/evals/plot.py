"""Figures from evaluators' JSON files, in the size and the type of a paper's column. No model is needed.

Every plot function writes PATH.png and PATH.svg, where PATH may already end in one of these suffixes, and returns the
two paths. A record is the content of an evaluator's file, or the path of the file.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, NullLocator

from glalm.data.files import atomic_write, printable
from glalm.evals.identity import is_of_average, require_comparable
from glalm.evals.result_files import describe_validation, infer_tokens, read_json, step_of
from glalm.train.metrics import read_metrics

Record = dict | str | Path

# Okabe and Ito's palette, whose colors can be told apart in every form of color blindness, without its yellow, which is
# too pale on white; and five more colors, which markers help to tell from them.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#332288", "#8C510A", "#888888"),
)
MARKERS = "os^Dvp*X<>P"  # One less than there are colors, so that 132 models are drawn before two look alike.
STYLE = "glalm.evals.paper"  # paper.mplstyle
SIZE = (4.5, 2.9)  # inches of a figure, as there
SUFFIXES = (".png", ".svg")
GREY = "#555555"
MAX_LEGEND_ABOVE = 4  # A legend of more entries stands beside the axes, not above them.
CONTEXT_LINES = {  # The line and the description of a context that is not a figure's first.
    "stateful": ("-.", "state carried"),
    "sliding_window": ("--", "window of the training length"),
    "reset": (":", "state reset every training length"),
}


@style.context(STYLE)
def plot_extrapolation(records: Sequence[Record], path: str | Path) -> list[Path]:
    """Plot perplexity against position for one or more models.

    A point is a bucket of positions, drawn at its end. The band is one standard error over documents. A bucket that no
    document fills is not drawn. A model's first context is a solid line, its others are as in CONTEXT_LINES.

    Args:
        records: extrapolation.json of each model.

    Raises:
        ValueError: There are no records, a file is missing, or the records do not compare.
    """
    records = _load_records(records, "extrapolation")
    labels = _label_models(records)
    ax = Figure().subplots()
    other_contexts, buckets = [], []
    for i, record in enumerate(records):
        buckets += _draw_contexts(ax, record, i, labels[i])
        other_contexts += [*record["results"]["contexts"]][1:]
    _format_position_axis(ax, records, last=max(bucket["end"] for bucket in buckets))
    _format_perplexity_axis(ax, [bucket["perplexity"] for bucket in buckets])
    ax.set_xlabel("position in document (tokens)")
    ax.set_ylabel("perplexity")
    _add_legend(ax, other_contexts)
    return save_figure(ax.figure, path)


@style.context(STYLE)
def plot_ratios(records: Sequence[Record], path: str | Path) -> list[Path]:
    """Plot perplexity at n training lengths over that at one, against n, for the first context of one or more models.

    The band is one standard error of the paired difference over documents. It raises as plot_extrapolation does.
    """
    records = _load_records(records, "extrapolation")
    labels = _label_models(records)
    ax = Figure().subplots()
    values = [1.0]
    largest = 2
    for i, record in enumerate(records):
        name, context = next(iter(record["results"]["contexts"].items()))
        points = [(int(n), ratio) for n, ratio in context["ratios"].items() if ratio["documents"]]
        multiples = [1, *(n for n, _ in points)]
        ratios = [1, *(ratio["ratio"] for _, ratio in points)]
        [line] = ax.plot(multiples, ratios, **_line_style(i), label=labels[i] + _context_suffix(name))
        _draw_band(line, [(1, 1), *((ratio["low"], ratio["high"]) for _, ratio in points)])
        values += ratios
        largest = max(largest, *multiples)
    for draw_line in (ax.axhline, ax.axvline):
        draw_line(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    ax.set_xscale("log", base=2)
    _set_ticks(ax, {n: "training\nlength" if n == 1 else f"{n}×" for n in powers_of_two(1, largest)})
    _format_perplexity_axis(ax, values)
    ax.set_xlabel("position in document")
    ax.set_ylabel("perplexity / at the training length")
    _add_legend(ax)
    return save_figure(ax.figure, path)


@style.context(STYLE)
def plot_gains(records: Sequence[Record], path: str | Path) -> list[Path]:
    """Plot what the carried state is worth by position: the loss of the context reset minus that of stateful.

    A step is a range of positions from n training lengths to 2n, or what was read of it. The first reset is at the
    training length; until there both contexts are the same. The band is one standard error of the paired difference
    over documents.

    Args:
        records: extrapolation.json of each model, with the contexts stateful and reset.

    Raises:
        ValueError: A record has not both contexts, or ends at the training length. Else as of plot_extrapolation.
    """
    records = _load_records(records, "extrapolation")
    labels = _label_models(records)
    ax = Figure().subplots()
    gains = []
    for i, record in enumerate(records):
        gains += _draw_gains(ax, record, i, labels[i])
    _format_position_axis(ax, records, last=max(gain["end"] for gain in gains), mark="first\nreset")
    ax.axhline(0, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    ax.set_xlabel("position in document (tokens)")
    ax.set_ylabel("gain of the carried state (nats)")
    _add_legend(ax)
    return save_figure(ax.figure, path)


@style.context(STYLE)
def plot_training(metrics: str | Path, path: str | Path) -> list[Path]:
    """Plot training and validation loss against tokens, from a metrics.jsonl.

    Raises:
        ValueError: The file is missing or has no loss.
    """
    training = _read_curve(metrics, "loss")
    validation = _read_curve(metrics, "val_loss")
    if not training and not validation:
        raise ValueError(f"{metrics} is missing or holds no loss: train the run first")
    ax = Figure().subplots()
    if training:
        ax.plot(*zip(*training, strict=True), color=COLORS[5], label="training", linewidth=1)
    if validation:
        ax.plot(*zip(*validation, strict=True), **_line_style(0), label="validation")
    _format_loss_axes(ax, "loss (nats per token)")
    ax.legend(loc="upper right")
    return save_figure(ax.figure, path)


@style.context(STYLE)
def plot_losses(metrics: Mapping[str, Path | Sequence[Path]], path: str | Path) -> list[Path]:
    """Plot validation loss against tokens of several runs, {name: metrics.jsonl}.

    Several files of one name are runs of several seeds: the curve is their mean, and the band one standard deviation.

    Raises:
        ValueError: No run has a validation loss, or the runs were not validated on the same windows of text.
    """
    files = {name: [file] if isinstance(file, (str, Path)) else file for name, file in metrics.items()}
    curves = {}
    validations = []
    for name, runs in files.items():
        found = {Path(file): points for file in runs if (points := _read_curve(file, "val_loss"))}
        if found:
            curves[name] = [*found.values()]
            validations += [describe_validation(file.parent) for file in found]
    if not curves:
        if absent := [file for file in chain(*files.values()) if not Path(file).exists()]:
            raise ValueError(f"{absent[0]} is missing, so there is no run")
        raise ValueError(f"{', '.join(map(str, chain(*files.values()))) or 'metrics'}: no validation loss in any")
    require_comparable(validations)
    ax = Figure().subplots()
    for i, (name, runs) in enumerate(curves.items()):
        tokens, means, bounds = _average_curves(runs)
        [line] = ax.plot(tokens, means, **_line_style(i), label=_legend_text(name))
        _draw_band(line, bounds)
    _format_loss_axes(ax, "validation loss (nats per token)")
    _add_legend(ax)
    return save_figure(ax.figure, path)


@style.context(STYLE)
def plot_mqar(records: Sequence[Record], path: str | Path) -> list[Path]:
    """Plot accuracy of associative recall against width, a panel a length, a curve a mixer.

    A point is the best of the learning rates (arXiv 2312.04927, figure 2). A mixer of the user's that was edited
    between results has a curve for each version of its file.

    Args:
        records: The files of glalm mqar, one a trained model.
    """
    records = _load_records(records, "mqar")
    versions = [tuple(record.get("settings", {}).get("code", {}).values()) for record in records]
    rows = []
    for record, version in zip(records, versions, strict=True):
        row = record["results"]
        others = {v for r, v in zip(records, versions, strict=True) if r["results"]["mixer"] == row["mixer"]}
        edited = f" ({', '.join(code[:6] for code in version)})" if len(others) > 1 else ""
        rows.append(row | {"mixer": row["mixer"] + edited})
    lengths = sorted({(row["length"], row["pairs"]) for row in rows})
    mixers = list(dict.fromkeys(row["mixer"] for row in rows))
    figure = Figure(figsize=(max(SIZE[0], 1.9 * len(lengths)), 2.6))
    axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for ax, (tokens, pairs) in zip(axes, lengths, strict=True):
        for i, mixer in enumerate(mixers):
            best = {}
            for row in rows:
                if (row["length"], row["pairs"], row["mixer"]) == (tokens, pairs, mixer):
                    best[row["width"]] = max(row["accuracy"], best.get(row["width"], 0))
            widths = sorted(best)
            ax.plot(widths, [best[width] for width in widths], **_line_style(i), label=mixer)
        ax.set_title(f"{tokens} tokens, {pairs} pairs", fontsize=8)
        ax.set_xscale("log", base=2)
        _set_ticks(ax, {width: str(width) for width in sorted({row["width"] for row in rows})})
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("width")
    axes[0].set_ylabel("accuracy")
    _add_legend(axes[0])
    return save_figure(figure, path)


@style.context([STYLE, {"axes.grid": False}])
def plot_needle(record: Record, path: str | Path) -> list[Path]:
    """Plot one model's accuracy on the needle's answer by length (across) and depth (down), as a heat map."""
    [record] = _load_records([record], "needle")
    cells = record["results"]["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["token_accuracy"]
    ax = Figure().subplots()
    image = ax.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        color = "black" if value > 0.6 else "white"
        ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=7)
    ax.set_xticks(range(len(lengths)), [format_length(n) for n in lengths])
    ax.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths])
    ax.set_xlabel("length (tokens)")
    ax.set_ylabel("depth of the needle")
    ax.set_title(*_label_models([record]), fontsize=9)
    ax.figure.colorbar(image, label="accuracy of the answer's tokens", format=lambda x, _: f"{100 * x:.0f}%")
    return save_figure(ax.figure, path)


@style.context(STYLE)
def plot_decoding(records: Sequence[Record], path: str | Path) -> list[Path]:
    """Plot tokens a second when decoding, and the bytes of a sequence's state, against length, of some models."""
    records = _load_records(records, "decode_speed")
    labels = _label_models(records)
    figure = Figure(figsize=(1.25 * SIZE[0], SIZE[1]))
    speed, memory = figure.subplots(1, 2)
    for i, record in enumerate(records):
        rows = record["results"]["lengths"]
        line_style = _line_style(i) | {"label": labels[i]}
        lengths = [row["length"] for row in rows]
        speed.plot(lengths, [row["tokens_per_second"] for row in rows], **line_style)
        memory.plot(lengths, [row["state_bytes"] / row["batch_size"] for row in rows], **line_style)
    for ax in (speed, memory):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: format_length(x))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("tokens already read (length)")
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens per second")
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter(lambda y, _: format_bytes(y))
    memory.set_ylabel("state of a sequence")
    _add_legend(speed)
    return save_figure(figure, path)


# ------------------------------------------------------------------------------------------------- records and curves


def _load_records(records: Sequence[Record], evaluator: str) -> list[dict]:
    """Return the content of all records. Raise ValueError where one is missing, or where they do not compare."""
    if not records:
        raise ValueError(f"no records: name the {evaluator}.json of at least one run")
    loaded = [record if isinstance(record, dict) else load_record(Path(record), evaluator) for record in records]
    require_comparable(loaded)
    return loaded


def load_record(path: Path, evaluator: str) -> dict:
    """Return the content of an evaluator's file.

    Raises:
        ValueError: It is missing; the message has the command that writes it.
    """
    record = read_json(path)
    if record is None:
        model = path.parent.parent
        is_run = (model / "run.json").is_file()
        which = f"name={model.name} runs_dir={model.parent}" if is_run else f"checkpoint=MODEL out={model}"
        raise ValueError(f"{path} is missing; to write it, run: glalm eval {which} 'evals=[{evaluator}]'")
    return record


def known_gains(record: dict) -> list[dict]:
    """Return the ranges of reset_minus_stateful that some document fills. There are none without both contexts."""
    return [gain for gain in record["results"].get("reset_minus_stateful", []) if gain["documents"]]


def _read_curve(metrics: str | Path, key: str) -> list[tuple[int, float]]:
    """Return (tokens, value) of the rows of a metrics.jsonl that have the key."""
    rows, _ = read_metrics(Path(metrics))
    return [(tokens, row[key]) for tokens, row in zip(infer_tokens(rows), rows, strict=True) if key in row]


def _average_curves(curves: Sequence[list[tuple]]) -> tuple[list, list[float], list[tuple]]:
    """Return x, the mean of y, and the mean less and plus one standard deviation, where all curves have a point."""
    values = [dict(curve) for curve in curves]
    xs = [x for x in values[0] if all(x in curve for curve in values)]
    means = [fmean(curve[x] for curve in values) for x in xs]
    if len(curves) == 1:
        return xs, means, [(None, None)] * len(xs)
    spreads = [stdev(curve[x] for curve in values) for x in xs]
    return xs, means, [(mean - spread, mean + spread) for mean, spread in zip(means, spreads, strict=True)]


# ------------------------------------------------------------------------------------------------ elements of a figure


def _draw_contexts(ax: Axes, record: dict, i: int, label: str) -> list[dict]:
    """Draw the contexts of model `i`, and return the buckets that they fill."""
    contexts = record["results"]["contexts"]
    drawn = []
    for name, context in contexts.items():
        buckets = [bucket for bucket in context["buckets"] if bucket["documents"]]
        drawn += buckets
        ends = [bucket["end"] for bucket in buckets]
        perplexities = [bucket["perplexity"] for bucket in buckets]
        if name == next(iter(contexts)):
            # Markers are 3% of the axes' diagonal apart, so that their shapes can be told. A single point has one, too.
            spacing = 0.03 if len(ends) > 1 else None
            label_of_context = label + _context_suffix(name)
            [line] = ax.plot(ends, perplexities, **_line_style(i), markevery=spacing, label=label_of_context)
            _draw_band(line, [(bucket["perplexity_low"], bucket["perplexity_high"]) for bucket in buckets])
        else:
            ax.plot(ends, perplexities, color=line.get_color(), linestyle=CONTEXT_LINES[name][0], linewidth=1)
    return drawn


def _draw_gains(ax: Axes, record: dict, i: int, label: str) -> list[dict]:
    """Draw the steps of model number i. Return the ranges of positions drawn. Raise ValueError if there are none."""
    train_length = record["results"]["train_length"]
    gains = known_gains(record)
    if not gains:
        raise ValueError(
            f"{record['model']} has no losses beyond its training length of {train_length} tokens with the state both "
            "carried and reset; evaluate it with 'extrapolation.contexts=[stateful,reset]' and "
            f"extrapolation.max_length={10 * train_length}, on documents that are longer than {train_length} tokens"
        )
    # The first step begins at the training length, with a point that has no marker.
    positions = [train_length, *(gain["end"] for gain in gains)]
    drawn = [gains[0], *gains]
    nats = [gain["nats_per_token"] for gain in drawn]
    steps = dict(drawstyle="steps-pre", markevery=slice(1, None))
    [line] = ax.plot(positions, nats, **_line_style(i), **steps, label=label)
    errors = [gain["standard_error"] for gain in drawn]
    bounds = [(None, None) if e is None else (x - e, x + e) for x, e in zip(nats, errors, strict=True)]
    _draw_band(line, bounds, step="pre")
    return gains


def _draw_band(line: Line2D, bounds: list[tuple], step: str | None = None) -> None:
    """Fill from low to high around a line, where both are known: a single document has no standard error.

    `step` is that of fill_between.
    """
    low, high = (np.array([math.nan if b is None else b for b in side]) for side in zip(*bounds, strict=True))
    if not np.isnan(low).all():
        line.axes.fill_between(line.get_xdata(), low, high, step=step, color=line.get_color(), alpha=0.18, linewidth=0)


def _line_style(i: int) -> dict:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}


def _label_models(records: list[dict]) -> list[str]:
    """Return a label for each model, with its checkpoint and precision where those of the models differ."""
    labels = []
    for record in records:
        average = ", average of the weights" if is_of_average(record) else ""
        labels.append(f"{record['model']}{average} ({format_quantity(record['parameters'])} parameters)")
    checkpoints = [record.get("checkpoint") if step_of(record) >= 0 else None for record in records]
    precisions = [record.get("settings", {}).get("precision") for record in records]
    for values in (checkpoints, precisions):
        if len(set(values)) > 1:
            labels = [f"{label}, {value}" if value else label for label, value in zip(labels, values, strict=True)]
    return [_legend_text(label) for label in labels]


def _context_suffix(context: str) -> str:
    return "" if context == "stateful" else f", {CONTEXT_LINES[context][1]}"


def _legend_text(name: str) -> str:
    """Return a user's name as a label. matplotlib leaves labels that begin with an underscore out of legends."""
    return printable(f" {name}" if name.startswith("_") else name)


def _add_legend(ax: Axes, contexts: Iterable[str] = ()) -> None:
    """Add a legend of the labelled lines and of the lines of `contexts`, above the axes or, if it is long, beside them.

    The figure grows by the legend, so that the axes keep their size.
    """
    figure = ax.figure
    handles, labels = ax.get_legend_handles_labels()
    for name in dict.fromkeys(contexts):
        linestyle, description = CONTEXT_LINES[name]
        handles.append(Line2D([], [], color=GREY, linestyle=linestyle, linewidth=1))
        labels.append(description)
    if len(labels) > MAX_LEGEND_ABOVE:
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


def _format_loss_axes(ax: Axes, label: str) -> None:
    """Format axes of whole curves of losses against tokens, with the same losses as perplexities on the right."""
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter(lambda x, _: format_quantity(x))
    ax.set_xlabel("tokens trained on")
    ax.set_ylabel(label)
    # Matplotlib also asks for the logarithm of 0.
    right = ax.secondary_yaxis("right", functions=(np.exp, lambda perplexity: np.log(np.maximum(perplexity, 1e-9))))
    right.set_ylabel("perplexity")
    right.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")


def _format_position_axis(ax: Axes, records: list[dict], last: int, mark: str = "training\nlength") -> None:
    """Format a log2 axis with a tick at every doubling of the training length, and its mark and multiples above it."""
    train_lengths = sorted({record["results"]["train_length"] for record in records})
    shortest = train_lengths[0]
    ax.set_xscale("log", base=2)
    _set_ticks(ax, {n: format_length(n) for n in [shortest / 2, *powers_of_two(shortest, last)]})
    marks = dict.fromkeys(train_lengths, mark)
    for train_length in marks:
        ax.axvline(train_length, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    # Multiples of several training lengths could be taken for one another's.
    if len(train_lengths) == 1:
        for power in range(6):
            for n in (2 * 10**power, 4 * 10**power, 10 * 10**power):  # An octave apart, their labels never touch.
                if n * shortest <= last:
                    marks[n * shortest] = f"{n}×"
    top = ax.secondary_xaxis("top")
    top.spines["top"].set_visible(False)
    top.tick_params(colors=GREY, length=2)
    _set_ticks(top, marks)


def _set_ticks(ax: Axes, labels: dict[float, str]) -> None:
    ax.xaxis.set_major_locator(FixedLocator([*labels]))
    ax.xaxis.set_major_formatter(FixedFormatter([*labels.values()]))
    ax.xaxis.set_minor_locator(NullLocator())


def _format_perplexity_axis(ax: Axes, values: list[float]) -> None:
    """Use a logarithmic axis where one run would flatten the others on a linear one."""
    if max(values) > 8 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Only these two are suffixes: "ratio_0.5" is a name with a dot.
    name = path.stem if path.suffix in SUFFIXES else path.name
    paths = [path.with_name(name + suffix) for suffix in SUFFIXES]
    for file_path in paths:
        kind = file_path.suffix[1:]
        with atomic_write(file_path) as file:
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return paths


# -------------------------------------------------------------------------------------------------------------- labels


def powers_of_two(first: int, last: int) -> list[int]:
    """Return first, 2 first, 4 first, ... up to `last`; of more than eight, as many as there is room for labels."""
    powers = [first * 2**k for k in range(int(math.log2(last / first)) + 1)]
    return powers[:: 1 + len(powers) // 9]


def format_length(tokens: float) -> str:
    """Return a multiple of 1024 as 4K, and other lengths in full."""
    tokens = round(tokens)
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def format_quantity(n: float) -> str:
    """Return n with three digits at most: 1.2M, 340M, 1.37B, 15B."""
    return _format_scaled(n, {"B": 1e9, "M": 1e6, "K": 1e3, "": 1}, next_unit=0.9995)


def format_bytes(n: float) -> str:
    """Return n with three digits at most: 1.5 MiB, 640 KiB."""
    # From 1000 of the smaller unit on, the larger one is used.
    return _format_scaled(n, {" GiB": 2**30, " MiB": 2**20, " KiB": 2**10, " B": 1}, next_unit=0.9765)


def _format_scaled(n: float, units: dict[str, float], next_unit: float) -> str:
    unit = next((unit for unit, scale in units.items() if n >= next_unit * scale), [*units][-1])
    return f"{n / units[unit]:.3g}{unit}"
