"""Several processes: a fault on one of them has the same effect on all, and another number of them can resume."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from injection import before_steps, poisoned_steps, send_signal
from processes import start, text, until, wait
from sameness import rows, weights
from test_steps import train_signalled

from glalm.config.run import CheckpointConfig, RunConfig
from glalm.config.stages import StageConfig
from glalm.data import loader
from glalm.train import parallel, random_states, staging, trainer
from glalm.train.checkpoint import CheckpointSaver, latest_checkpoint, load_train_state, verify_checkpoint
from glalm.train.hang_monitor import is_stopped
from glalm.train.optim import learning_rate
from glalm.train.run_lock import RunLock
from glalm.train.state import TrainState, plan_batches
from glalm.train.trainer import train
from glalm.train.watchdog import WATCHDOG_EXIT_CODE

pytestmark = pytest.mark.slow  # Every test starts two to four processes.


def save(folder: Path, state: TrainState) -> Path:
    with CheckpointSaver(folder, CheckpointConfig(asynchronous=False)) as saver:
        saver.save(state, {})
        return saver.finish()


def run(config: RunConfig, world: int, log, function=train, *args) -> list[int]:
    return wait(start(function, *args, config, log=log, world=world, launched=True), 90)


def assert_close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("modes", [["ddp"] * 3, ["ddp", "fsdp2", "ddp"], ["fsdp2", "hsdp", "fsdp2"]])
def test_another_number_of_processes_resumes_with_the_same_tokens(run_config, change, unbroken, tmp_path, modes):
    """Train with 4 processes, then 2, then 4, also from DDP to FSDP2 and back.

    The loaded state equals the saved one bit for bit. The losses equal those of one process up to the order of sums.
    """
    log = tmp_path / "log"
    config = change(run_config, **{"train.micro_batch_size": 1, "train.checkpoint.keep_last": 9})
    stages = [(4, 2), (2, 4), (4, 6)]
    for (world, steps), mode in zip(stages, modes, strict=True):
        parallel = {"parallel.mode": mode} | ({"parallel.replicate": world // 2} if mode == "hsdp" else {})
        now = change(config, **{"train.steps": steps, "train.allow_changes": ["train.steps"]}, **parallel)
        # The schedule is the whole run's, whichever part of it this is.
        assert run(now, world, log, train_part, 6) == [0] * world, text(log)
        files = {p.name for p in (config.folder / "checkpoints" / f"step_{steps}").glob("model*")}
        assert files == {f"model-{r + 1:05d}-of-{world:05d}.safetensors" for r in range(world)}
    assert_close(weights(config.folder / "checkpoints/step_6"), weights(unbroken / "checkpoints/step_6"))
    for a, b in zip(rows(config.folder), rows(unbroken), strict=True):
        assert a["step"] == b["step"] and a.get("tokens") == b.get("tokens")
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_average_of_the_weights_resumes_with_another_number_of_processes(run_config, change, tmp_path):
    log = tmp_path / "log"
    config = change(run_config, **{"train.ema_decay": 0.7, "train.micro_batch_size": 1})
    alone = change(config, name="alone")
    assert train(alone) == 0
    for world, steps, mode in ((2, 2, "fsdp2"), (1, 4, "ddp"), (2, 6, "fsdp2")):
        changes = {"train.steps": steps, "train.allow_changes": ["train.steps"], "parallel.mode": mode}
        assert run(change(config, **changes), world, log, train_part, 6) == [0] * world, text(log)
    averages = [weights(each.folder / "checkpoints/step_6") for each in (config, alone)]
    assert any(name.startswith("average.") for name in averages[0])
    assert_close(*averages)
    expected = [row["average/val_loss"] for row in rows(alone.folder) if row["step"] == 6]
    assert [row["average/val_loss"] for row in rows(config.folder) if row["step"] == 6] == pytest.approx(
        expected, rel=1e-4
    )


def test_run_in_stages_resumes_with_another_number_of_processes(run_config, change, tmp_path):
    """Two processes are killed at the end of the first stage, then one in the second, and two go on."""
    log = tmp_path / "log"
    decay = StageConfig(tokens=192, seq_len=32, batch_size=2, document_boundaries="reset_state")
    stages = {"stable": StageConfig(tokens=192), "decay": decay}
    given = {"train.checkpoint.asynchronous": False, "train.checkpoint.every": 1, "train.micro_batch_size": 1}
    config = change(run_config, **given)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=None, stages=stages))
    alone = dataclasses.replace(config, name="alone")
    assert train(alone) == 0
    for world, mode, kill_before in ((2, "fsdp2", 4), (1, "ddp", 2), (2, "ddp", None)):
        codes = run(change(config, **{"parallel.mode": mode}), world, log, train_killed, kill_before)
        assert (-signal.SIGKILL in codes) == (kill_before is not None), text(log)
    assert codes == [0, 0], text(log)
    assert_close(weights(config.folder / "checkpoints/step_6"), weights(alone.folder / "checkpoints/step_6"))
    for a, b in zip(rows(config.folder), rows(alone.folder), strict=True):
        assert a["step"] == b["step"] and a.get("stage_tokens/decay") == b.get("stage_tokens/decay")
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def train_part(steps: int, config: RunConfig) -> int:
    """Train to the config's last step with the learning rates of a run of `steps`."""
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    trainer.learning_rate = lambda step, config: learning_rate(step, longer)
    return train(config)


