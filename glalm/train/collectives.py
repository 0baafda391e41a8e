"""Actions of all processes that succeed on every one of them or raise on every one of them."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from glalm.config.strict import RunError

Result = TypeVar("Result")


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather_or_raise(action: Callable[[], Result], group: ProcessGroup | None = None) -> list[Result]:
    """Run `action` on every process and return the results of all, ordered by rank, on each.

    Args:
        action: Its result must be picklable. It may raise on some processes only.
        group: All processes; for actions of a thread whose collectives must not interleave with those of others.

    Raises:
        Exception: The action's own exception, on the processes where it raised.
        RunError: The action raised elsewhere. The message names the ranks and their exceptions.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return [action()]
    result = None
    exception = None
    try:
        result = action()
    except Exception as error:  # Even an unforeseen one, or the other processes would wait for this one forever.
        exception = error
    message = f"rank {rank}: {type(exception).__name__}: {exception}" if exception is not None else None
    gathered: list = [None] * world_size
    distributed.all_gather_object(gathered, (message, result), group)
    if exception is not None:
        raise exception
    if failures := [failure for failure, _ in gathered if failure is not None]:
        raise RunError("; ".join(failures))
    return [other_result for _, other_result in gathered]


def run_on_rank_0(action: Callable[[], Result], group: ProcessGroup | None = None) -> Result:
    """Run `action` on rank 0 only and return its result on every process. It raises as `gather_or_raise` does."""
    rank, _ = rank_and_world_size()
    results = gather_or_raise(lambda: [action()] if rank == 0 else [], group)
    return results[0][0]


def max_over_processes(value: int) -> int:
    """Return the largest `value` of all processes.

    The values are reduced on the host, so this does not wait for the GPU to finish its queue.
    """
    if not distributed.is_initialized():
        return value
    largest = torch.tensor(value)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)
