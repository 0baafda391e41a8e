"""Processes that do something together: all of them, or none."""

from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from glalm.config.strict import RunError

Result = TypeVar("Result")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather_or_raise(action: Callable[[], Result], group: distributed.ProcessGroup | None = None) -> list[Result]:
    """Runs `action` on every process, and returns all their results on each of them.

    When it raises on one of them, it raises on all, so that none waits for another: where it did, what it did, and
    elsewhere a RunError that says what happened on which rank.
    """
    rank, world = rank_and_world_size()
    if world == 1:
        return [action()]
    mine, raised = None, None
    try:
        mine = action()
    except Exception as error:  # whatever it is, the others must know
        raised = error
    said = None if raised is None else f"rank {rank}: {type(raised).__name__}: {raised}"
    everyone: list = [None] * world
    distributed.all_gather_object(everyone, (said, mine), group)
    if raised is not None:
        raise raised
    if failures := [message for message, _ in everyone if message is not None]:
        raise RunError("; ".join(failures))
    return [result for _, result in everyone]
