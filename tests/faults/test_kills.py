"""kill -9 at every stage of saving, and at any time."""

import os
import random
import shutil
import signal

import pytest
from processes import start, text, until, wait
from sameness import assert_same, rows

from glalm.config.run import RunConfig
from glalm.train import checkpoint, tensors
from glalm.train.trainer import train

# Each operation of a save on the disk; which of its calls to die at, in a run that saves at 2, 4 and 6 and keeps two;
# and the newest whole checkpoint then.
STAGES = [
    ("before the folder is made", os, "mkdir", r"\.step_4\.tmp$", 1, 2),
    ("before the first file", tensors, "write", r"step_4.*model", 1, 2),
    ("in the middle of a file", tensors, "_content", None, 150, 2),
    ("before the second file", tensors, "write", r"step_4.*training", 1, 2),
    ("before the files are read back", checkpoint, "_compare", r"step_4.*model", 1, 2),
    ("before the manifest", checkpoint, "sync", r"step_4.*manifest", 1, 2),
    ("before the rename", os, "rename", r"\.step_4\.tmp", 1, 2),
    ("after the rename, before the folder is synced", checkpoint, "sync", r"checkpoints$", 2, 4),
    ("before the old one is removed", checkpoint, "_remove", r"step_2$", 1, 6),
    ("while the old one is removed", shutil, "rmtree", r"\.step_2\.tmp$", 2, 6),
]


def dying(module, name: str, pattern: str | None, count: int, asynchronous: bool, config: RunConfig) -> int:
    """train(config), killed at the given call."""
    import importlib
    import re

    place, calls = importlib.import_module(module), []
    real = getattr(place, name)

    def patched(*args, **options):
        if pattern is None or re.search(pattern, str(args[0])):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(place, name, patched)
    config.train.checkpoint.asynchronous = asynchronous
    return train(config)


@pytest.mark.parametrize(
    "what, place, name, pattern, count, newest", STAGES, ids=[s[0].replace(" ", "-") for s in STAGES]
)
def test_killed_at_a_stage_of_saving(run_config, unbroken, tmp_path, what, place, name, pattern, count, newest):
    asynchronous = count % 2 == 1
    config, log = run_config, tmp_path / "log"
    arguments = (dying, place.__name__, name, pattern, count, asynchronous, config)
    assert wait(start(*arguments, log=log)) == [-signal.SIGKILL], text(log)
    saves = config.folder / "checkpoints"
    assert checkpoint.newest_whole(saves).name == f"step_{newest}"
    assert train(config) == 0
    assert {p.name for p in saves.iterdir()} == {"step_4", "step_6"}
    assert_same(unbroken, config.folder)


def test_killed_at_random_times(run_config, change, tmp_path):
    """50 kills, spread over as many runs as they take: each ends as the unbroken one, with every step once."""
    small = {"model.num_hidden_layers": 1, "model.hidden_size": 16, "model.intermediate_size": 16}
    often = {"train.steps": 150, "train.eval_every": 150, "train.eval_sequences": 2, "train.checkpoint.every": 2}
    config, log = change(run_config, **small, **often), tmp_path / "log"
    whole = change(config, name="whole")
    assert train(whole) == 0
    random.seed(0)
    kills, runs = 0, 0
    while kills < 50:
        run = change(config, name=f"run {runs}")
        [process] = start(train, run, log=log)
        if random.random() < 0.8:  # once it trains; else while it starts
            until(lambda p=process: not p.is_alive() or "parameters" in text(log))
        process.join(random.uniform(0, 0.3))
        if process.is_alive():
            process.kill()
            kills += 1
        if wait([process]) == [0]:
            assert_same(whole.folder, run.folder)
            runs += 1
    assert train(run) == 0
    assert_same(whole.folder, run.folder)
    assert [row["step"] for row in rows(run.folder)] == list(range(151))
    assert {p.name for p in (run.folder / "checkpoints").iterdir()} == {"step_148", "step_150"}
