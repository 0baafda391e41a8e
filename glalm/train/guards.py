"""Stopping a run without losing anything."""

import signal


class StopSignal:
    """While entered, SIGINT (Ctrl-C) and SIGTERM are noted instead of obeyed; the loop ends at its next step.

    A second signal of either kind is obeyed at once.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signum
