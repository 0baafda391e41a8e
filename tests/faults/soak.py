"""Inject random faults into runs of a tiny model on two processes: `python tests/faults/soak.py --minutes 30`.

A random fault strikes each start at a random time: one or both ranks are killed, one gets a signal or is stopped, or a
file of a checkpoint is damaged after a kill. The same command then resumes the run. Every finished run must equal an
undisturbed one bit for bit, with each step once in its metrics. Prints a line for each finished run and the number of
faults at the end, and exits 1 at the first difference.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from processes import start, text, until, wait
from sameness import assert_same, rows

from glalm.config.run import CheckpointConfig, DataConfig, GuardConfig, OptimConfig, RunConfig, TrainConfig
from glalm.model.config import ModelConfig
from glalm.prepare.pipeline import prepare_data
from glalm.train.checkpoint import latest_checkpoint
from glalm.train.trainer import train
from glalm.train.watchdog import WATCHDOG_EXIT_CODE

STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as name:
        soak(Path(name), args.minutes * 60)


def soak(folder: Path, seconds: float) -> None:
    log = folder / "log"
    whole = config(folder, "whole")
    assert wait(start(train, whole, log=log, world=2), 600) == [0, 0], text(log)
    begun, faults, finished, starts = time.monotonic(), Counter(), 0, 0
    while time.monotonic() < begun + seconds:
        run = config(folder, f"run {finished}")
        processes = start(train, run, log=log, world=2)
        starts += 1
        until(lambda p=processes: "parameters" in text(log) or not all(x.is_alive() for x in p), 120)
        processes[0].join(random.uniform(0, 3))
        kind = random.choice(list(FAULTS)) if all(p.is_alive() for p in processes) else None
        if kind:
            faults[kind] += 1
            FAULTS[kind](processes, run.folder / "checkpoints")
        print(f"{time.monotonic() - begun:6.0f} s  start {starts}: {kind or 'left alone'}", flush=True)
        codes = wait(processes, 60)
        expected = {0, -signal.SIGKILL, WATCHDOG_EXIT_CODE, 128 + signal.SIGTERM, 128 + signal.SIGUSR1}
        assert kind or codes == [0, 0], text(log) + text(log, 1)
        assert set(codes) <= expected, (kind, codes, text(log), text(log, 1))
        if latest_checkpoint(run.folder / "checkpoints") and codes == [0, 0]:
            assert_same(whole.folder, run.folder)
            assert [row["step"] for row in rows(run.folder)] == list(range(STEPS + 1))
            finished += 1
            total = sum(faults.values())
            print(f"{time.monotonic() - begun:6.0f} s  {starts} starts, {total} faults, {finished} runs", flush=True)
            shutil.rmtree(run.folder)
    print(f"{sum(faults.values())} faults in {starts} starts, {finished} finished runs, nothing lost: {dict(faults)}")


def config(folder: Path, name: str) -> RunConfig:
    data = folder / "set"
    if not data.exists():
        words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta", "epsilon"], (200, 100))
        (folder / "words.jsonl").write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words))
        prepare_data([folder / "words.jsonl"], data, vocab_size=300, progress=False)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48, "gate_low_rank_dim": 4}
    return RunConfig(
        name=name,
        runs_dir=str(folder),
        model=ModelConfig(vocab_size=320, **shape),
        data=DataConfig(path=str(data), seq_len=16),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        train=TrainConfig(
            steps=STEPS,
            batch_size=4,
            eval_every=20,
            eval_sequences=4,
            log_every=1,
            checkpoint=CheckpointConfig(every=3),
            guard=GuardConfig(hang_seconds=8.0),
        ),
    )


def kill_one(processes: list, saves: Path) -> None:
    random.choice(processes).kill()


def kill_both(processes: list, saves: Path) -> None:
    for process in processes:
        process.kill()


def signal_one(processes: list, saves: Path) -> None:
    os.kill(random.choice(processes).pid, random.choice([signal.SIGTERM, signal.SIGUSR1]))


def damage(processes: list, saves: Path) -> None:
    """Flip a bit of a random file of the newest checkpoint, truncate the file, or remove it."""
    kill_both(processes, saves)
    wait(processes)
    if not (newest := latest_checkpoint(saves)):
        return
    file = random.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    changes = [lambda: file.write_bytes(content), lambda: file.write_bytes(content[: len(content) // 2]), file.unlink]
    random.choice(changes)()


def stop_one(processes: list, saves: Path) -> None:
    """Stop one process. The other notices and ends, after which a launcher would kill the stopped one."""
    stopped, other = random.sample(processes, 2)
    os.kill(stopped.pid, signal.SIGSTOP)
    other.join(60)
    stopped.kill()


FAULTS = {f.__name__.replace("_", " "): f for f in (kill_one, kill_both, signal_one, damage, stop_one)}

if __name__ == "__main__":
    main()
