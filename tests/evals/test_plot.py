import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from glalm.data.files import printable
from glalm.evals import plot
from glalm.evals.plot import (
    plot_decoding,
    plot_extrapolation,
    plot_gains,
    plot_losses,
    plot_mqar,
    plot_needle,
    plot_ratios,
    plot_training,
)


def bucket(end: int, nats: float, error: float | None = 0.1, **changes) -> dict:
    low, high = (None, None) if error is None else (math.exp(nats - error), math.exp(nats + error))
    band = {"perplexity_low": low, "perplexity_high": high}
    return {"end": end, "perplexity": math.exp(nats), "documents": 4, **band} | changes


def ratio(n: int) -> dict:
    return {"ratio": 1 - n / 100, "low": 0.9 - n / 100, "high": 1.1 - n / 100, "documents": 4}


EMPTY = {"perplexity": None, "perplexity_low": None, "perplexity_high": None, "documents": 0}


def result(name: str = "demo", train_length: int = 256, times: int = 16, error: float | None = 0.1) -> dict:
    nats = [2 + 1 / (1 + i) for i in range(2 * times)]
    carried = [bucket((i + 1) * train_length // 2, x, error) for i, x in enumerate(nats)]
    reset = [b | {"perplexity": b["perplexity"] + 0.5} for b in carried]
    ratios = {str(n): ratio(n) for n in (2, 4, 8, 10, 16)}
    contexts = {"stateful": {"buckets": carried, "ratios": ratios}, "reset": {"buckets": reset, "ratios": ratios}}
    return {
        "model": name,
        "parameters": 1_234_567,
        "results": {"train_length": train_length, "contexts": contexts},
    }


METRICS = [
    {"step": 0, "val_loss": 7.5},
    {"step": 10, "loss": 6.0, "tokens": 40_960},
    {"step": 15, "val_loss": 5.5},  # a validation between two reports
    {"step": 20, "loss": 5.0, "val_loss": 5.2, "tokens": 81_920},
]


@pytest.fixture
def figures(monkeypatch) -> list:
    kept = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: kept.append(figure) or path)
    return kept


def lines_in(ax, style: str) -> list:
    return [line for line in ax.lines if line.get_linestyle() == style]


def test_the_curve_its_band_and_the_training_length(figures):
    demo = result()
    demo["results"]["contexts"]["stateful"]["buckets"].append({"end": 2**20, **EMPTY})
    plot_extrapolation([demo], "x.png")
    ax = figures[0].axes[0]
    buckets = demo["results"]["contexts"]["stateful"]["buckets"][:-1]  # the empty one is not drawn
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [b["end"] for b in buckets])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [b["perplexity"] for b in buckets])
    [reset] = lines_in(ax, ":")
    np.testing.assert_allclose(reset.get_ydata(), [b["perplexity"] + 0.5 for b in buckets])
    assert [list(line.get_xdata()) for line in lines_in(ax, "--")] == [[256, 256]]
    outline = ax.collections[0].get_paths()[0].vertices
    for b in buckets:
        assert {b["perplexity_low"], b["perplexity_high"]} <= set(outline[outline[:, 0] == b["end"], 1])


def test_axes_say_what_they_show(figures):
    plot_extrapolation([result(), result("other", error=None)], "x.png")
    figure, ax = figures[0], figures[0].axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("position in document (tokens)", "perplexity")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["128", "256", "512", "1K", "2K", "4K"]
    above = [t.get_text() for t in ax.child_axes[0].get_xticklabels()]
    assert above == ["training\nlength", "2×", "4×", "10×"]
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == ["demo (1.23M parameters)", "other (1.23M parameters)", "state reset every training length"]
    assert len(ax.collections) == 1  # one document has no band


def test_runs_of_several_training_lengths_are_marked_each(figures):
    plot_extrapolation([result(), result("longer", train_length=1024)], "x.png")
    ax = figures[0].axes[0]
    assert [line.get_xdata()[0] for line in lines_in(ax, "--")] == [256, 1024]
    assert [t.get_text() for t in ax.child_axes[0].get_xticklabels()] == ["training\nlength"] * 2


def test_a_run_that_diverges_does_not_flatten_the_others(figures):
    worse = result("worse")
    worse["results"]["contexts"]["stateful"]["buckets"][-1]["perplexity"] = 1e4
    plot_extrapolation([result(), worse], "x.png")
    assert figures[0].axes[0].get_yscale() == "log"


def test_perplexities_that_differ_much_have_plain_labels(figures):
    worse = result("worse")
    worse["results"]["contexts"]["stateful"]["buckets"][-1]["perplexity"] = 90.0
    plot_extrapolation([result(), worse], "x.png")
    ax = figures[0].axes[0]
    figures[0].draw_without_rendering()
    low, high = ax.get_ylim()
    labels = {y: t.get_text() for y, t in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True) if low < y < high}
    assert [*labels.values()] == ["10", "20", "50", "100"]
    assert len(ax.yaxis.get_minorticklabels()) == 0


