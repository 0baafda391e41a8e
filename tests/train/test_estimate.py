"""Estimates compared with the parameters, activations and optimizer states of real models."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glalm.cli import compose_config
from glalm.commands.train_and_eval import run_training
from glalm.config.run import CheckpointConfig
from glalm.config.stages import StageConfig
from glalm.config.strict import ConfigError
from glalm.evals.options import TrainingRun
from glalm.model.decoder import model_cost
from glalm.train import estimate as estimate_module
from glalm.train.checkpoint import list_checkpoints
from glalm.train.estimate import (
    Device,
    advise_memory,
    average_mfu,
    count_epochs,
    describe_checkpoints,
    describe_data,
    describe_host_memory,
    describe_missing_data,
    describe_needs,
    describe_time,
    estimate_hours_and_memory,
    explain_out_of_memory,
    phase_costs,
)
from glalm.train.memory import GIB, count_parameters, estimate_memory
from glalm.train.run_dir import open_data
from glalm.train.trainer import train
from glalm.train.training_data import TrainingData

MODEL = {"hidden_size": 64, "num_hidden_layers": 3, "num_heads": 2, "intermediate_size": 128, "vocab_size": 100}
H200 = Device("NVIDIA H200", 140 * GIB, True)


def test_report_of_a_dry_run(run_config, change):
    config = change(run_config, **{"train.steps": 1000, "train.assumed_mfu": 0.5, "train.compile": False})
    text = "\n".join(describe_needs(config, 2, H200))
    total, tokens = count_parameters(config).total, 1000 * 4 * 16
    hours = tokens * model_cost(config.model, 16).training / (0.5 * 989e12) / 2 / 3600
    assert f"{total:,}; {total - 2 * 320 * 32:,} without" in text
    assert "4 x 16 = 64 tokens: 2 x NVIDIA H200, each 1 micro-batch of 2 sequences, ddp" in text
    assert "1,000 (64,000 tokens), warm-up over the first 2" in text
    assert f"time          {3600 * hours:.0f} s, 0.0 GPU hours" in text and f"{12 * total / 1e9:.2f} GB each" in text
    assert "WARNING" not in text
    small = "\n".join(describe_needs(config, 2, Device("A small one", 2**16, True)))
    assert "WARNING: more than the 0.0 GiB of A small one. Set a smaller train.micro_batch_size" in small
    assert "with several GPUs parallel=fsdp2, and for long" in small
    hybrid = change(config, **{"parallel.mode": "hsdp"})
    assert "parallel=fsdp2, which shards over the GPUs of all machines" in advise_memory(hybrid)
    assert "fsdp2" not in advise_memory(change(config, **{"parallel.mode": "fsdp2"}))
    assert "time          not estimated, because the peak of A small one is unknown. For another GPU, add " in small


def test_dry_run_prints_the_costs(run_config, change):
    config = change(run_config, **{"train.assumed_mfu": 0.5, "train.assumed_price": 2.5})
    text = describe_time(config, 2, H200, flops_per_token=1e9, tokens=10**15, mfu=0.5, basis="train.assumed_mfu")
    gpu_hours = 1e9 * 1e15 / (0.5 * 989e12) / 3600
    assert f"{gpu_hours:,.0f} GPU hours for {2.5 * gpu_hours:,.0f} at 2.5 an hour, at 50%" in text


@pytest.mark.parametrize(
    "assumed, mfu, basis",
    [(None, 0.434, "as measured; train.assumed_mfu sets another"), (0.3, 0.3, "train.assumed_mfu")],
)
def test_hours_follow_from_the_speed_of_the_mixer(assumed, mfu, basis):
    """15B tokens of the GLA paper's 340M model were measured to take 20.4 hours on one H200, at 204,400 tokens/s."""
    config = compose_config(TrainingRun, "train", ["experiment=gla_340m", "train.assumed_gpu=H200"])
    config.train.assumed_mfu = assumed
    costs = phase_costs(config, 1)
    assert average_mfu(costs, H200) == (pytest.approx(mfu, rel=0.001), basis)
    hours = costs[0].flops / (989e12 * mfu) / 3600
    assert hours == pytest.approx(20.4 * 0.434 / mfu, rel=0.01)
    line = describe_time(config, 1, H200, costs[0].flops_per_token, costs[0].phase.tokens, mfu, basis)
    assert line.startswith(f"{hours:.1f} hours, ") and f"TFLOP/s ({basis}): " in line


def test_indivisible_batch_is_refused(run_config, change):
    with pytest.raises(ConfigError, match="Choose a multiple of 3"):
        list(describe_needs(run_config, 3, H200))


