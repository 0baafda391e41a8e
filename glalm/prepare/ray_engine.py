"""Run units on the machines of a Ray cluster. The process that writes their results to disk is the driver."""

import logging
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from glalm.prepare.encode import EncodedBatch, open_tokenizer
from glalm.prepare.sources import RecordBatch
from glalm.prepare.units import Unit, UnitEncoder

Encoded = tuple[RecordBatch, EncodedBatch]
Result = tuple[RecordBatch, Any]  # a batch without its records, and what it was turned into

MAX_RETRIES = 8  # of a unit whose process or machine died, or whose result was lost with a machine
UNITS_PER_CPU = 2  # that are in flight, so that no CPU waits for the driver
RETURN_BYTES = 2**22  # of arrays that a task hands over at once


def import_ray() -> Any:
    """Return the module ray. Raises ValueError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs the package ray. Install it: pip install 'glalm[ray]'") from error
    return ray


@contextmanager
def connect_to_ray(address: str | None) -> Iterator[int]:
    """Connect this process to a Ray cluster, and return the number of its CPUs.

    Args:
        address: The cluster's address, or "auto" for one that runs on this machine. None is that of RAY_ADDRESS, or of
            a cluster on this machine, or else starts Ray on this machine alone until the block ends.

    Raises:
        ValueError: There is no cluster at `address`, or ray is not installed.
    """
    ray = import_ray()
    is_connected = ray.is_initialized()
    if not is_connected:
        try:
            _refuse_silent_address(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            advice = "Start one (ray start --head), or leave --address out to run Ray on this machine alone."
            raise ValueError(f"There is no Ray cluster at {address}: {error}. {advice}") from error
    try:
        yield _count_cpus(ray)
    finally:
        if not is_connected:
            ray.shutdown()


def _refuse_silent_address(address: str | None) -> None:
    """Raise OSError if nothing listens at HOST:PORT, on which Ray would wait for minutes."""
    if match := re.fullmatch(r"([^:/]+):(\d+)", address or ""):
        socket.create_connection((match[1], int(match[2])), timeout=10).close()


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
    running: deque[tuple[Unit, Any]] = deque()
    units = iter(units)
    try:
        while True:
            limit = UNITS_PER_CPU * _count_cpus(ray)  # Machines come and go.
            while len(running) < limit and (unit := next(units, None)) is not None:
                running.append((unit, run.remote(function_ref, unit)))
            if not running:
                return
            unit, batch_refs = running[0]
            for batch_ref in batch_refs:
                for result in ray.get(batch_ref):
                    yield unit, result
            running.popleft()
    except ray.exceptions.RayTaskError as error:
        raise _explain_missing_file(error.cause) from error
    except ray.exceptions.RayError as error:
        problem = f"Ray gave up on a unit of the preparation ({type(error).__name__}: {error})."
        advice = "If memory ran out, start the nodes with fewer CPUs (ray start --num-cpus). Then run the same command "
        raise ValueError(f"{problem} {advice}again to resume.") from error
    finally:
        for _, batch_refs in running:
            ray.cancel(batch_refs)


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


def _count_cpus(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _read_tokenizer(path: Path) -> dict[str, bytes]:
    """Return the content of a tokenizer's files, by their paths below the folder that `path` lies in."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


@lru_cache(maxsize=1)
def _load_tokenizer(fingerprint: str, files: tuple[tuple[str, bytes], ...]) -> Path:
    """Load a tokenizer from the content of its files, and return the path under which `open_tokenizer` caches it.

    The set's folder, where these files lie, is not on every machine.
    """
    with TemporaryDirectory() as folder:
        for name, content in files:
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        top = Path(folder, files[0][0].split("/")[0])
        open_tokenizer(top, fingerprint)
    return top


def _explain_missing_file(error: Exception) -> Exception:
    """Return the exception of a unit, with advice if a machine does not have its file."""
    if isinstance(error, FileNotFoundError):
        advice = "With --engine ray, every node must see the inputs under the same paths, as on a shared filesystem."
        return FileNotFoundError(f"{error}. {advice}")
    return error
