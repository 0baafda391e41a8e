"""Several processes train the same model as one, up to the order of floating-point sums."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from parallel_runs import ENV, KINDS, MODES, check, compare, launched, run

from glalm.config.run import ParallelConfig
from glalm.config.strict import ConfigError, build_dataclass
from glalm.data.files import read_jsonl, try_lock
from glalm.evals.options import TrainingRun
from glalm.model.decoder import CausalLM
from glalm.train import parallel, trainer
from glalm.train.checkpoint import latest_checkpoint
from glalm.train.parallel import check_devices, has_fp32_parameters, is_launched, refuse_launcher_settings
from glalm.train.state import plan_batches
from glalm.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
STATISTICS = {"train.log_every": 2, "train.statistics_every": 2}
OTHERS = {
    "reset, fsdp2, accumulating": KINDS["reset"] | MODES["fsdp2, accumulating"],
    "segments, ddp": KINDS["segments"] | MODES["ddp, accumulating"],
    "segments, fsdp2, selective": KINDS["segments"] | MODES["fsdp2, selective"],
    "bf16, ddp": KINDS["bf16"],
    "statistics, fsdp2": MODES["fsdp2"] | STATISTICS,
    "bf16, fsdp2": KINDS["bf16"] | MODES["fsdp2"],
}
ROUNDED = ["ddp, accumulating", "fsdp2", "hsdp 2 x 1"]  # where sums over processes are taken in bf16 besides


@pytest.fixture
def config(run_config, change):
    """Return a config of four steps of eight sequences with clipped gradients, for a model with two kinds of mixers."""
    return change(
        run_config,
        **{
            "train.steps": 4,
            "train.batch_size": 8,
            "train.micro_batch_size": None,
            "train.compile": False,
            "optim.grad_clip": 0.5,
            "optim.eps": 1e-4,  # with less, Adam makes a step of the rounding of gradients near 0
            "model.layers": "gla+mamba2",
        },
    )


@pytest.mark.slow
def test_every_mode_gives_the_losses_and_weights_of_one_process(config, change, tmp_path):
    rounded = {f"rounded, {mode}": KINDS["rounded"] | MODES[mode] for mode in ROUNDED}
    found = compare(config, change, tmp_path, MODES | OTHERS | rounded)
    for mode in ROUNDED:
        assert abs(found[f"rounded, {mode}"]["norms"][0] - found[mode]["norms"][0]) > 1e-5, mode


@pytest.mark.slow
def test_compiled_modes_give_the_same(config, change, tmp_path):
    compiled = {"train.compile": True}
    compare(config, change, tmp_path, {"ddp": compiled | STATISTICS, "fsdp2": compiled | MODES["fsdp2, selective"]})


def test_fsdp2_on_one_process_equals_the_plain_run(config, change):
    check("alone", run(change(config, **MODES["fsdp2"])), run(config), 1e-6)


def test_gradients_are_reduced_once_per_step(config, change, monkeypatch):
    """FSDP2's shards have gradients only after the last segment of the last micro-batch."""
    given = {"parallel.mode": "fsdp2", "train.micro_batch_size": 4, "train.tbptt_length": 8}
    config = change(config, **given)
    has_gradients = []
    accelerator = parallel.start_processes(config)
    sharded = Trainer(config, plan_batches(config, accelerator.num_processes), accelerator)

    no_sync_unless = parallel.no_sync_unless

    @contextmanager
    def recorded(sync, module):
        with no_sync_unless(sync, module):
            yield
        has_gradients.append([p.grad is not None for p in module.parameters()])

    monkeypatch.setattr(parallel, "no_sync_unless", recorded)
    ids = torch.ones(8, 16, dtype=torch.int64)
    sharded.accumulate_gradients({"input_ids": ids, "labels": ids})
    assert [any(found) for found in has_gradients] == [False, False, False, True] and all(has_gradients[-1])


@pytest.mark.parametrize(
    "given, world, local, mesh",
    [
        ({}, 8, 4, (8, 1)),
        ({"mode": "fsdp2"}, 8, 4, (1, 8)),
        ({"mode": "hsdp"}, 8, 4, (2, 4)),
        ({"mode": "hsdp", "shard": 2}, 8, 4, (4, 2)),
        ({"mode": "hsdp", "replicate": 8}, 8, 4, (8, 1)),
        ({"mode": "hsdp", "replicate": 1, "shard": 8}, 8, 4, (1, 8)),
    ],
)
def test_mesh(given, world, local, mesh):
    assert ParallelConfig(**given).mesh(world, local) == mesh