def test_dry_run_needs_no_data_and_writes_nothing(run_config, change, capsys):
    from glalm.train.trainer import train

    assumed = {"train.assumed_gpu": "H200", "train.assumed_gpus": 2}
    config = change(run_config, **assumed, **{"train.dry_run": True, "data.path": "nowhere"})
    config.train.compile = False
    assert train(config) == 0 and not config.folder.exists()
    report = capsys.readouterr().out
    assert report.startswith("planned for   2 x NVIDIA H200 (139.8 GiB), assumed\n")
    warning = "WARNING: data and vocabulary have not been checked. data.path=nowhere: nowhere/manifest.json"
    assert report.splitlines()[-1].startswith(warning)
    # If the user has named this path, the run would refuse it, and so does the dry run.
    with pytest.raises(ConfigError, match=r"data.path=nowhere: nowhere/manifest.json is missing"):
        estimate_module.dry_run(config, requires_data=True)


CPU = Device("CPU with 2 threads", 16 * GIB, bf16=False, is_gpu=False)


def test_without_a_gpu_the_cpu_is_timed(run_config, monkeypatch, capsys):
    """A clock that advances half a second at each look: a batch of 32 tokens takes that long, and an update of 64."""
    seconds = itertools.count(0.0, 0.5)
    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(estimate_module, "current_device", lambda: CPU)
    assert estimate_module.dry_run(run_config) == 0
    report = capsys.readouterr().out
    assert report.startswith(
        "planned for   1 x CPU with 2 threads (16.0 GiB), of this machine. To plan for a GPU, add "
    )
    hours = 6 * 64 / (32 / 0.75) / 3600
    assert f"time          {3600 * hours:.0f} s, at {32 / 0.75:.0f} tokens/s" in report
    assert "H200" not in report.partition("\n")[2] and "host memory" not in report


def test_large_models_are_not_timed_on_a_cpu(run_config, monkeypatch):
    monkeypatch.setattr(estimate_module, "MAX_TIMED_PARAMETERS", 1000)
    (line,) = (line for line in describe_needs(run_config, 1, CPU) if line.startswith("time"))
    assert "not measured" in line and "train.assumed_gpu=H200" in line


def test_a_number_of_gpus_needs_their_kind(run_config, change, monkeypatch):
    monkeypatch.setattr(estimate_module, "current_device", lambda: CPU)
    with pytest.raises(ConfigError, match=r"train.assumed_gpus=8 needs a kind of GPU.*train.assumed_gpu=H200"):
        estimate_module.dry_run(change(run_config, **{"train.assumed_gpus": 8}))


def test_dry_run_refuses_what_the_run_refuses(run_config, change):
    with pytest.raises(ConfigError, match=r"has 300 tokens, more than model\.vocab_size=299"):
        list(describe_needs(change(run_config, **{"model.vocab_size": 299}), 1, H200))
    (line,) = describe_data(run_config, open_data(run_config)[0])
    size = sum(path.stat().st_size for path in Path(run_config.data.path).rglob("*") if path.is_file())
    assert "a vocabulary of 300" in line and line.endswith(f"; {size / 1e9:.2f} GB")


@pytest.mark.parametrize("vocabulary, size", [(2**16, "2.00 GB"), (2**16 + 1, "4.00 GB")])
def test_disk_of_data_that_is_not_there(run_config, change, vocabulary, size):
    config = change(run_config, **{"data.path": "nowhere", "model.vocab_size": vocabulary})
    (line,) = describe_missing_data(config, tokens=10**9)
    assert line.startswith(f"data          {size} for tokens that are read once")


def test_often_repeated_data_is_warned_of(run_config, change):
    """The set has N windows of 16 tokens, and a step reads 4 of them."""
    number = len(open_data(run_config)[0].phases[0].windows)

    def report(epochs: float) -> list[str]:
        config = change(run_config, **{"train.steps": int(epochs * number / 4)})
        return list(describe_data(config, open_data(config)[0]))

    (line,) = report(3.9)
    assert "read 3.90 times" in line
    line, warning = report(200_000)
    assert "read 200,000 times" in line and "reads its data 200,000 times" in warning and "arXiv 2305.16264" in warning
    tokens = 4 * 16 * number
    assert warning.endswith(f"at most {tokens:,} tokens, by train.steps=null train.tokens={tokens}.")
    train = dataclasses.replace(run_config.train, steps=None, stages={"one": StageConfig(tokens=2.0 * tokens)})
    staged = dataclasses.replace(run_config, train=train)
    assert "tokens, by lower tokens of train.stages." in [*describe_data(staged, open_data(staged)[0])][1]
    assert advise_memory(staged).endswith("Where a stage has such a key of its own, set that.")


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(17, 400), st.none() | st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(2, 60),
    st.booleans(),
)
def test_epochs_of_each_source_are_those_of_the_windows_that_steps_read(run_config, change, drawn, steps, weighted):
    sources = {f"source{i}": tokens for i, (tokens, _) in enumerate(drawn)}
    weights = {name: float(weight or 1) for name, (_, weight) in zip(sources, drawn, strict=True)}
    config = change(run_config, **{"train.steps": steps, "data.weights": weights if weighted else None})
    training = TrainingData(config, SimpleNamespace(source_tokens=sources))
    windows = training.phases[0].windows.source_windows
    ends = np.cumsum([*windows.values()])
    read = np.concatenate([training.window_ids(step) for step in range(steps)])
    counted = np.bincount(np.searchsorted(ends, read, side="right"), minlength=len(ends))
    epochs = count_epochs(training)
    for source, count in zip(windows, counted, strict=True):
        if weighted:
            assert epochs[source] == pytest.approx(count / windows[source])
        else:  # Sources of one pool end their epochs together.
            assert epochs[source] == pytest.approx(len(read) / ends[-1])