@pytest.mark.slow
def test_killed_run_resumes_with_another_context(run_config, change, unbroken, tmp_path):
    """Four processes share the tokens of a sequence, then one has all of them, then two of four share them."""
    log = tmp_path / "log"
    config = change(run_config, **{"train.checkpoint.asynchronous": False})
    for world, context, kill_before in ((4, 4, 4), (1, 1, 3), (4, 2, None)):
        shared = change(config, **{"parallel.context": context})
        codes = run(shared, world, log, train_killed, kill_before)
        assert (-signal.SIGKILL in codes) == (kill_before is not None) and (any(codes) or kill_before is None), text(
            log
        )
    assert_close(weights(config.folder / "checkpoints/step_6"), weights(unbroken / "checkpoints/step_6"))
    for a, b in zip(rows(config.folder), rows(unbroken), strict=True):
        assert a["step"] == b["step"] and a.get("tokens") == b.get("tokens")
        for name in {"loss", "val_loss"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-5)


def train_killed(step: int | None, config: RunConfig) -> int:
    """Train until this process kills itself before its `step`-th step."""
    with before_steps({} if step is None else {step: lambda: send_signal(signal.SIGKILL)}):
        return train(config)


def test_missing_file_of_one_rank(run_config, tmp_path):
    """Both processes resume from the same older checkpoint."""
    assert run(run_config, 2, tmp_path / "log") == [0, 0]
    before = rows(run_config.folder)
    (run_config.folder / "checkpoints/step_6/training-00002-of-00002.safetensors").unlink()
    assert run(run_config, 2, tmp_path / "log") == [0, 0]
    said = text(tmp_path / "log")
    assert "training-00002-of-00002.safetensors is missing" in said and "resuming after step 4" in said
    assert rows(run_config.folder) == before


def train_poisoned(config: RunConfig) -> int:
    """Train with a gradient that is NaN in step 3, and a loss that is infinite in step 5, on rank 1 only."""
    if os.environ["RANK"] != "1":
        return train(config)
    with poisoned_steps({3}, gradient=math.nan), poisoned_steps({5}, loss=math.inf):
        return train(config)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_nan_on_one_rank_makes_all_ranks_skip(run_config, change, tmp_path, mode):
    every = {"train.micro_batch_size": 1, "train.checkpoint.every": 1, "train.checkpoint.keep_last": 9}
    config = change(run_config, **every, **{"parallel.mode": mode})
    assert run(config, 2, tmp_path / "log", train_poisoned) == [0, 0], text(tmp_path / "log")
    saved = {n: weights(config.folder / f"checkpoints/step_{n}") for n in range(2, 7)}
    for a, b, same in ((2, 3, True), (3, 4, False), (4, 5, True), (5, 6, False)):
        equal = [torch.equal(saved[a][n], saved[b][n]) for n in saved[a] if not n.startswith("guard.")]
        assert all(equal) == same
    assert rows(config.folder)[-1]["skipped_steps"] == 2


def test_signal_to_one_rank_stops_all_with_one_checkpoint(run_config, tmp_path):
    assert run(run_config, 2, tmp_path / "log", train_signalled, signal.SIGUSR1, 3) == [128 + signal.SIGUSR1] * 2
    assert latest_checkpoint(run_config.folder / "checkpoints").name == "step_3"
    assert run(run_config, 2, tmp_path / "log") == [0, 0]
    assert [row["step"] for row in rows(run_config.folder)] == list(range(7))


def train_without_host_memory(config: RunConfig) -> int:
    """Train, but let rank 1 find no host memory for the copy of its second save."""
    real, calls = staging.HostBuffers.allocate, []

    def allocate(self, files):
        calls.append(1)
        if len(calls) == 3:  # after the warm-up and the first save
            torch.empty(1 << 46)
        real(self, files)

    if os.environ["RANK"] == "1":
        staging.HostBuffers.allocate = allocate
    return train(config)


