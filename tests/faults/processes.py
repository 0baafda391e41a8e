"""Start processes to inject faults into. They are forked from a clean process that has all imports."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from glalm.config.strict import ConfigError, RunError

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["glalm.train.trainer", "processes"])


def start(function: Callable, *args, log: Path, world: int = 1, launched: bool | None = None) -> list:
    """Start `world` processes that call function(*args) and end with the exit codes of the command line.

    Their output goes to files beside `log`, which `text` reads. With `launched`, or more than one process, they have
    torchrun's environment.
    """
    port = _free_port()
    found = []
    for rank in range(world):
        env = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if world > 1 or launched:
            env |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log.with_suffix(f".{rank}").unlink(missing_ok=True)
        arguments = (function, args, {k: str(v) for k, v in env.items()}, log.with_suffix(f".{rank}"))
        found.append(SERVER.Process(target=_entry, args=arguments))
        found[-1].start()
    return found


def wait(processes: list, seconds: float = 60) -> list[int]:
    """Return the exit codes, -9 for a killed process. Fail if one runs for more than `seconds`."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} processes were not done after {seconds} s"
    return [process.exitcode for process in processes]


def text(log: Path, rank: int = 0) -> str:
    file = log.with_suffix(f".{rank}")
    return file.read_text() if file.exists() else ""


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until `condition` holds. Fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _entry(function: Callable, args: tuple, env: dict[str, str], log: Path) -> None:
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    os.environ.update(env)
    torch.set_num_threads(1)
    code = 1
    try:
        signum = function(*args)
        code = 128 + signum if signum else 0
    except (ConfigError, RunError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, ConfigError) else 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
