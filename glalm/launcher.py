"""A launcher of Hydra that runs each job of a sweep in a process of its own, on a GPU of this machine.

joblib's launcher kills its processes at Ctrl-C. This one lets each job in training save a checkpoint.
"""

import os
import re
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, current_process, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from glalm.config.strict import RunError
from glalm.data.processes import call_without_parent

# Hydra accepts launchers from its package of plugins only, by their names.
TARGET = "hydra_plugins.glalm.ProcessLauncher"


def register_launcher() -> None:
    """Let Hydra find `ProcessLauncher` as hydra/launcher=processes."""
    Plugins.instance().class_name_to_class[TARGET] = ProcessLauncher
    ConfigStore.instance().store(
        "processes", {"_target_": TARGET, "at_once": 1}, group="hydra/launcher", provider="glalm"
    )


class ProcessLauncher(Launcher):
    """Run jobs in processes of this machine, `at_once` on each visible GPU, or `at_once` on the CPU.

    Ctrl-C and SIGTERM are passed on to the jobs as one SIGTERM, and end the launch when all jobs have ended.
    """

    config: DictConfig
    hydra_context: HydraContext
    task_function: TaskFunction

    def __init__(self, at_once: int = 1):
        self.at_once = at_once

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a job for each list of overrides, and return what each has returned or raised, in the same order."""
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        free_slots: list[str | None] = [gpu for _ in range(self.at_once) for gpu in visible_gpus() or [None]]
        limit_threads(len(free_slots))
        waiting = deque(enumerate(job_overrides, initial_job_idx))
        running: dict[connection.Connection, Job] = {}
        results: dict[int, JobReturn] = {}
        with interrupt_on_sigterm():
            try:
                while waiting or running:
                    while waiting and free_slots:
                        job = start_job(self, *waiting.popleft(), free_slots.pop(0))
                        running[job.result] = job
                    for ready in connection.wait(running):
                        job = running.pop(ready)  # type: ignore[call-overload]  # A Connection, as `running` has.
                        results[job.number] = job.receive()
                        free_slots.append(job.gpu)
            except KeyboardInterrupt:
                for job in running.values():
                    job.process.terminate()
                for job in running.values():
                    job.process.join()
                raise
        return [results[number] for number in sorted(results)]


@dataclass
class Job:
    """A job that runs in a process, and the pipe by which its JobReturn comes."""

    number: int
    overrides: Sequence[str]
    gpu: str | None
    process: BaseProcess
    result: connection.Connection

    def receive(self) -> JobReturn:
        """Return what the job sent before its end. If it sent nothing, return a RunError with the exit code."""
        try:
            done = self.result.recv()
        except EOFError:
            self.process.join()
            done = JobReturn(overrides=self.overrides, status=JobStatus.FAILED)
            done.return_value = RunError(f"the process of this job ended with exit code {self.process.exitcode}")
        self.process.join()
        return done


def start_job(launcher: ProcessLauncher, number: int, overrides: Sequence[str], gpu: str | None) -> Job:
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, gpu, launcher, list(overrides), number, Singleton.get_state()["instances"])
    process = context.Process(target=run_in_process, args=arguments)
    # The new process inherits that Ctrl-C is ignored, on which its parent acts.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    sender.close()
    return Job(number, overrides, gpu, process, receiver)


def run_in_process(
    sender: connection.Connection,
    gpu: str | None,
    launcher: ProcessLauncher,
    overrides: list[str],
    number: int,
    singletons: dict,
) -> None:
    """Run one job in this process, which shows it one GPU, and send its JobReturn."""
    os.setsid()  # Training handles Ctrl-C itself, but the parent passes it on.
    call_without_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    setup_globals()  # OmegaConf's resolvers, which Singleton's state has, too, cannot be pickled.
    Singleton.set_state(Singleton.get_state() | {"instances": singletons})
    config = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, overrides)
    with open_dict(config):
        config.hydra.job.id = f"{config.hydra.job.name}_{number}"
        config.hydra.job.num = number
    HydraConfig.instance().set_config(config)
    done = run_job(
        launcher.task_function, config, "hydra.sweep.dir", "hydra.sweep.subdir", hydra_context=launcher.hydra_context
    )
    done.cfg = None  # Sweepers do not read the configs, whose classes may not be picklable.
    done.hydra_cfg = None
    sender.send(done)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, once, because GNU timeout sends it twice."""

    def interrupt(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def limit_threads(jobs: int) -> None:
    """Share the cores among `jobs` processes that this one starts, unless the user has set OMP_NUM_THREADS."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, threads)


def visible_gpus() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them."""
    import torch  # It takes seconds, and only launchers of several jobs need it.

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def choose_gpu_of_worker() -> None:
    """Show this process, a worker of joblib's, one GPU by its number among the workers, for all of its jobs."""
    gpus = visible_gpus()
    number = re.search(r"\d+$", current_process().name)
    if gpus and number:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[(int(number[0]) - 1) % len(gpus)]


def set_torch_environment() -> None:
    """Set RANK, WORLD_SIZE and their like, if a job of submitit's has several processes."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
