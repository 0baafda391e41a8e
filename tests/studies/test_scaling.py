import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.cli import compose_config
from glalm.commands.studies import fit_scaling_law
from glalm.config.strict import ConfigError
from glalm.evals.options import TrainingRun
from glalm.evals.result_files import write_json
from glalm.model.decoder import CausalLM
from glalm.studies import scaling
from glalm.studies.scaling import (
    LossLaw,
    Measurement,
    count_without_embeddings,
    describe_dial,
    fit_loss_law,
    is_by_rule,
    measure_run,
    read_points,
    select_best,
    write_points,
)
from glalm.train.trainer import train

SIZES = [1e6, 3e6, 1e7, 3e7, 1e8]


def synthetic_runs(law: LossLaw, sizes, tokens, noise: float = 0.0) -> list[Measurement]:
    rng = np.random.default_rng(1)
    return [
        Measurement("run", int(N), int(D), 1e-3, law.predict(N, D) + noise * rng.standard_normal(), 320, {})
        for N in sizes
        for D in (tokens(N) if callable(tokens) else tokens)
    ]


@settings(max_examples=5, deadline=None)
@given(st.floats(0.5, 3), st.floats(0.15, 0.6), st.floats(0.5, 3))
def test_fit_finds_the_law_in_sizes(E, a, gap):
    """`gap` is what the law is above E at a million parameters."""
    law = LossLaw(E, gap * 1e6**a, a)
    found = fit_loss_law(synthetic_runs(law, SIZES, [10**9]))
    assert (found.E, found.a) == (pytest.approx(E, abs=0.02 * gap), pytest.approx(a, rel=0.02)) and found.B == 0
    assert found.predict(1e9, 10**9) == pytest.approx(law.predict(1e9, 10**9), abs=0.01 * gap)


def test_fit_finds_the_law_in_sizes_and_tokens():
    """That of Hoffmann et al., with errors of a thousandth of a nat, predicted at a size ten times as large."""
    law = LossLaw(1.69, 406.4, 0.34, 410.7, 0.28)
    found = fit_loss_law(synthetic_runs(law, SIZES, [1e8, 1e9, 1e10], noise=1e-3))
    assert (found.a, found.b) == (pytest.approx(0.34, abs=0.02), pytest.approx(0.28, abs=0.02))
    assert found.predict(1e9, 2e10) == pytest.approx(law.predict(1e9, 2e10), abs=0.01)


def test_tokens_in_proportion_to_sizes_are_no_axis_of_their_own():
    law = LossLaw(1.69, 406.4, 0.34, 410.7, 0.28)
    found = fit_loss_law(synthetic_runs(law, SIZES, lambda N: [20 * N]))
    assert found.B == 0
    assert found.predict(1e9, 2e10) == pytest.approx(law.predict(1e9, 2e10), abs=0.02)


def test_fit_refuses_too_little_and_what_does_not_fall():
    law = LossLaw(1.0, 100.0, 0.3)
    with pytest.raises(
        ConfigError, match="3 numbers to fit, and these runs have 2 sizes, 1 numbers of tokens and 2 los"
    ):
        fit_loss_law(synthetic_runs(law, SIZES[:2], [10**9]))
    # Two numbers of tokens would fit every exponent equally well, and a run that is named twice says nothing more.
    with pytest.raises(ConfigError, match="at least 3 sizes and 3 numbers of tokens, and at least 5"):
        fit_loss_law(synthetic_runs(law, SIZES, [10**8, 10**9]))
    with pytest.raises(ConfigError, match="2 sizes, 1 numbers of tokens and 2 losses"):
        fit_loss_law(2 * synthetic_runs(law, SIZES[:2], [10**9]))
    with pytest.raises(ConfigError, match="do not fall"):
        fit_loss_law(synthetic_runs(LossLaw(1.0, -1.0, 0.1), SIZES, [10**9]))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_tokens_by_the_rule_of_the_runs(exponent):
    runs = synthetic_runs(LossLaw(1.0, 100.0, 0.3), SIZES, lambda N: [50 * N**exponent])
    tokens = round(50 * 10 ** (9 * exponent))
    assert [is_by_rule(runs, 10**9, factor * tokens) for factor in (1, 3)] == [True, False]
    assert not is_by_rule(runs, 10**9, tokens // 3)


def test_best_rate_of_each_size(tmp_path):
    runs = [
        Measurement(f"{N}-{lr}", N, 100, lr, loss, 320, {"mixers": ["gla"]})
        for N, lr, loss in [(1, 1e-3, 3.0), (1, 2e-3, 2.5), (2, 1e-3, 2.0)]
    ]
    assert [m.name for m in select_best(runs)] == ["1-0.002", "2-0.001"]
    write_points(tmp_path / "points.json", LossLaw(1, 2, 3), runs)
    assert read_points(tmp_path / "points.json") == runs
    assert json.loads((tmp_path / "points.json").read_text())["law"]["A"] == 2


def test_points_of_other_runs_must_compare(tmp_path, monkeypatch, capsys):
    """What the losses were measured on is in the file, so that they are not taken for losses of other text."""
    law = LossLaw(1.69, 406.4, 0.34)
    points = [replace(m, conditions={"data_sha256": "a", "mixers": ["gla"]}) for m in synthetic_runs(law, SIZES, [100])]
    write_points(tmp_path / "points.json", law, points)
    other_text = replace(points[0], name="other", conditions={"data_sha256": "b", "mixers": ["attention"]})
    monkeypatch.setattr(scaling, "measure_run", lambda folder: other_text)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["glalm scaling", *arguments])
        try:
            code = fit_scaling_law()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    name = str(tmp_path / "points.json")
    for arguments in (["x", "--points", name], ["--points", name, "--predict", "x"]):
        code, text = run(*arguments)
        assert code == 2 and "are not points of one law: they differ in data_sha256, mixers" in text
    # The vocabulary of a prediction is that of the points, 320 here.
    code, text = run("--points", name, "--depth", "2")
    assert code == 0 and f"{describe_dial(2, 320)[1]:,}" in text
    # All points have 100 tokens, a model of that depth 20 for each parameter.
    assert "no term of tokens" in text and "these have others: depth 2." in " ".join(text.split())
    write_points(tmp_path / "several.json", law, [replace(points[0], vocab_size=500), *points[1:]])
    assert "have vocabularies of [320, 500]" in run("--points", str(tmp_path / "several.json"), "--depth", "2")[1]
    assert run("--points", str(tmp_path / "several.json"), "--depth", "2", "--vocab-size", "400")[0] == 0
    code, text = run("--points", name, "--out", str(tmp_path))
    assert code == 2 and f"--out {tmp_path} cannot be written" in text
    (tmp_path / "old.json").write_text('{"measurements": [{"name": "x"}]}')
    code, text = run("--points", str(tmp_path / "old.json"))
    assert code == 2 and "old.json is no file of glalm scaling --out" in text


