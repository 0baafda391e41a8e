"""Where units are done: in processes of this machine, or in tasks of a Ray cluster. The results are the same."""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from glalm.prepare.ray_engine import connect_to_ray, import_ray, stream_on_ray
from glalm.prepare.units import Unit, estimate_memory
from glalm.prepare.workers import stream_in_order

# Applies a pure function to units, and yields the results of all units in order.
MapUnits = Callable[[Callable, Iterable[Unit]], Generator[Any, None, None]]


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
    """Return a context in which the engine can be used; see `ray_engine.connect_to_ray`."""
    return connect_to_ray(address) if engine == "ray" else nullcontext()


def choose_engine(engine: str, workers: int) -> tuple[MapUnits, str]:
    """Return how to apply a function to units, and what a message calls the engine."""
    if engine == "ray":
        return stream_on_ray, "engine: ray"
    return partial(stream_in_order, workers=workers, size_of=estimate_memory), f"processes: {workers}"
