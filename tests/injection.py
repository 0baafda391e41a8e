"""Faults that tests inject into the training steps of this process. When its block ends, each must have happened.

A step is counted by the calls of Trainer.step since the block began, so the first step of a resumed run is call 1.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from glalm.train.trainer import Trainer


@contextmanager
def replaced_method(name: str, replacement: Callable) -> Iterator[None]:
    """Replace a method of Trainer within the block."""
    original = getattr(Trainer, name)
    setattr(Trainer, name, replacement)
    try:
        yield
    finally:
        setattr(Trainer, name, original)


@contextmanager
def before_steps(actions: Mapping[int, Callable[[], object]]) -> Iterator[None]:
    """Run actions[n] before the n-th step. It may raise, hang or kill the process."""
    calls = 0
    pending = set(actions)
    original = Trainer.step

    def step(self, batch):
        nonlocal calls
        calls += 1
        if calls in actions:
            pending.discard(calls)
            actions[calls]()
        return original(self, batch)

    with replaced_method("step", step):
        yield
    assert not pending, f"the faults before the steps {sorted(pending)} did not happen"


@contextmanager
def poisoned_steps(steps: set[int], gradient: float = 1.0, loss: float = 1.0) -> Iterator[None]:
    """Multiply the gradient of one parameter, and the loss that is reported, in the given steps."""
    calls = 0
    pending = set(steps)
    original = Trainer.accumulate_gradients

    def accumulate_gradients(self, batch):
        nonlocal calls
        calls += 1
        value = original(self, batch)
        if calls not in steps:
            return value
        pending.discard(calls)
        if gradient != 1.0:
            parameters = (p for p in self.module.parameters() if p.grad is not None and p.grad.any())
            next(parameters).grad.mul_(gradient)
        return value * loss

    with replaced_method("accumulate_gradients", accumulate_gradients):
        yield
    assert not pending, f"the steps {sorted(pending)} were not poisoned"


def send_signal(signum: int = signal.SIGTERM) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), signum)


def hang() -> None:
    time.sleep(60)


def fail() -> None:
    raise RuntimeError("an injected failure")
