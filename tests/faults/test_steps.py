"""Faults of one process: bad numbers, spikes, signals, damaged data, failing trackers."""

import ctypes
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import types
from functools import partial

import pytest
import torch
from injection import before_steps, hang, poisoned_steps, send_signal
from processes import start, text, until, wait
from sameness import assert_same, rows, weights

from glalm.config.run import RunConfig
from glalm.config.strict import ConfigError, RunError
from glalm.data.loader import Windows
from glalm.data.order import Order
from glalm.data.shards import TokenSet
from glalm.train.checkpoint import CheckpointWriter, latest_checkpoint
from glalm.train.guards import STOP_SIGNALS, BadSteps
from glalm.train.hang_monitor import is_stopped
from glalm.train.run_dir import newest_valid_checkpoint
from glalm.train.trainer import Trainer, train
from glalm.train.watchdog import WATCHDOG_EXIT_CODE


@pytest.mark.parametrize("what", [{"gradient": math.nan}, {"gradient": math.inf}, {"loss": math.nan}])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_update_is_skipped(run_config, change, what, optimizer):
    """After step 4, which is bad, weights and moments are those after step 3. Training continues from there."""
    every = {"train.checkpoint.every": 1, "train.checkpoint.keep_last": 9, "optim.name": optimizer}
    config = change(run_config, **every)
    with poisoned_steps({4}, **what):
        assert train(config) == 0
    third, fourth, fifth = (weights(config.folder / "checkpoints" / f"step_{n}") for n in (3, 4, 5))
    assert all(torch.equal(third[n], fourth[n]) for n in third if not n.startswith("guard."))
    assert not any(torch.equal(fourth[n], fifth[n]) for n in fourth if n.startswith("model.layers"))
    assert [row.get("skipped_steps", 0) for row in rows(config.folder)] == [0, 0, 0, 0, 1, 1, 1]
    bad = rows(config.folder)[4]
    assert ("loss" in bad) == ("loss" not in what) and ("grad_norm" in bad) == ("gradient" not in what)
    for line in (config.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN: that is no JSON


def test_consecutive_bad_updates_end_the_run_and_name_their_samples(run_config, change, token_folder):
    config = change(run_config, **{"train.guard.bad_steps": 3, "train.log_every": 6})
    message = r"in 3 consecutive updates, steps 3 to 5. All of them were skipped.*bad_steps_3.json"
    with poisoned_steps({3, 4, 5, 6}, gradient=math.nan), pytest.raises(BadSteps, match=message):
        train(config)
    windows = Windows(TokenSet(token_folder, "train"), 16)
    order = Order(config.seed, 4, windows.source_windows)
    dump = json.loads((config.folder / "bad_steps_3.json").read_text())["steps"]
    assert dump == {str(s): order.window_ids(s - 1).tolist() for s in (3, 4, 5)}
    assert train(config) == 0  # No checkpoint was saved since the first bad step.


def test_spike_is_skipped(run_config, change):
    spiky = {"train.steps": 12, "train.guard.spike_factor": 6.0, "train.guard.spike_window": 4}
    every = {"train.checkpoint.every": 1, "train.checkpoint.keep_last": 9}
    config = change(run_config, **spiky, **every)
    with poisoned_steps({9}, gradient=1e9):
        assert train(config) == 0
    before, after, later = (weights(config.folder / "checkpoints" / f"step_{n}") for n in (8, 9, 10))
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith("guard."))
    assert not torch.equal(after["lm_head.weight"], later["lm_head.weight"])
    assert rows(config.folder)[-1]["skipped_steps"] == 1


def test_statistics_of_norms_are_resumed(run_config, change):
    """A spike right after a resume is compared with the norms before it."""
    spiky = {"train.guard.spike_factor": 6.0, "train.guard.spike_window": 3}
    config = change(run_config, **spiky, **{"train.allow_changes": ["train.steps"]})
    assert train(change(config, **{"train.steps": 4})) == 0
    with poisoned_steps({1}, gradient=1e9):
        assert train(config) == 0
    assert [row.get("skipped_steps") for row in rows(config.folder)] == [None, 0, 0, 0, 0, 1, 1]


def train_signalled(signum: int, step: int, config: RunConfig) -> int:
    """Train, and send a signal to this process before `step`. Of several processes, only rank 1 gets it."""
    is_signalled = os.environ.get("RANK", "1") == "1"
    with before_steps({step: partial(send_signal, signum)} if is_signalled else {}):
        return train(config)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_signal_saves_a_checkpoint_and_sets_the_exit_code(run_config, unbroken, tmp_path, signum):
    assert wait(start(train_signalled, signum, 3, run_config, log=tmp_path / "log")) == [128 + signum]
    assert "checkpoints/step_3. To resume, run the same command again." in text(tmp_path / "log")
    assert latest_checkpoint(run_config.folder / "checkpoints").name == "step_3"
    assert wait(start(train, run_config, log=tmp_path / "log")) == [0]
    assert_same(unbroken, run_config.folder)


