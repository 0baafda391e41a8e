"""The figure of layers, from rows as training writes them."""

import json

import pytest

from glalm.evals import layer_plot
from glalm.evals.layer_plot import plot_layers


@pytest.fixture
def metrics(tmp_path):
    """Three rows of two layers, between rows without statistics."""
    rows = []
    for step in range(1, 7):
        row = {"step": step, "loss": 1.0}
        if step % 2 == 0:
            for layer in range(2):
                row |= {f"layers/{layer}/half_life": 10.0**layer * step, f"layers/{layer}/output_rms": 1.0}
            row |= {"grad_norm/mlps": 0.5 * step, "grad_norm/head": 0.1}
        rows.append(row)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_are_the_rows(metrics, tmp_path, monkeypatch):
    """A panel for each statistic that the rows have, with a line for each layer; then the gradients."""
    figures = []
    monkeypatch.setattr(layer_plot, "save_figure", lambda figure, path: figures.append(figure) or [])
    plot_layers(metrics, tmp_path / "layers")
    half_life, output, gradients = figures[0].axes
    drawn = [line.get_xydata().tolist() for line in half_life.lines]
    assert drawn == [[[2, 2.0], [4, 4.0], [6, 6.0]], [[2, 20.0], [4, 40.0], [6, 60.0]]]
    assert half_life.get_ylabel() == "gates: half-life (tokens)" and half_life.get_yscale() == "log"
    assert [line.get_ydata().tolist() for line in output.lines] == [[1.0] * 3] * 2
    assert "10" in [label.get_text() for label in half_life.get_yticklabels()]  # and no TeX
    labelled = {line.get_label(): line.get_ydata().tolist() for line in gradients.lines}
    assert labelled == {"mlps": [1.0, 2.0, 3.0], "head": [0.1] * 3}


def test_figure_is_written(metrics, tmp_path):
    paths = plot_layers(metrics, tmp_path / "layers.png")
    assert [path.name for path in paths] == ["layers.png", "layers.svg"] and all(path.stat().st_size for path in paths)


def test_metrics_without_statistics_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"train with train\.statistics_every=100"):
        plot_layers(tmp_path / "metrics.jsonl", tmp_path / "layers")