def test_a_dozen_models_are_told_apart_and_leave_the_axes_their_size(monkeypatch):
    sizes, styles = [], []

    def measured(figure, path):
        figure.draw_without_rendering()
        ax = figure.axes[0]
        box = ax.get_window_extent()
        sizes.append((box.width / figure.dpi, box.height / figure.dpi))
        styles.append([(line.get_color(), line.get_marker()) for line in ax.lines if line.get_label()[0] != "_"])
        legend = figure.legends[0].get_window_extent()
        inside = figure.bbox
        assert legend.x0 >= 0 and legend.x1 <= inside.width and legend.y0 >= 0 and legend.y1 <= inside.height
        assert not legend.overlaps(ax.get_tightbbox())

    monkeypatch.setattr(plot, "save_figure", measured)
    for count in (1, 3, 5, 12, 24):
        plot_extrapolation([result(f"a_model_of_some_kind-{i}") for i in range(count)], "x.png")
    assert [len({*each}) for each in styles] == [1, 3, 5, 12, 24]
    assert len({colour for colour, _ in styles[3]}) == 12  # the other contexts' lines have colours alone
    assert all(width >= 0.95 * sizes[0][0] and height >= 0.95 * sizes[0][1] for width, height in sizes)


def test_many_doublings_have_few_labels(figures):
    plot_extrapolation([result(train_length=2, times=4096)], "x.png")
    labels = [t.get_text() for t in figures[0].axes[0].get_xticklabels()]
    assert 4 <= len(labels) <= 9
    assert "2" in labels


def test_a_model_with_another_first_context_says_so(figures):
    reset_only = result()
    del reset_only["results"]["contexts"]["stateful"]
    plot_extrapolation([reset_only], "x.png")
    [text] = figures[0].legends[0].get_texts()
    plot_ratios([reset_only], "x.png")
    [other] = figures[1].legends[0].get_texts()
    assert text.get_text() == other.get_text() == "demo (1.23M parameters), state reset every training length"


def test_a_single_point_is_seen(monkeypatch):
    short = result()
    context = short["results"]["contexts"]["stateful"]
    short["results"]["contexts"] = {"stateful": {"buckets": context["buckets"][:1], "ratios": {}}}
    drawn = []

    def pixels(figure, path):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        blue = np.all(np.abs(np.asarray(canvas.buffer_rgba())[..., :3].astype(int) - [0x00, 0x72, 0xB2]) < 9, axis=-1)
        drawn.append(blue[blue.shape[0] // 4 :].sum())  # below the legend

    monkeypatch.setattr(plot, "save_figure", pixels)
    plot_extrapolation([short], "x.png")
    assert drawn[0] > 5


def test_ratios_to_the_training_length(figures):
    short = result("short")
    ratios = short["results"]["contexts"]["stateful"]["ratios"]
    ratios["16"] = {"ratio": None, "low": None, "high": None, "documents": 0}
    ratios["10"] |= {"low": None, "high": None, "documents": 1}
    plot_ratios([result(), short], "x.png")
    ax = figures[0].axes[0]
    assert list(ax.lines[0].get_xdata()) == [1, 2, 4, 8, 10, 16]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1, 0.98, 0.96, 0.92, 0.9, 0.84])
    assert list(ax.lines[1].get_xdata()) == [1, 2, 4, 8, 10]
    bands = [set(c.get_paths()[0].vertices[:, 0]) for c in ax.collections]
    assert bands == [{1, 2, 4, 8, 10, 16}, {1, 2, 4, 8}]
    assert {tuple(line.get_xdata()) for line in lines_in(ax, "--")} == {(0, 1), (1, 1)}  # the ratio and the length of 1
    assert [t.get_text() for t in ax.get_xticklabels()] == ["training\nlength", "2×", "4×", "8×", "16×"]


def gain(start: int, nats: float | None, error: float | None = 0.25, documents: int = 4) -> dict:
    return {"start": start, "end": 2 * start, "nats_per_token": nats, "standard_error": error, "documents": documents}


def test_gains_of_the_carried_state(figures):
    long, single = result(), result("single")
    long["results"]["reset_minus_stateful"] = [gain(256, 0.5), gain(512, 0.75), gain(1024, None, None, 0)]
    single["results"]["reset_minus_stateful"] = [gain(256, -1.0, None, 1)]
    plot_gains([long, single], "x.png")
    ax = figures[0].axes[0]
    steps = [(list(line.get_xdata()), list(line.get_ydata()), line.get_drawstyle()) for line in ax.lines[:2]]
    assert steps == [([256, 512, 1024], [0.5, 0.5, 0.75], "steps-pre"), ([256, 512], [-1.0, -1.0], "steps-pre")]
    [band] = ax.collections  # one document has none
    outline = set(map(tuple, band.get_paths()[0].vertices))
    corners = {(x, y) for x in (256, 512) for y in (0.25, 0.75)}
    assert outline == corners | {(x, y) for x in (512, 1024) for y in (0.5, 1.0)}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["128", "256", "512", "1K"]
    assert ax.get_ylabel() == "gain of the carried state (nats)"