def test_the_source_that_weights_repeat_most_is_warned_of(run_config, change):
    """A tenth of the windows are of the source that has 3 windows of 100, so it is read most."""
    config = change(run_config, **{"train.steps": 256, "data.weights": {"large": 0.9, "small": 0.1}})
    sources = {"large": 97 * 16 + 1, "small": 3 * 16 + 1}
    tokens = SimpleNamespace(source_tokens=sources, num_tokens=sum(sources.values()), vocab_size=300)
    line, warning = describe_data(config, TrainingData(config, tokens))
    assert "read 10 times" in line and "reads the source small 34 times" in warning  # 1024 / 10 / 3


@pytest.mark.parametrize("rows, warned", [(600, False), (601, True)])
def test_rows_without_tokens_are_warned_of(run_config, change, rows, warned):
    """The data's vocabulary has 300 tokens."""
    config = change(run_config, **{"model.vocab_size": rows})
    lines = list(describe_data(config, open_data(config)[0]))
    assert len(lines) == (2 if warned else 1)
    if warned:
        assert "embeddings for 601 tokens" in lines[1] and "vocabulary has 300" in lines[1]
        assert "model.vocab_size=null" in lines[1] and "--vocab-size 601" in lines[1]


def test_a_disk_without_room_for_the_checkpoints(run_config, monkeypatch):
    for free, lines in ((3 * 10**9, 1), (3 * 10**9 - 1, 2)):
        monkeypatch.setattr(estimate_module.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        report = list(describe_checkpoints(run_config, 10**9))
        assert len(report) == lines and "1.00 GB each, 3.0 GB for the newest 2 and one" in report[0]


@pytest.mark.parametrize(
    "keep, text",
    [
        ({"keep_last": 1, "keep_every": 2}, "4.0 GB for the newest 1, 2 by keep_every and one"),
        ({"keep_last": 2, "keep_every": 4, "keep_best": 1}, "5.0 GB for the newest 2, 1 by keep_every, 1 by keep_best"),
        # All six checkpoints stay, so that none is removed while another is saved.
        ({"keep_last": 6}, "6.0 GB for the newest 6;"),
        ({"keep_last": 9}, "6.0 GB for the newest 6;"),
        ({"keep_last": 4, "keep_best": 3}, "6.0 GB for the newest 4, 2 by keep_best;"),
    ],
)
def test_the_disk_of_checkpoints_is_that_of_all_that_the_run_keeps(run_config, keep, text):
    run_config.train.checkpoint = CheckpointConfig(every=1, **keep)
    run_config.train.eval_every = 1
    [line, *_] = describe_checkpoints(run_config, 10**9)
    assert text in line
    assert train(run_config) == 0
    best_may_be_new = run_config.train.checkpoint.keep_best
    kept = float(text[:3]) - ("one that is being saved" in line)
    assert 0 <= kept - len(list_checkpoints(run_config.folder / "checkpoints")) <= best_may_be_new


def test_host_memory_of_a_machine(run_config, change):
    """Sixteen processes on two machines. Each builds the model; a checkpoint's copy is divided over all of them."""
    assert describe_host_memory(run_config, 16, GIB, 12 * GIB).startswith("8.0 GiB per machine with 8 processes")
    assert describe_host_memory(run_config, 16, GIB, 24 * GIB).startswith("12.0 GiB per machine with 8 processes")
    config = change(run_config, **{"train.checkpoint.asynchronous": False})
    assert describe_host_memory(config, 16, GIB, 24 * GIB).startswith("8.0 GiB")


def test_dry_run_names_the_vocabulary_of_the_data_or_its_assumption(run_config, change, capsys, monkeypatch):
    monkeypatch.setattr(estimate_module, "current_device", lambda: H200)
    config = change(run_config, **{"model.vocab_size": None, "train.compile": False})
    assert estimate_module.dry_run(config) == 0 and config.model.vocab_size == 300
    with_data = capsys.readouterr().out
    assert with_data.startswith(f"vocabulary    300 tokens, those of {config.data.path}\nplanned for   ")
    config = change(run_config, **{"model.vocab_size": None, "train.compile": False, "data.path": "nowhere"})
    assert estimate_module.dry_run(config) == 0 and config.model.vocab_size == 32000
    without = capsys.readouterr().out
    assert "32,000 tokens are assumed, because model.vocab_size is null and nowhere/manifest.json is missing" in without

    def parameters(text: str) -> int:
        return int(text.splitlines()[2].split()[1].strip(";").replace(",", ""))

    assert parameters(without) - parameters(with_data) == 2 * 32 * (32000 - 300)


def test_out_of_memory_names_the_estimate_and_what_to_change(run_config, monkeypatch):
    monkeypatch.setattr(estimate_module, "current_device", lambda: H200)
    run_config.train.compile = False
    message = explain_out_of_memory(run_config, 1)
    assert message.startswith("NVIDIA H200 with 140.0 GiB is out of memory. The estimate was 0.0 GiB per process: ")
    assert "train.micro_batch_size" in message
    for graph in (False, "auto"):
        run_config.train.cuda_graph = graph
        message = explain_out_of_memory(run_config, 1)
        assert ("If that happened between steps, train.cuda_graph=false" in message) == (graph == "auto")


def test_graphs_take_memory_only_if_all_stages_can_have_them(run_config, monkeypatch):
    monkeypatch.setattr(estimate_module, "current_device", lambda: H200)
    stages = {"one": StageConfig(tokens=640), "two": StageConfig(tokens=640)}
    for boundaries in ("ignore", "reset_state"):
        stages["two"].document_boundaries = boundaries
        train = dataclasses.replace(run_config.train, steps=None, stages=stages, compile=False)
        message = explain_out_of_memory(dataclasses.replace(run_config, train=train), 1)
        assert ("train.cuda_graph=false" in message) == (boundaries == "ignore")


def test_dry_run_adds_the_costs_of_stages_and_has_the_memory_of_the_largest(run_config):
    """A forward pass of the second stage has 2 windows of 256 tokens, one of the first has 2 of 16."""
    long = StageConfig(tokens=5120, seq_len=256, batch_size=2, micro_batch_size=2)
    stages = {"short": StageConfig(tokens=640), "long": long}
    train = dataclasses.replace(
        run_config.train, steps=None, stages=stages, compile=False, cuda_graph=False, assumed_mfu=0.5
    )
    model = dataclasses.replace(run_config.model, mixer="attention")
    config = dataclasses.replace(run_config, model=model, train=train)
    text = "\n".join(describe_needs(config, 1, H200))
    assert "short: steps 1 to 10, 640 tokens" in text and "long: steps 11 to 20, 5,120 tokens" in text
    flops = 640 * model_cost(config.model, 16).training + 5120 * model_cost(config.model, 256).training
    costs = phase_costs(config, 1)
    assert sum(cost.flops for cost in costs) == flops and "steps         20 (5,760 tokens)" in text
    alone = estimate_memory(costs[1].phase.config, costs[1].plan, 1, True, False)
    assert f"{sum(alone.values()) / GIB:.1f} GiB per process in stage long" in text
    checkpoint = 12 * count_parameters(config).total
    assert f"{4 * checkpoint / 1e9:.1f} GB for the newest 2, 1 at ends of stages and one" in text
    config.train.assumed_gpu = "H200"
    hours, memory = estimate_hours_and_memory(config)
    assert hours == pytest.approx(flops / (0.5 * 989e12) / 3600) and memory == sum(alone.values())


def test_a_path_that_was_typed_must_hold_data(run_config, change, monkeypatch, capsys):
    assumed = {"train.assumed_gpu": "H200", "train.dry_run": True, "data.path": "nowhere"}
    config = change(run_config, **assumed)
    config.train.compile = False
    monkeypatch.setattr("glalm.commands.train_and_eval.job_overrides", lambda: ["data=local", "name=mine"])
    assert run_training(config) == 0
    assert "data and vocabulary have not been checked" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr("glalm.commands.train_and_eval.job_overrides", lambda: ["name=mine", "data.path=nowhere"])
    with pytest.raises(ConfigError, match=r"data.path=nowhere: nowhere/manifest.json is missing"):
        run_training(config)