@pytest.mark.parametrize("depth", [1, 8, 16])
def test_dial(depth):
    """The rule as the documentation states it, and that the model of the experiment has these sizes."""
    config = compose_config(TrainingRun, "train", ["experiment=gla_dial", f"model.num_hidden_layers={depth}"])
    width = 256 * math.ceil(depth / 4)
    assert (config.name, config.model.hidden_size, config.model.num_heads) == (
        f"gla_depth_{depth}",
        width,
        width // 256,
    )
    assert config.train.tokens == 20 * (12 * depth * width**2 + 32000 * width)
    wanted = 524_288 * math.sqrt(config.train.tokens / 15e9)
    assert wanted / math.sqrt(2) <= config.train.batch_tokens <= wanted * math.sqrt(2)
    assert config.train.batch_tokens % config.data.seq_len == 0
    dial, parameters = describe_dial(depth, 32000)
    with torch.device("meta"):
        model = CausalLM(config.model)
    assert parameters == sum(p.numel() for p in model.parameters()) - 32000 * width
    assert dial.parameters == pytest.approx(parameters, rel=0.06)
    assert dial.tokens == config.train.tokens


@pytest.mark.parametrize(
    "change, named",
    [
        ("model.vocab_size=null", "model.num_hidden_layers=8 and model.vocab_size=None"),
        ("model.num_hidden_layers=null", "model.num_hidden_layers=None and model.vocab_size=32000"),
        ("model.num_hidden_layers=6.5", "model.num_hidden_layers=6.5 and model.vocab_size=32000"),
    ],
)
def test_dial_refuses_what_has_no_sizes(change, named):
    with pytest.raises(ConfigError, match=f"{re.escape(named)}.*set both"):
        compose_config(TrainingRun, "train", ["experiment=gla_dial", change])


def test_a_run_ends_with_its_tokens_in_whatever_batches_it_read_them(run_config, change, monkeypatch):
    """Four steps of 64 tokens, and four of 32 since the run was resumed, of which 12 would have its tokens."""
    train = replace(run_config.train, steps=None, tokens=384, batch_size=2)
    folder = change(run_config, train=train).folder
    write_json(folder / "run.json", {"config": asdict(change(run_config, train=train))})
    rows = [{"step": step, "tokens": 64 * min(step, 4) + 32 * max(step - 4, 0), "val_loss": 2.0} for step in range(9)]
    monkeypatch.setattr(scaling, "describe_conditions", lambda folder, model: {})
    for last in (7, 8):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: last + 1]))
        if last == 8:
            assert (measure_run(folder).tokens, measure_run(folder).loss) == (384, 2.0)
        else:
            with pytest.raises(ConfigError, match="tiny has not trained to its end"):
                measure_run(folder)


@pytest.mark.slow
def test_runs_are_measured_and_predicted(run_config, change, monkeypatch, capsys, tmp_path):
    """Three sizes fitted, a fourth predicted, and the file of the fit read again."""
    folders = []
    for width in (16, 32, 48, 64):
        config = change(run_config, name=f"width_{width}", **{"model.hidden_size": width, "model.num_heads": 1})
        assert train(config) == 0
        folders.append(config.folder)
    measured = [measure_run(folder) for folder in folders]
    assert [m.tokens for m in measured] == [6 * 4 * 16] * 4 and [m.lr for m in measured] == [1e-2] * 4
    assert measured[1].parameters == count_without_embeddings(change(run_config, **{"model.num_heads": 1}).model)
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert measured[0].loss == rows[-1]["val_loss"]
    out = tmp_path / "law.json"
    arguments = [*map(str, folders[:3]), "--predict", str(folders[3]), "--depth", "4", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["glalm scaling", *arguments])
    assert fit_scaling_law() == 0
    text = capsys.readouterr().out
    assert text.count("fitted") == 3 and text.count("predicted") == 2 and f"wrote {out}" in text
    assert read_points(out) == measured[:3]
    unfinished = change(run_config, name="width_16", **{"train.steps": 8})
    record = json.loads((unfinished.folder / "run.json").read_text())
    record["config"]["train"]["steps"] = 8
    (unfinished.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="width_16 has not trained to its end"):
        measure_run(folders[0])
    # A diverged run has no loss in its last row.
    path = folders[1] / "metrics.jsonl"
    path.write_text(path.read_text().replace('"val_loss"', '"no_loss"'))
    with pytest.raises(ConfigError, match="width_32 has diverged: its last validation loss is not finite"):
        measure_run(folders[1])