def test_gains_ask_for_both_contexts_beyond_the_training_length(figures):
    for gains in (None, [], [gain(256, None, None, 0)]):
        record = result()
        if gains is not None:
            record["results"]["reset_minus_stateful"] = gains
        with pytest.raises(ValueError, match=r"demo has no losses .* 'extrapolation.contexts=\[stateful,reset\]'"):
            plot_gains([record], "x.png")
    assert not figures


def test_losses_of_seeds_are_a_mean_and_a_band(figures, tmp_path):
    losses = {"a": [3.0, 2.0, 1.5], "b": [5.0, 4.0]}
    for name, values in losses.items():
        rows = [{"step": step, "tokens": 10 * step, "val_loss": loss} for step, loss in enumerate(values)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses({"gla": [tmp_path / "a", tmp_path / "b"]}, "x.png")
    [line] = figures[0].axes[0].lines
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[0, 10], [4.0, 3.0]]
    [band] = figures[0].axes[0].collections
    extent = band.get_paths()[0].get_extents()
    assert (extent.y0, extent.y1) == pytest.approx((3 - math.sqrt(2), 4 + math.sqrt(2)))


def test_runs_losses_in_one_figure(figures, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    plot_losses({"first": tmp_path / "a", "second": tmp_path / "b"}, "x.png")
    ax = figures[0].axes[0]
    assert [list(line.get_ydata()) for line in ax.lines] == [[7.5, 5.5, 5.2]] * 2
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == ["first", "second"]
    low, high = ax.get_ylim()
    assert 5.0 < low < 5.2 and 7.5 < high < 7.7  # all of the curve, from its start
    assert ax.get_xlim()[0] == 0


def test_recall_by_width_is_the_best_over_learning_rates(figures):
    def row(mixer: str, tokens: int, width: int, accuracy: float) -> dict:
        numbers = {"length": tokens, "pairs": tokens // 16, "width": width, "accuracy": accuracy}
        return {"results": {"mixer": mixer, **numbers}}

    rows = [row("gla", 64, 128, 0.5), row("gla", 64, 128, 0.9), row("gla", 64, 64, 0.25), row("attention", 64, 64, 1.0)]
    plot_mqar([*rows, row("gla", 256, 64, 0.125)], "x.png")
    short, long = figures[0].axes
    gla, attention = short.lines
    assert (list(gla.get_xdata()), list(gla.get_ydata())) == ([64, 128], [0.25, 0.9])
    assert list(attention.get_ydata()) == [1.0]
    assert [list(line.get_ydata()) for line in long.lines if len(line.get_ydata())] == [[0.125]]
    assert (short.get_title(), long.get_title()) == ("64 tokens, 4 pairs", "256 tokens, 16 pairs")


def test_the_heat_map_of_a_needle(figures):
    cells = [{"length": n, "depth": d, "token_accuracy": d + n / 8192} for n in (1024, 2048) for d in (0.0, 0.5)]
    plot_needle({"model": "demo", "parameters": 1e6, "results": {"cells": cells[::-1]}}, "x.png")
    ax = figures[0].axes[0]
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.125, 0.25], [0.625, 0.75]])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1K", "2K"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0%", "50%"]
    assert [t.get_text() for t in ax.texts] == ["12", "25", "62", "75"]


def test_decoding(figures):
    rows = [{"length": n, "tokens_per_second": 100 / n, "state_bytes": 64 * n, "batch_size": 4} for n in (1, 8)]
    plot_decoding([{"model": "demo", "parameters": 1e6, "results": {"lengths": rows}}], "x.png")
    speed, memory = figures[0].axes
    assert list(speed.lines[0].get_ydata()) == [100, 12.5]
    assert list(memory.lines[0].get_ydata()) == [16, 128]  # of one sequence


def test_learning_curve(figures, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in METRICS) + '{"step": 30, "lo')
    plot_training(metrics, "x.png")
    ax = figures[0].axes[0]
    training, validation = ax.lines
    assert list(zip(training.get_xdata(), training.get_ydata(), strict=True)) == [(40960, 6.0), (81920, 5.0)]
    points = [(0, 7.5), (61440, 5.5), (81920, 5.2)]
    assert list(zip(validation.get_xdata(), validation.get_ydata(), strict=True)) == points
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens trained on", "loss (nats per token)")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["training", "validation"]