class SlowDisk(CheckpointWriter):
    """A disk that takes `seconds` for each file of the checkpoints whose folder `pattern` matches."""

    def __init__(self, seconds: float, pattern: str):
        self.seconds = seconds
        self.pattern = pattern

    def write_file(self, path, chunks):
        if path.parent.match(self.pattern):
            (path.parent / "slow").touch()
            time.sleep(self.seconds)
        return super().write_file(path, chunks)


def train_with_slow_second_checkpoint(config: RunConfig) -> int:
    """Train with a second checkpoint that takes a minute per file."""
    return train(config, checkpoint_writer=SlowDisk(60, ".step_4.tmp"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_second_signal_does_not_wait_for_a_save(run_config, change, unbroken, tmp_path, asynchronous):
    """The newest complete checkpoint is unaffected, and the same command resumes from it."""
    config = change(run_config, **{"train.checkpoint.asynchronous": asynchronous})
    [process] = start(train_with_slow_second_checkpoint, config, log=tmp_path / "log")
    until((config.folder / "checkpoints" / ".step_4.tmp" / "slow").exists)
    os.kill(process.pid, signal.SIGINT)
    until(lambda: "A second signal" in text(tmp_path / "log"))
    process.join(1.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert wait([process], 5) == [-signal.SIGINT]
    assert newest_valid_checkpoint(config.folder / "checkpoints").name == "step_2"
    assert train(config) == 0
    assert_same(unbroken, config.folder)


def train_slowly(part: str, seconds: float, config: RunConfig) -> int:
    """Train with a pause of `seconds` before every file of a checkpoint, or before every batch of validation."""
    if part == "saving":
        return train(config, checkpoint_writer=SlowDisk(seconds, "*"))
    iterate_batches = Trainer.iterate_validation_batches

    def iterate_slowly(self, windows):
        for batch in iterate_batches(self, windows):
            time.sleep(seconds)
            yield batch

    Trainer.iterate_validation_batches = iterate_slowly
    return train(config)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "asynchronous"), [("saving", True), ("saving", False), ("validating", True)])
def test_slow_progress_is_no_hang(run_config, change, unbroken, tmp_path, part, asynchronous):
    # On a busy machine, the garbage collection after the first step takes 2 seconds.
    slowly = {"train.guard.hang_seconds": 4.0, "train.checkpoint.asynchronous": asynchronous}
    config = change(run_config, **slowly, **{"train.checkpoint.every": 6})
    seconds = 2.0 if part == "saving" else 1.2
    assert wait(start(train_slowly, part, seconds, config, log=tmp_path / "log")) == [0], text(tmp_path / "log")
    assert_same(unbroken, config.folder)


def train_ignoring_hangup(config: RunConfig) -> int:
    """Train as under nohup, and send SIGHUP before step 3."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with before_steps({3: partial(send_signal, signal.SIGHUP)}):
        return train(config)


def test_hangup_under_nohup_is_ignored(run_config, unbroken, tmp_path):
    assert wait(start(train_ignoring_hangup, run_config, log=tmp_path / "log")) == [0]
    assert_same(unbroken, run_config.folder)


def train_holding_the_gil(config: RunConfig) -> int:
    """Train, and call C code before step 3 that neither returns nor lets go of Python's lock."""
    libc = ctypes.PyDLL(None)
    with before_steps({3: lambda: libc.qsort((ctypes.c_int * 10**7)(), 10**7, 4, libc.usleep)}):
        return train(config)


def test_hang_that_holds_the_gil_ends_the_run_with_a_stack(run_config, change, tmp_path):
    config = change(run_config, **{"train.guard.hang_seconds": 2.0})
    assert wait(start(train_holding_the_gil, config, log=tmp_path / "log")) == [WATCHDOG_EXIT_CODE]
    found = text(tmp_path / "log")
    assert "it hangs, in step 3 for 2 s, in code that holds Python's lock (GIL)" in found
    assert re.search(r'File ".*test_steps\.py", line \d+ in <lambda>', found)


def stop_before_step_3(config: RunConfig) -> int:
    with before_steps({3: partial(send_signal, signal.SIGSTOP)}):
        return train(config)


def test_run_that_was_stopped_goes_on(run_config, change, unbroken, tmp_path):
    """SIGSTOP for twice hang_seconds, then SIGCONT."""
    config = change(run_config, **{"train.guard.hang_seconds": 2.0})
    processes = start(stop_before_step_3, config, log=tmp_path / "log")
    until(lambda: is_stopped(processes[0].pid))
    time.sleep(4.0)
    os.kill(processes[0].pid, signal.SIGCONT)
    assert wait(processes) == [0], text(tmp_path / "log")
    assert_same(unbroken, config.folder)


def test_consecutive_bad_updates_are_counted_across_a_resume(run_config, change):
    config = change(run_config, **{"train.guard.bad_steps": 4, "train.steps": 9, "train.checkpoint.every": 1})
    with poisoned_steps({3, 4, 5, 6}, loss=math.nan), before_steps({4: send_signal}):
        assert train(config) == signal.SIGTERM
        with pytest.raises(BadSteps, match="in 4 consecutive updates, steps 3 to 6"):
            train(config)


def test_signal_saves_before_an_evaluation(run_config, unbroken):
    """A scheduler that stops a run may not wait for the evaluation. Its metrics are not lost either."""
    checkpoints = []

    def evaluate(state, precision, heartbeat, log_text, shard):
        if state.step % 3:
            return {}
        checkpoints.append({path.name for path in run_config.folder.glob("checkpoints/*")})
        return {"seen": 1.0}

    with before_steps({3: send_signal}):
        assert train(run_config, evaluate) == signal.SIGTERM
    assert "step_3" in checkpoints[-1]
    assert train(run_config, evaluate) == 0
    found = rows(run_config.folder)
    assert [row["step"] for row in found if "seen" in row] == [0, 3, 6]
    assert [{k: v for k, v in row.items() if k != "seen"} for row in found] == rows(unbroken)


def test_batch_after_the_last_is_not_read(run_config, monkeypatch):
    read = []
    load_batch = Windows.load_batch
    monkeypatch.setattr(Windows, "load_batch", lambda self, ids: read.append(len(ids)) or load_batch(self, ids))
    assert train(run_config) == 0
    assert read.count(run_config.batch_size) == run_config.steps  # Validation reads two windows at once.


def test_flipped_bit_in_a_data_shard(run_config, change, token_folder, tmp_path):
    """The step that reads it ends the run with an error that names the shard. Once repaired, the run resumes."""
    folder = shutil.copytree(token_folder, tmp_path / "set")
    config = change(run_config, **{"data.path": str(folder)})
    whole = change(config, name="whole")
    assert train(whole) == 0
    shard = next((folder / "train").glob("*/00000.npy"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 8
    shard.write_bytes(content)
    with pytest.raises(RunError, match=r"00000\.npy is damaged between byte 0 and \d+.*Prepare the data again"):
        train(config)
    content[len(content) // 2] ^= 8
    shard.write_bytes(content)
    assert train(config) == 0
    assert_same(whole.folder, config.folder)


def train_and_hang(config: RunConfig) -> int:
    """Train, but hang before step 2."""
    with before_steps({2: hang}):
        return train(config)


def test_two_runs_in_one_directory(run_config, unbroken, tmp_path):
    """The second run is refused while the first one lives, but not after it was killed."""
    [first] = start(train_and_hang, run_config, log=tmp_path / "log")
    until(lambda: "step 1/" in text(tmp_path / "log"))
    with pytest.raises(ConfigError, match=rf"tiny is in use by another run: process {first.pid} on .*choose another"):
        train(run_config)
    first.kill()
    wait([first])
    assert train(run_config) == 0
    assert_same(unbroken, run_config.folder)


def test_paths_with_spaces_and_unicode(run_config, change, unbroken, tmp_path):
    config = change(run_config, name="läuft gut: 言語", runs_dir=str(tmp_path / "a b" / "ünï 模型"))
    assert train(change(config, **{"train.steps": 2})) == 0
    assert train(change(config, **{"train.allow_changes": ["train.steps"]})) == 0
    assert latest_checkpoint(config.folder / "checkpoints").name == "step_6"


def test_jumping_clock(run_config, unbroken, monkeypatch):
    """The wall clock goes back by years, forward by centuries, and stands still, at every reading."""
    times = [0.0, 1e10, -1e9, 5.0]
    readings = itertools.cycle(times)
    monkeypatch.setattr(time, "time", lambda: next(readings))
    assert train(run_config) == 0
    assert sorted(time.time() for _ in times) == sorted(times)
    assert_same(unbroken, run_config.folder)


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_failing_tracker(run_config, change, unbroken, monkeypatch, method):
    """wandb raises at its start, in the middle, or at the end. The run and its metrics are complete."""
    failures = []

    def fail(*args, **options):
        failures.append(method)
        raise ConnectionError("the server is not reachable")

    def succeed(*args, **options):
        return True

    functions = {name: fail if name == method else succeed for name in ("log", "finish", "init", "login")}
    wandb = types.SimpleNamespace(**functions, config=types.SimpleNamespace(update=succeed))
    if method != "init":
        wandb.init = lambda **options: wandb
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train(change(run_config, **{"track.tracker": "wandb"})) == 0
    assert failures == [method]
    assert_same(unbroken, run_config.folder)