def test_one_rank_without_host_memory(run_config, change, tmp_path):
    """That rank saves synchronously, the other in the background, and the checkpoint is complete."""
    config = change(run_config, **{"train.micro_batch_size": 1, "train.checkpoint.keep_last": 9})
    assert run(config, 2, tmp_path / "log", train_without_host_memory) == [0, 0], text(tmp_path / "log")
    assert "rank 1 has no host memory to copy step 4: " in text(tmp_path / "log", 1)
    for step in (2, 4, 6):
        verify_checkpoint(config.folder / "checkpoints" / f"step_{step}")
    assert "failed_saves" not in rows(config.folder)[-1]


def test_sharded_checkpoint_is_exported(run_config, change, unbroken, tmp_path):
    """transformers refuses the shards of two processes with advice, and loads the export."""
    from transformers import AutoModelForCausalLM

    import glalm.hf  # noqa: F401 (registers the model)
    from glalm.compat.export import export_run

    config = change(run_config, **{"parallel.mode": "fsdp2", "train.micro_batch_size": 1})
    assert run(config, 2, tmp_path / "log") == [0, 0], text(tmp_path / "log")
    path = config.folder / "checkpoints" / "step_6"
    with pytest.raises(ValueError, match=r"glalm export RUN --checkpoint step_6 --out FOLDER"):
        AutoModelForCausalLM.from_pretrained(path)
    export_run(config.folder, "step_6", tmp_path / "exported")
    loaded, saved = AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), weights(path)
    assert all(torch.equal(p, saved[name]) for name, p in loaded.named_parameters())
    expected = weights(unbroken / "checkpoints" / "step_6")
    assert_close(
        {n: p.detach() for n, p in loaded.named_parameters()}, {n: expected[n] for n, _ in loaded.named_parameters()}
    )


def train_without_folder(is_taken: bool, config: RunConfig) -> int:
    """Train, and let rank 0 remove the run's folder in step 3. If `is_taken`, another run locks a new one."""

    def remove_folder() -> None:
        shutil.rmtree(config.folder)
        if is_taken:
            config.folder.mkdir()
            other = RunLock(config.folder)
            other._holder = "process 1 on another machine"
            other.acquire()

    with before_steps({3: remove_folder} if os.environ["RANK"] == "0" else {}):
        return train(config)


def test_ranks_restore_a_removed_folder_together(run_config, change, tmp_path):
    config = change(run_config, **{"train.checkpoint.every": 6, "train.micro_batch_size": 1})
    assert run(config, 2, tmp_path / "log", train_without_folder, False) == [0, 0], text(tmp_path / "log")
    assert "was removed or emptied while the run was training" in text(tmp_path / "log")
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == ["step_3", "step_6"]
    assert [row["step"] for row in rows(config.folder)] == [3, 4, 5, 6]


def test_ranks_leave_a_folder_of_another_run_together(run_config, change, tmp_path):
    # No save is in flight while the folder is removed.
    config = change(run_config, **{"train.checkpoint.every": 6, "train.micro_batch_size": 1})
    assert run(config, 2, tmp_path / "log", train_without_folder, True) == [1, 1], text(tmp_path / "log", 1)
    for rank in (0, 1):
        assert "used by another run: process 1 on another machine" in text(tmp_path / "log", rank)
    assert [path.name for path in config.folder.iterdir()] == [".lock"]


