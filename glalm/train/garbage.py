"""Collect all of Python's garbage at known times, between two steps, instead of in the middle of one."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NEVER = 2**31 - 1  # The threshold is this many collections of the middle generation, which no process reaches.


@contextmanager
def collect_between_steps() -> Iterator[Callable[[], None]]:
    """Within this context, collect all garbage only when the function that it yields is called.

    A full collection visits every object of the process. After imports and compilation that takes some 0.4 s, in which
    the GPU runs out of work, and the other processes wait for this one. So all processes should call the function after
    the same steps. Its first call also exempts the objects that then exist from later collections, which so take
    milliseconds; call it when imports and compilation are done. Leaving the context ends the exemption. In a process
    that has exempted objects by itself before, no others are, because ending that would end its own exemption as well.

    Collections of young objects, which are short, go on by themselves.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], NEVER)
    has_own_exemption = gc.get_freeze_count() > 0
    must_freeze = not has_own_exemption

    def collect() -> None:
        nonlocal must_freeze
        gc.collect()
        if must_freeze:
            gc.freeze()
            must_freeze = False

    try:
        yield collect
    finally:
        gc.set_threshold(*thresholds)
        if not has_own_exemption:
            gc.unfreeze()
