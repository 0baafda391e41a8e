"""Collect all of Python's garbage at known times, between two steps, instead of in the middle of one."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NEVER = 2**31 - 1  # collections of the middle generation until a full one


@contextmanager
def collect_between_steps() -> Iterator[Callable[[], None]]:
    """Start no full collection of garbage in the context except by calling the function that it yields.

    A full collection visits every object of the process. After imports and compilation that takes some 0.4 s, in which
    the GPU runs out of work, and the other processes wait for this one. So all processes collect after the same steps.
    The first call also takes the objects that exist by then out of the later collections, which take milliseconds.

    Collections of young objects, which are short, go on by themselves.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], NEVER)

    def collect() -> None:
        gc.collect()
        if not gc.get_freeze_count():
            gc.freeze()

    try:
        yield collect
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
