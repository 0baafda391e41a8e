"""The cores that a process may use, and what it does when the process that started it has ended."""

import os
import threading
import time
from collections.abc import Callable

POLL_SECONDS = 0.5


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    # Not every system has sched_getaffinity, which counts only these.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def call_without_parent(action: Callable[[], object]) -> None:
    """Call `action`, in a thread, once the process that started this one has ended."""
    parent = os.getppid()

    def wait_for_parent() -> None:
        # The system gives an orphan another parent.
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        action()

    threading.Thread(target=wait_for_parent, name="glalm-parent", daemon=True).start()
