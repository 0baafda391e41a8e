"""What a pool's worker process does first."""

import os
import signal
import threading
from multiprocessing import parent_process


def bind_to_parent() -> None:
    """No Ctrl-C, which is the parent's to act on, and no life after the parent's, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
