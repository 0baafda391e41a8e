"""A launcher of Hydra that runs each job of a sweep in a process of its own, on a GPU of this machine.

joblib's launcher kills its processes at Ctrl-C. This one lets each job in training save a checkpoint.
"""

import logging
import os
import pickle
import re
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, current_process, get_context, resource_tracker
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

from glalm.config.strict import ConfigError, RunError
from glalm.data.processes import call_without_parent, count_cores

logger = logging.getLogger(__name__)

# Hydra accepts launchers from its package of plugins only, by their names.
TARGET = "hydra_plugins.glalm.ProcessLauncher"

POLL_SECONDS = 0.5
TEARDOWN_SECONDS = 60.0  # how long a job may take to exit once it has sent its result


def register_launcher() -> None:
    """Let Hydra find `ProcessLauncher` as hydra/launcher=processes."""
    Plugins.instance().class_name_to_class[TARGET] = ProcessLauncher
    ConfigStore.instance().store(
        "processes", {"_target_": TARGET, "at_once": 1}, group="hydra/launcher", provider="glalm"
    )


class ProcessLauncher(Launcher):
    """Run jobs in processes of this machine, `at_once` on each visible GPU, or `at_once` on the CPU.

    Ctrl-C reaches all processes of the terminal, but a job must stop only once. So jobs leave its group, and this
    process turns the first Ctrl-C or SIGTERM into one SIGTERM to each job. The launch ends when all jobs have ended. An
    error in this process stops the jobs in the same way.
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
        if self.at_once < 1:
            raise ConfigError(f"hydra.launcher.at_once must be at least 1, not {self.at_once}")
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        free_slots: list[str | None] = [gpu for _ in range(self.at_once) for gpu in visible_gpus() or [None]]
        limit_threads(min(len(free_slots), len(job_overrides)))
        waiting = deque(enumerate(job_overrides, initial_job_idx))
        running: list[Job] = []
        results: dict[int, JobReturn] = {}
        with catch_stop_signals() as stop:
            try:
                while waiting or running:
                    while waiting and free_slots and not stop.is_requested:
                        running.append(start_job(self, *waiting.popleft(), free_slots.pop(0)))
                    if stop.is_requested:
                        raise KeyboardInterrupt
                    for job in wait_for_jobs(running):
                        results[job.number] = job.receive()
                        running.remove(job)
                        free_slots.append(job.gpu)
            except BaseException:
                stop_jobs(running)
                raise
        return [results[number] for number in sorted(results)]


@dataclass(eq=False)
class Job:
    """A job that runs in a process, and the pipe by which its JobReturn comes."""

    number: int
    overrides: Sequence[str]
    gpu: str | None
    process: BaseProcess
    pipe: connection.Connection

    def receive(self) -> JobReturn:
        """Return what the job sent before its end. If it sent nothing, return a RunError that says how it ended."""
        done = None
        try:
            if self.pipe.poll():
                done = self.pipe.recv()
        except (EOFError, OSError):  # The process ended before it sent all of its result.
            pass
        self.process.join(TEARDOWN_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()
        if done is None:
            done = JobReturn(overrides=self.overrides, status=JobStatus.FAILED)
            done.return_value = RunError(self.describe_end())
            logger.warning(self.describe_end())  # The launch returns only when the other jobs have ended.
        return done

    def describe_end(self) -> str:
        code = self.process.exitcode or 0
        job = f"job {self.number} ({' '.join(self.overrides)})"
        if code >= 0:
            return f"{job} ended with exit code {code} and no result; its last messages are above"
        advice = (
            "Linux does that when memory runs out; set a smaller hydra.launcher.at_once. "
            if code == -signal.SIGKILL
            else ""
        )
        return f"{job} was ended by {signal.Signals(-code).name}. {advice}The same command resumes it"


def wait_for_jobs(jobs: list[Job]) -> list[Job]:
    """Return the jobs that have ended or sent their result, after POLL_SECONDS at most.

    Processes that a job has started inherit its pipe and its sentinel, and may hold them open after its end. So this
    also asks the system which jobs are alive.
    """
    ready = connection.wait([job.pipe for job in jobs], POLL_SECONDS)
    return [job for job in jobs if job.pipe in ready or not job.process.is_alive()]


def stop_jobs(jobs: list[Job]) -> None:
    """Let the jobs save and end. Another Ctrl-C ends this process without them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if jobs:
        logger.info(f"Stopping. Jobs that are saving: {len(jobs)}. Another Ctrl-C does not wait for them.")
    for job in jobs:
        job.process.terminate()
    for job in jobs:
        job.process.join()


def start_job(launcher: ProcessLauncher, number: int, overrides: Sequence[str], gpu: str | None) -> Job:
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, gpu, launcher, list(overrides), number, Singleton.get_state()["instances"])
    process = context.Process(target=run_in_process, args=arguments)
    resource_tracker.ensure_running()  # Starting it would unblock the signal.
    # The new process inherits that Ctrl-C is blocked, until it has left this process's group.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
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
    """Run one job in this process, to which one GPU is made visible, and send its JobReturn."""
    os.setsid()  # No further Ctrl-C arrives, and one that already did is dropped.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    call_without_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    setup_globals()  # This registers OmegaConf's resolvers anew, because they cannot be pickled and sent.
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
    sender.send(make_sendable(done))


def make_sendable(done: JobReturn) -> JobReturn:
    """Replace an error or a value that cannot be pickled and read again by a RunError with its type and message."""
    try:
        pickle.loads(pickle.dumps(done))  # Reading fails for errors whose arguments differ from their `args`.
    except Exception:
        value = done._return_value
        done.status = JobStatus.FAILED
        done.return_value = RunError(f"{type(value).__name__}: {value}")
    return done


@dataclass
class StopRequest:
    """Whether a signal has asked this process to stop."""

    is_requested: bool = False


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Note Ctrl-C and SIGTERM instead of raising, which would lose a job that is about to start or to be received."""
    stop = StopRequest()

    def request(*_) -> None:
        stop.is_requested = True

    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(signum, request) for signum in signals]
    try:
        yield stop
    finally:
        for signum, handler in zip(signals, handlers, strict=True):
            signal.signal(signum, handler)


def limit_threads(jobs: int) -> None:
    """Share the cores that this process may use among `jobs` processes that it starts.

    A number of threads that the user has set stays as it is.
    """
    threads = str(max(1, count_cores() // max(1, jobs)))
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