def test_figures_of_a_papers_size_are_written_whole(tmp_path):
    saved = tmp_path / "extrapolation.json"
    saved.write_text(json.dumps(result()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    for png, svg in (
        plot_extrapolation([saved], tmp_path / "plots" / "e.png"),
        plot_training(tmp_path / "metrics.jsonl", tmp_path / "plots" / "t"),
    ):
        content = png.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">II", content[16:24]) == (900, 580)
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["e.png", "e.svg", "t.png", "t.svg"]


def test_nothing_to_plot(tmp_path):
    folder = tmp_path / "other"
    result = folder / "my_run" / "eval" / "e.json"
    command = rf"glalm eval checkpoint=MODEL out={folder}/my_run 'evals=\[extrapolation\]'$"
    with pytest.raises(ValueError, match=rf"e\.json is missing; to write it, run: {command}"):
        plot_extrapolation([result], tmp_path / "e.png")
    (folder / "my_run").mkdir(parents=True)
    (folder / "my_run" / "run.json").touch()
    with pytest.raises(ValueError, match=rf"run: glalm eval name=my_run runs_dir={folder} 'evals="):
        plot_extrapolation([result], tmp_path / "e.png")
    with pytest.raises(ValueError, match=r"^none/metrics.jsonl is missing, so there is no run$"):
        plot_losses({"a": Path("none/metrics.jsonl")}, tmp_path / "e.png")
    with pytest.raises(ValueError, match="at least one run"):
        plot_extrapolation([], tmp_path / "e.png")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing or holds no loss"):
        plot_training(tmp_path / "metrics.jsonl", tmp_path / "t.png")
    assert list(tmp_path.iterdir()) == [folder]


def test_quantities():
    values = (999, 9_996, 999_600, 1_234_567, 374_500_000, 1_365_500_000, 15e9)
    assert [plot.format_quantity(n) for n in values] == ["999", "10K", "1M", "1.23M", "374M", "1.37B", "15B"]
    assert [plot.format_bytes(n) for n in (512, 1536, 3 * 2**20, 2.5 * 2**30)] == [
        "512 B",
        "1.5 KiB",
        "3 MiB",
        "2.5 GiB",
    ]
    assert [plot.format_bytes(n * 2**10) for n in (999, 1008, 1024)] == ["999 KiB", "0.984 MiB", "1 MiB"]
    assert [plot.format_length(n) for n in (128, 1000, 1024, 1536, 20480)] == ["128", "1000", "1K", "1536", "20K"]


def test_plots_and_reports_need_no_torch():
    code = "import glalm.evals.plot, glalm.evals.report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@example("cost_$5_vs_$6")
@example(r"lr$\frac$")
@example("_private")
@example("lauf-\udcc3\udcbc \x1b")
@given(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=12))
@settings(deadline=None, max_examples=4)
def test_any_name_of_a_run_is_drawn_as_it_is(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("any")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    _, svg = plot_losses({name: folder / "metrics.jsonl"}, folder / "loss")
    legends = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "save_figure", lambda figure, path: legends.append(figure.legends[0]))
        plot_losses({name: folder / "metrics.jsonl"}, "x")
    ElementTree.parse(svg)  # It is XML, whatever the name.
    [text] = legends[0].get_texts()
    assert text.get_text().lstrip() == printable(name).lstrip()
    assert not text.get_parse_math()


def test_a_name_with_a_dot_has_no_suffix(tmp_path):
    for name in ("ratio_0.5", "ratio_0.7", "v1.2.png", ".hidden"):
        plot_ratios([result()], tmp_path / name)
    names = {f"{name}{suffix}" for name in ("ratio_0.5", "ratio_0.7", "v1.2", ".hidden") for suffix in (".png", ".svg")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_results_that_do_not_compare_are_not_drawn_together(figures):
    documents = result("a") | {"settings": {"text": "documents", "max_length": 64}}
    stream = result("b") | {"settings": {"text": "stream", "max_length": 64}}
    for draw in (plot_extrapolation, plot_ratios):
        with pytest.raises(ValueError, match="these results do not compare: text: documents / stream"):
            draw([documents, stream], "x.png")
    longer = result("b") | {"evaluator": "extrapolation", "settings": {"text": "documents", "max_length": 128}}
    plot_extrapolation([documents | {"evaluator": "extrapolation"}, longer], "x.png")  # Lengths are the axis.
    assert len(figures) == 1


def test_models_of_other_steps_and_precisions_say_so(figures):
    records = [
        result("a") | {"checkpoint": f"step_{step}", "settings": {"precision": precision}}
        for step, precision in ((2, "fp32"), (4, "bf16"))
    ]
    plot_ratios(records, "x.png")
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["a (1.23M parameters), step_2, fp32", "a (1.23M parameters), step_4, bf16"]