def train_struck(fault: str, struck_rank: int, config: RunConfig) -> int:
    """Train, and let a fault happen on one rank: in step 3, or in the loading of its seventh batch."""
    if int(os.environ["RANK"]) != struck_rank:
        return train(config)
    if fault.startswith("loader"):
        loader.Windows.load_batch = fail_at_fourth_batch(hangs=fault == "loader hangs")
        return train(config)

    def strike() -> None:
        if fault == "raises":
            raise ArithmeticError("the third step")
        send_signal({"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[fault])

    with before_steps({3: strike}):
        return train(config)


def fail_at_fourth_batch(hangs: bool):
    """Return a Windows.load_batch that hangs or raises at the fourth batch of training."""
    calls = itertools.count(1)
    load_batch = loader.Windows.load_batch

    def fail(self, ids):
        if self.tokens.split == "train" and next(calls) == 4:
            if not hangs:
                raise OSError("stale file handle")
            time.sleep(60)
        return load_batch(self, ids)

    return fail


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "fault, diagnosis",
    [
        ("killed", "has died"),
        ("stopped", "no sign of life|its store"),
        ("raises", "ArithmeticError: the third step"),
        ("loader hangs", "waiting for the data of step"),
        ("loader raises", "OSError: stale file handle"),
    ],
)
def test_rank_that_dies_or_hangs_ends_the_others_and_is_named(run_config, change, tmp_path, fault, diagnosis, rank):
    config = change(run_config, **{"train.micro_batch_size": 1, "train.guard.hang_seconds": 3.0})
    processes = start(train_struck, fault, rank, config, log=tmp_path / "log", world=2)
    other = processes[1 - rank]
    other.join(40)
    assert other.exitcode == WATCHDOG_EXIT_CODE, text(tmp_path / "log", 1 - rank)
    for process in processes:
        process.kill()
    wait(processes)
    found = [line for line in text(tmp_path / "log", 1 - rank).splitlines() if "ends the run" in line]
    assert re.search(rf"rank {1 - rank} ends the run: rank {rank} .*({diagnosis})", found[-1]), found
    named = found[-1].partition(". Last collectives: ")[2].split(", ")
    assert str(config.folder / f"flight_record_rank_{1 - rank}") in named and all(map(os.path.exists, named))


def train_stopped(config: RunConfig) -> int:
    """Train, and stop this process by SIGSTOP before step 3."""
    with before_steps({3: lambda: send_signal(signal.SIGSTOP)}):
        return train(config)


def test_ranks_that_are_stopped_together_go_on(run_config, change, tmp_path):
    """As the processes of a frozen container are, for twice hang_seconds."""
    config = change(run_config, **{"train.micro_batch_size": 1, "train.guard.hang_seconds": 4.0})
    processes = start(train_stopped, config, log=tmp_path / "log", world=2)
    for process in processes:
        until(lambda pid=process.pid: is_stopped(pid))
    time.sleep(8.0)
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    assert wait(processes) == [0, 0], [text(tmp_path / "log", rank) for rank in (0, 1)]


def test_random_states_of_every_rank_are_restored(run_config, tmp_path):
    assert run(run_config, 2, tmp_path / "log", draw_after_loading, str(tmp_path)) == [0, 0], text(tmp_path / "log")


def draw_after_loading(folder: str, config: RunConfig) -> int:
    """Draw from every generator after a save, and again after loading it: only the same rank draws the same."""
    from accelerate import Accelerator

    from glalm.model.config import ModelConfig
    from glalm.model.decoder import CausalLM

    rank = Accelerator().process_index
    random_states.seed_random_states(0, 0, rank)
    model = CausalLM(ModelConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_heads=2))
    state = TrainState(model, [], step=3)
    path = save(Path(folder) / "saves", state)

    def draw():
        return [torch.rand(2).tolist(), random.random(), np.random.rand()]

    first = draw()
    draw()
    load_train_state(path, state, seed=1)
    assert draw() == first
    from glalm.train.collectives import gather_or_raise

    a, b = gather_or_raise(lambda: first)
    assert all(x != y for x, y in zip(a, b, strict=True))
    metadata = json.loads((path / "state.json").read_text())
    gather_or_raise(lambda: None)  # all have read it
    gather_or_raise(lambda: rank or (path / "state.json").write_text(json.dumps({**metadata, "processes": 3})))
    load_train_state(path, state, seed=1)  # of another number of processes: from (seed, step, rank)
    again = draw()
    random_states.seed_random_states(1, 3, rank)
    assert again == draw() != first
    return 0


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "hsdp"])
def test_checkpoint_of_one_process_is_loaded_bit_for_bit_by_others(run_config, change, unbroken, tmp_path, mode):
    """A checkpoint of one process is loaded and saved by four that shard it, and read again."""
    parallel = {"parallel.mode": mode} | ({"parallel.replicate": 2} if mode == "hsdp" else {})
    config = change(run_config, **parallel, **{"train.micro_batch_size": 1})
    saved = unbroken / "checkpoints" / "step_6"
    assert run(config, 4, tmp_path / "log", load_and_save, str(saved), str(tmp_path)) == [0] * 4, text(tmp_path / "log")
    one, other = weights(saved), weights(tmp_path / "step_7")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)
    if mode != "ddp":  # they are slices, of which nobody has all
        stored = staging.index_safetensors((tmp_path / "step_7").glob("*.safetensors"))
        assert len([tensor for tensor in stored.values() if len(tensor.slices) > 1]) > 30


def load_and_save(saved: str, folder: str, config: RunConfig) -> int:
    """Load a checkpoint into a model with other weights on every rank, and save it as step_7."""
    accelerator = parallel.start_processes(config)
    torch.manual_seed(accelerator.process_index)
    plans = plan_batches(config, accelerator.num_processes)
    state = trainer.Trainer(dataclasses.replace(config, seed=99), plans, accelerator).state
    load_train_state(Path(saved), state, seed=1)
    state.step = 7
    save(Path(folder), state)
    return 0