@pytest.mark.parametrize(
    "given, message",
    [
        ({"replicate": 2, "shard": 4}, r"needs 8 processes, one per GPU, but there are 4"),
        (
            {"shard": 8},
            r"parallel.shard=8 does not divide the number of processes, 4; set it to one of 1, 2, 4, or start",
        ),
        ({"replicate": 8}, r"parallel.replicate=8 times parallel.shard=1 needs 8 processes"),
        ({"replicate": 3}, r"parallel.replicate=3 times parallel.shard=1 needs 3 processes"),
    ],
)
def test_mesh_must_match_the_number_of_processes(given, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(mode="hsdp", **given).mesh(4, 4)


def test_mesh_sizes_are_options_of_hsdp():
    with pytest.raises(ConfigError, match="are options of parallel=hsdp, not of fsdp2"):
        ParallelConfig(mode="fsdp2", shard=2)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ACCELERATE_USE_FSDP", "true", "Use parallel=fsdp2"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "Use parallel=fsdp2"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "Use parallel=ddp"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "Use train.micro_batch_size=N"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "Use train.compile=true"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "Use train.precision=bf16"),
    ],
)
def test_contradictory_launcher_settings_are_refused(name, value, message):
    refuse_launcher_settings({name: {"true": "false", "4": "1", "INDUCTOR": "no", "fp16": "bf16"}[value]})
    with pytest.raises(ConfigError, match=message):
        refuse_launcher_settings({name: value})


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("missing", LAUNCHED)
def test_a_launcher_sets_all_its_variables(missing):
    """A container may set some of them. More than one process needs a launcher."""
    assert is_launched(LAUNCHED) and is_launched(LAUNCHED | {"WORLD_SIZE": "1"})
    environ = {name: value for name, value in LAUNCHED.items() if name != missing}
    assert not is_launched(environ | {"WORLD_SIZE": "1"}) or missing == "WORLD_SIZE"
    if missing == "WORLD_SIZE":
        assert not is_launched(environ)
        return
    for world_size in ("2", "", "many"):
        with pytest.raises(ConfigError, match=rf"^WORLD_SIZE={world_size} is set without {missing}\. .*torchrun"):
            is_launched(environ | {"WORLD_SIZE": world_size})


@pytest.mark.parametrize(
    "environ, message",
    [
        (
            {"LOCAL_RANK": "2", "WORLD_SIZE": "4"},
            r"Process 2 of this machine has no GPU: 2 are visible.*--nproc-per-node=2",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes that do not know of each other"),
    ],
)
def test_processes_need_a_gpu_each(environ, message):
    check_devices({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, gpu_count=2)
    check_devices({}, gpu_count=1)
    with pytest.raises(ConfigError, match=message):
        check_devices(environ, gpu_count=2)


def test_mixers_with_fp32_parameters_are_gathered_in_fp32(config):
    model = CausalLM(config.model)
    gla, mamba2 = model.model.layers
    assert has_fp32_parameters(mamba2) and not has_fp32_parameters(gla)


def test_only_a_process_of_a_launcher_ends_with_its_parent(monkeypatch):
    """`nohup glalm train &` in a container that sets a default of Accelerate's survives the shell."""
    command = launch_command_parser().parse_args(["--cpu", "--mixed_precision=no", "--dynamo_backend=no", "train.py"])
    command.num_machines = 1
    _, launched_environment = prepare_simple_launcher_cmd_env(command)
    for environment, is_watched in (({"ACCELERATE_MIXED_PRECISION": "bf16"}, False), (launched_environment, True)):
        watch = Mock()
        monkeypatch.setattr(parallel, "call_without_parent", watch)
        monkeypatch.setattr(parallel.os, "environ", environment)
        parallel.stop_with_launcher.__wrapped__()
        assert watch.called == is_watched


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],  # its --cpu starts one process
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher, mode", [("torchrun", "fsdp2"), ("accelerate", "ddp")])
def test_train_py_under_each_launcher(launcher, mode, token_folder, tmp_path):
    """A sweep by the command line finishes, and its losses are those of one process."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "train.py", "--multirun", f"hydra.sweep.dir={tmp_path}"]
    command += [f"data.path={token_folder}", "train.batch_size=4", "train.micro_batch_size=1"]
    command += ["name=${train.precision}", "train.precision=fp32,bf16", f"runs_dir={tmp_path}", f"parallel={mode}"]
    command += ["data.seq_len=16", "model.hidden_size=32", "model.intermediate_size=32", "model.num_hidden_layers=1"]
    command += ["optim.warmup_steps=1", "train.steps=4", "train.eval_every=4", "train.log_every=1"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu, fp32" in done.stderr and "2 x cpu, bf16" in done.stderr
    assert "sendBytes" not in done.stderr  # no process loses the watchdog's store before it knows that the run is over

    assert read_jsonl(tmp_path / "bf16" / "metrics.jsonl")[-1]["step"] == 4
    tree = json.loads((tmp_path / "fp32" / "run.json").read_text())["config"]
    tree |= {"name": "alone", "parallel": {"mode": "ddp"}}
    trainer.train(build_dataclass(TrainingRun, tree))
    pair, alone = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("fp32", "alone"))
    for one, two in zip(alone, pair, strict=True):
        for key in {"step", "loss", "grad_norm", "val_loss", "tokens"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_of_a_killed_launcher_stop_with_a_checkpoint(launcher, token_folder, tmp_path):
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "train.py", "name=mine", f"runs_dir={tmp_path}"]
    command += [f"data.path={token_folder}", "train.batch_size=4", "train.micro_batch_size=1", "data.seq_len=16"]
    command += ["model.hidden_size=32", "model.intermediate_size=32", "model.num_hidden_layers=1", "train.log_every=1"]
    command += ["optim.warmup_steps=1", "train.steps=1000000", "train.checkpoint.every=500000"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=log, stderr=log)
    metrics = tmp_path / "mine" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 3)
    process.kill()
    process.wait()
    wait_until(lambda: "Stopped at step" in (tmp_path / "log").read_text())
    with open(tmp_path / "mine" / ".lock") as lock:
        wait_until(lambda: try_lock(lock))  # The last of the processes has ended.
    assert latest_checkpoint(tmp_path / "mine" / "checkpoints") is not None


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)


@pytest.mark.slow
def test_too_large_mesh_ends_with_a_message():
    done = launched(["train.py", "parallel=hsdp", "parallel.shard=4"])
    assert done.returncode != 0
    assert (
        "ConfigError: parallel.shard=4 does not divide the number of processes, 2; set it to one of 1, 2" in done.stderr
    )
