"""When checkpoints are written: at once, or by a thread while training goes on; what happens when that fails."""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

from glalm.config.run import CheckpointConfig
from glalm.train import checkpoint
from glalm.train.checkpoint import CheckpointError, Contents
from glalm.train.collectives import rank_and_world_size
from glalm.train.tensors import Piece

MOST_FAILURES = 3  # saves that fail in a row before the run is stopped
SLOWEST_WRITE = timedelta(hours=2)


class Saver:
    """Saves into `folder` as `config` says. Every process of the run has one and calls it alike. `alive` is called
    again and again while a call waits for a save, for as long as one may take (SLOWEST_WRITE).

    Asynchronous: `save` copies this process's share to host memory, queued on the current stream between one step and
    the next, so that it waits for no kernel, and leaves the rest to a thread. One save is in flight at a time; the
    next waits for it. Where the host has no memory for the copy, training waits for that save as for a synchronous one.
    A save that fails is told of at once (`say`), leaves nothing behind and costs nothing but itself; the third in a row
    raises, at the next call, a CheckpointError that says why, on all processes.

    failures: saves that failed so far. stalled: seconds that `save` kept the caller. As a context manager it waits,
    at the end, for what is in flight.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        say: Callable[[str], None] = print,
        alive: Callable[[], object] = lambda: None,
    ):
        self.folder, self.config, self.say, self.alive = folder, config, say, alive
        self.failures, self.stalled = 0, 0.0
        self._in_a_row: list[str] = []
        self._thread: threading.Thread | None = None
        self._host: dict[str, Tensor] = {}  # copied into again and again: page-locking memory takes as long as writing
        self._group = None
        if rank_and_world_size()[1] > 1:
            # Of its own: the thread's messages must not mix with those of the steps that go on meanwhile.
            self._group = distributed.new_group(backend="gloo", timeout=SLOWEST_WRITE)

    def prepare(self, model, optimizers, extra: Mapping[str, Tensor] | None = None) -> None:
        """After the first update, when all that will be saved exists: page-locks the host memory for it beside the
        training, which would else keep the first save waiting for a second or more."""
        if self.config.asynchronous and torch.cuda.is_available():
            self._start(self._reserve, checkpoint.contents(0, model, optimizers, {}, extra))

    def save(self, step: int, model, optimizers, state: Mapping, extra: Mapping[str, Tensor] | None = None) -> None:
        """See checkpoint.contents. Raises CheckpointError when this many saves before it failed: MOST_FAILURES."""
        begun = time.perf_counter()
        self._join()
        made = checkpoint.contents(step, model, optimizers, state, extra)
        copied = self._copied(step, made) if self.config.asynchronous else None
        self._start(self._write, step, *(copied or (made, lambda: None)))
        if copied is None:
            self._wait()
        self.stalled += time.perf_counter() - begun

    def row(self) -> dict[str, int]:
        """For the metrics: nothing while all is well."""
        return {"failed_saves": self.failures} if self.failures else {}

    def finish(self) -> None:
        """Waits for the save in flight. Raises CheckpointError if the last one failed."""
        self._join()
        if self._in_a_row:
            raise CheckpointError(f"the last checkpoint could not be saved: {self._in_a_row[-1]}")
        self._prune()  # what a kill kept from being removed

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def newest(self) -> Path | None:
        return checkpoint.latest(self.folder)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_) -> None:
        self._wait()

    def _start(self, work: Callable, *args) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def run() -> None:
            if device is not None:  # a thread begins with the first, of which every process would take memory
                torch.cuda.set_device(device)
            work(*args)

        self._thread = threading.Thread(target=run, name="glalm-checkpoint")
        try:
            self._thread.start()
        except RuntimeError:  # no memory, not even for a thread
            self._thread = None
            run()

    def _wait(self) -> None:
        begun = time.monotonic()
        while self.busy:
            self._thread.join(1.0)
            if time.monotonic() - begun < SLOWEST_WRITE.total_seconds():
                self.alive()
        self._thread = None

    def _join(self) -> None:
        self._wait()
        if len(self._in_a_row) >= MOST_FAILURES:
            raise CheckpointError(
                f"{MOST_FAILURES} checkpoints in a row could not be saved; the newest is "
                f"{self.newest or 'none'}. Each time: {self._in_a_row[-1]}"
            )

    def _write(self, step: int, made: Contents, ready: Callable[[], None]) -> None:
        try:
            ready()
            checkpoint.write(self.folder, step, made, self._group)
            self._prune()
            self._in_a_row.clear()
        except Exception as error:  # in a thread there is nobody to raise it to
            self.failures += 1
            self._in_a_row.append(str(error))
            if rank_and_world_size()[0] == 0:
                self.say(f"warning: step {step} is not saved: {error}; the checkpoints before it are as they were")

    def _prune(self) -> None:
        if rank_and_world_size()[0] != 0:
            return
        try:
            checkpoint.prune(self.folder, self.config.keep_last, self.config.keep_every, self.config.keep_best)
        except OSError as error:  # what was saved is saved all the same
            self.say(f"warning: an old checkpoint cannot be removed: {error}")

    def _copied(self, step: int, made: Contents) -> tuple[Contents, Callable[[], None]] | None:
        """`made` in host memory, and what to call before it may be read; None where there is no such memory."""
        try:
            pieces = {file: {n: self._on_host(n, p) for n, p in ps.items()} for file, ps in made.pieces.items()}
        except RuntimeError as error:  # torch's, of an allocation that failed
            self._host.clear()  # a part of it is of no use, and others may need it
            first_line = str(error).partition("\n")[0]  # the others tell how to look for bugs
            said = f"rank {rank_and_world_size()[0]} has no host memory for a copy of step {step}: {first_line}"
            with suppress(OSError):  # not `say`: it is the first process's alone
                print(f"warning: {said}; training waits until it is saved", file=sys.stderr, flush=True)
            return None
        if not torch.cuda.is_available():
            return replace(made, pieces=pieces), lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return replace(made, pieces=pieces), copied.synchronize

    def _on_host(self, name: str, piece: Piece) -> Piece:
        return replace(piece, local=self._memory(name, piece.local).copy_(piece.local, non_blocking=True))

    def _reserve(self, made: Contents) -> None:
        with suppress(RuntimeError):  # no such memory: `save` tries again, and says so
            for pieces in made.pieces.values():
                for name, piece in pieces.items():
                    self._memory(name, piece.local)

    def _memory(self, name: str, like: Tensor) -> Tensor:
        """Host memory for the tensor `name`: the same each time."""
        kept = self._host.get(name)
        if kept is None or kept.shape != like.shape or kept.dtype != like.dtype:
            kept = self._host[name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return kept
