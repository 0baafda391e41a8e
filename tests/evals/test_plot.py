import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest

from glalm.evals import plot
from glalm.evals.plot import plot_extrapolation, plot_training


def result(name: str = "demo", train_length: int = 256, times: int = 16, error: float | None = 0.1) -> dict:
    buckets = []
    for i in range(2 * times):
        nats = 2 + 1 / (1 + i)
        band = [None, None] if error is None else [math.exp(nats - error), math.exp(nats + error)]
        buckets.append(
            {
                "end": (i + 1) * train_length // 2,
                "perplexity": math.exp(nats),
                "standard_error": error,
                "perplexity_low": band[0],
                "perplexity_high": band[1],
            }
        )
    reset = [bucket | {"perplexity": bucket["perplexity"] + 0.5} for bucket in buckets]
    results = {"train_length": train_length, "buckets": buckets, "reset": reset}
    return {"run": name, "parameters": 1_234_567, "results": results}


METRICS = [
    {"step": 0, "val_loss": 7.5},
    {"step": 10, "loss": 6.0, "tokens": 40_960},
    {"step": 15, "val_loss": 5.5},  # a validation between two reports
    {"step": 20, "loss": 5.0, "val_loss": 5.2, "tokens": 81_920},
]


@pytest.fixture
def figures(monkeypatch) -> list:
    kept = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: kept.append(figure) or path)
    return kept


def test_the_curve_its_band_and_the_training_length(figures):
    demo = result()
    plot_extrapolation([demo], "x.png")
    ax = figures[0].axes[0]
    buckets = demo["results"]["buckets"]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [b["end"] for b in buckets])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [b["perplexity"] for b in buckets])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [b["perplexity"] + 0.5 for b in buckets])
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[256, 256]]
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
    control = "state reset every 256 tokens"
    assert legend == ["demo (1.23M parameters)", control, "other (1.23M parameters)", control]
    assert len(ax.collections) == 1  # one document has no band


def test_runs_of_several_training_lengths_are_marked_each(figures):
    plot_extrapolation([result(), result("longer", train_length=1024)], "x.png")
    ax = figures[0].axes[0]
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [256, 1024]
    assert [t.get_text() for t in ax.child_axes[0].get_xticklabels()] == ["training\nlength"] * 2


def test_a_run_that_diverges_does_not_flatten_the_others(figures):
    worse = result("worse")
    worse["results"]["buckets"][-1]["perplexity"] = 1e4
    plot_extrapolation([result(), worse], "x.png")
    assert figures[0].axes[0].get_yscale() == "log"


def test_many_doublings_have_few_labels(figures):
    plot_extrapolation([result(train_length=2, times=4096)], "x.png")
    labels = [t.get_text() for t in figures[0].axes[0].get_xticklabels()]
    assert 4 <= len(labels) <= 9
    assert "2" in labels


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


def test_pngs_of_a_papers_size_are_written_whole(tmp_path):
    saved = tmp_path / "extrapolation.json"
    saved.write_text(json.dumps(result()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    for path in (
        plot_extrapolation([saved], tmp_path / "plots" / "e.png"),
        plot_training(tmp_path / "metrics.jsonl", tmp_path / "plots" / "t.png"),
    ):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">II", content[16:24]) == (1100, 660)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["e.png", "t.png"]


def test_nothing_to_plot(tmp_path):
    with pytest.raises(ValueError, match=r"e\.json is missing: python eval\.py"):
        plot_extrapolation([tmp_path / "e.json"], tmp_path / "e.png")
    with pytest.raises(ValueError, match="at least one run"):
        plot_extrapolation([], tmp_path / "e.png")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing or holds no loss"):
        plot_training(tmp_path / "metrics.jsonl", tmp_path / "t.png")
    assert list(tmp_path.iterdir()) == []


def test_quantities():
    values = (999, 9_996, 999_600, 1_234_567, 374_500_000, 1_365_500_000, 15e9)
    assert [plot.quantity(n) for n in values] == ["999", "10K", "1M", "1.23M", "374M", "1.37B", "15B"]
    assert [plot.length(n) for n in (128, 1000, 1024, 1536, 20480)] == ["128", "1000", "1K", "1536", "20K"]


def test_plots_and_reports_need_no_torch():
    code = "import glalm.evals.plot, glalm.evals.report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
