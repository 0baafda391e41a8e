"""Where units are done: in processes of this machine, or in tasks of a Ray cluster. The results are the same.

The process that writes the results to disk is Ray's driver.
"""

import logging
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from glalm.prepare.encode import EncodedBatch, open_tokenizer
from glalm.prepare.input_files import RecordBatch
from glalm.prepare.units import Unit, UnitEncoder, estimate_memory
from glalm.prepare.workers import stream_in_order

# Applies a pure function to units, and yields the results of all units in order.
MapUnits = Callable[[Callable, Iterable[Unit]], Generator[Any, None, None]]
Encoded = tuple[RecordBatch, EncodedBatch]
Result = tuple[RecordBatch, Any]  # a batch without its records, and what it was turned into

MAX_RETRIES = 8  # How often a unit is run again if its process or machine dies, or a machine is lost with its result.
UNITS_PER_CPU = 2  # This many are in flight for each CPU, so that none waits for the driver.
RETURN_BYTES = 2**22  # A task hands over arrays of about this size at once.


def check_engine(engine: str, address: str | None, workers: int | None) -> None:
    """Raise ValueError if an option does not fit the engine, or the engine is not installed."""
    if engine not in ("local", "ray"):
        raise ValueError(f"--engine {engine} must be local or ray.")
    if engine == "local" and address:
        raise ValueError(f"--address {address} is that of a Ray cluster. Add --engine ray, or remove it.")
    if engine == "ray" and workers:
        raise ValueError(f"--workers {workers} is for --engine local. Ray uses all CPUs of its nodes; see ray start.")
    if engine == "ray":
        import_ray()


def connect_engine(engine: str, address: str | None) -> AbstractContextManager[None]:
    """Return a context in which the engine can be used; see `connect_to_ray`."""
    return connect_to_ray(address) if engine == "ray" else nullcontext()


def choose_engine(engine: str, workers: int) -> tuple[MapUnits, str]:
    """Return how to apply a function to units, and what a message calls the engine."""
    if engine == "ray":
        return stream_on_ray, "engine: ray"
    return partial(stream_in_order, workers=workers, size_of=estimate_memory), f"processes: {workers}"


def import_ray() -> Any:
    """Return the module ray. Raises ValueError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs the package ray. Install it: pip install 'glalm[ray]'") from error
    return ray


@contextmanager
def connect_to_ray(address: str | None) -> Iterator[None]:
    """Connect this process to a Ray cluster until the block ends.

    Args:
        address: The cluster's address, or "auto" for one that runs on this machine. None tries the address in
            RAY_ADDRESS, then a cluster that runs on this machine, and otherwise starts Ray on this machine alone until
            the block ends.

    Raises:
        ValueError: There is no cluster at `address`, it has no CPUs, or ray is not installed or cannot start.
    """
    ray = import_ray()
    is_connected = ray.is_initialized()
    if not is_connected:
        try:
            # Ray would wait for minutes at a HOST:PORT where nothing listens.
            if match := re.fullmatch(r"([^:/]+):(\d+)", address or ""):
                socket.create_connection((match[1], int(match[2])), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            address = address or os.environ.get("RAY_ADDRESS", "")
            if not address:
                problem = f"Ray cannot start on this machine: {error}. To do without it, use --engine local."
            elif isinstance(error, OSError):
                advice = "Start one (ray start --head), or leave --address out to run Ray on this machine alone."
                problem = f"There is no Ray cluster at {address}: {error}. {advice}"
            else:  # for example, another version of Ray or Python
                problem = f"The Ray cluster at {address} cannot be used: {error}."
            raise ValueError(problem) from error
    try:
        if not ray.cluster_resources().get("CPU"):
            advice = "Start its nodes with some (ray start --num-cpus), or add a node"
            raise ValueError(f"The Ray cluster has no CPUs, so that no task would ever run. {advice}.")
        yield
    finally:
        if not is_connected:
            ray.shutdown()


@dataclass(frozen=True)
class RemoteEncoder:
    """Encode units on any machine.

    Attributes:
        encoder: The encoder on the driver.
        tokenizer_files: Its tokenizer; see `_read_tokenizer`.
    """

    encoder: UnitEncoder
    tokenizer_files: dict[str, bytes]

    def __call__(self, unit: Unit) -> Iterator[Encoded]:
        path = _load_tokenizer(self.encoder.fingerprint, tuple(self.tokenizer_files.items()))
        yield from replace(self.encoder, tokenizer_path=path)(unit)


def stream_on_ray(function: Callable[[Unit], Iterator[Result]], units: Iterator[Unit]) -> Iterator[Result]:
    """Yield the results of function(unit) for each unit, in order, computed by tasks of the cluster.

    Ray keeps results that wait in its object store, and on disk if they do not fit.

    Raises:
        ValueError: A unit's process or machine died again and again.
    """
    ray = import_ray()
    run = ray.remote(num_returns="streaming", max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(run_unit)
    if isinstance(function, UnitEncoder):
        function = RemoteEncoder(function, _read_tokenizer(function.tokenizer_path))
    function_ref = ray.put(function)
    running: deque[Any] = deque()  # for each unit, Ray's generator of references to its lists of results
    units = iter(units)
    try:
        while True:
            # Machines come and go. If all of them are lost, this waits for others.
            cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
            while len(running) < UNITS_PER_CPU * cpus and (unit := next(units, None)) is not None:
                running.append(run.remote(function_ref, unit))
            if not running:
                return
            for results_ref in running[0]:
                yield from ray.get(results_ref)
            running.popleft()
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, FileNotFoundError):
            raise error.cause from error
        advice = "With --engine ray, every node must see the inputs under the same paths, as on a shared filesystem."
        raise FileNotFoundError(f"{error.cause}. {advice}") from error
    except ray.exceptions.RayError as error:
        problem = f"Ray gave up on a unit of the preparation ({type(error).__name__}: {error})."
        advice = "If memory ran out, start the nodes with fewer CPUs (ray start --num-cpus)."
        raise ValueError(f"{problem} {advice} Then run the same command again to resume.") from error
    finally:
        for results_refs in running:
            ray.cancel(results_refs)


def run_unit(function: Callable[[Unit], Iterator[Result]], unit: Unit) -> Iterator[list[Result]]:
    """Yield the results of function(unit) in lists."""
    results = []
    size = 0
    for batch, result in function(unit):
        results.append((batch, result))
        size += sum(values.nbytes for values in result if isinstance(values, np.ndarray))
        if size >= RETURN_BYTES:
            yield results
            results = []
            size = 0
    yield results


def _read_tokenizer(path: Path) -> dict[str, bytes]:
    """Return the content of a tokenizer's files, by their paths below the folder that `path` lies in."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


@lru_cache(maxsize=1)
def _load_tokenizer(fingerprint: str, files: tuple[tuple[str, bytes], ...]) -> Path:
    """Load a tokenizer from the content of its files, and return the path under which `open_tokenizer` has cached it.

    The set's folder, where these files lie, is not on every machine. Nothing exists at the path any more, so that a
    killed process leaves no files. Both caches hold the one last tokenizer, and change together.
    """
    with TemporaryDirectory() as folder:
        for name, content in files:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        top = Path(folder, files[0][0].split("/")[0])
        open_tokenizer(top, fingerprint)
    return top
