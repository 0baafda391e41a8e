"""Protect a run: stop at a signal with a checkpoint, and skip updates that would damage the model."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from glalm.config.run import GuardConfig
from glalm.config.strict import RunError
from glalm.data.files import write_json
from glalm.train.collectives import rank_and_world_size

# SIGUSR1 and SIGUSR2 come from schedulers (Slurm's `--signal=USR1@120`), SIGHUP from a terminal that is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# Ignore a repeated signal within a second: GNU timeout, for one, signals the process and then its process group.
REPEAT_SECONDS = 1.0
SHOW_CURSOR = b"\x1b[?25h"  # The progress bar hides the cursor, and a killed process could not show it again.


class StopSignal:
    """Record one of STOP_SIGNALS in `received` instead of dying, so that the loop can stop after its step.

    A SIGHUP that the process ignores, because nohup started it, stays ignored.
    A second signal, more than REPEAT_SECONDS later, kills the process at once, even while it saves a checkpoint.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0

    def __enter__(self) -> "StopSignal":
        signals = [*STOP_SIGNALS]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            signals.remove(signal.SIGHUP)
        self._previous_handlers = {signum: signal.signal(signum, self._handle) for signum in signals}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at > REPEAT_SECONDS:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.received = signum
        self._received_at = time.monotonic()
        if rank_and_world_size()[0] == 0:
            show_cursor = SHOW_CURSOR if os.isatty(2) else b""
            message = b"Stopping after this step, with a checkpoint. A second signal stops at once.\n"
            with suppress(OSError):
                # The handler may have interrupted a print(), so it must not call print() itself.
                os.write(2, show_cursor + message)


class BadSteps(RunError):
    """Too many consecutive updates were skipped."""


class UpdateGuard:
    """Take the optimizers' steps, or skip them on all processes, leaving weights and optimizer states as they are.

    An update is skipped if the loss of any process or the gradient norm is not finite. With `config.spike_factor` it is
    also skipped if the norm exceeds the mean of the last `config.spike_window` accepted norms by that many standard
    deviations. After `config.bad_steps` consecutive skips, every update is skipped until `check` raises, so that the
    weights stay those from before the first of them.

    Decisions and counters stay on the device: only optimizers that cannot skip a step by themselves (Muon) make the
    host wait for it.
    """

    def __init__(self, config: GuardConfig, device: torch.device):
        self.config = config
        # A ring buffer. While it contains infinities, the spike limit is NaN, which no norm exceeds.
        self.norms = torch.full((config.spike_window,), math.inf, device=device)
        counters = torch.zeros(5, dtype=torch.int64, device=device).unbind()
        self.accepted, self.not_finite, self.spikes, self.consecutive, self.first_bad_step = counters

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors that a resumed run needs."""
        names = ("norms", "accepted", "not_finite", "spikes", "consecutive", "first_bad_step")
        return {name: getattr(self, name) for name in names}

    def step(
        self, optimizers: Iterable[Optimizer], step: int, loss: Tensor, grad_norm: Tensor, max_norm: float = math.inf
    ) -> None:
        """Clip the gradients and step the optimizers, or skip the update.

        Args:
            optimizers: Each steps once.
            step: The number of this update.
            loss: This process's loss, a scalar.
            grad_norm: The gradient norm over all processes, a scalar.
            max_norm: The norm to clip the gradients to.
        """
        skip = self._decide(step, loss.detach().float(), grad_norm.detach().float())
        for optimizer in optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                # torch's fused optimizers skip the step where `found_inf` is set, and divide the gradients by
                # `grad_scale` as they read them, which saves the pass over memory that clipping would need. They read
                # both attributes without declaring them.
                optimizer.grad_scale = ((grad_norm + 1e-6) / max_norm).clamp(min=1)  # type: ignore[attr-defined]
                optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
                optimizer.step()
            elif not skip.item():
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, grad_norm)
                optimizer.step()

    def _decide(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Return whether to skip the update, a bool scalar on the device, and update the counters."""
        is_finite = (torch.isfinite(loss) & torch.isfinite(norm)).float()
        if rank_and_world_size()[1] > 1:
            distributed.all_reduce(is_finite, distributed.ReduceOp.MIN)
        is_finite = is_finite > 0
        is_spike = torch.zeros_like(is_finite)
        if self.config.spike_factor is not None:
            limit = self.norms.mean() + self.config.spike_factor * self.norms.std(correction=0)
            is_spike = is_finite & (norm > limit)
        skip = ~is_finite | is_spike | (self.consecutive >= self.config.bad_steps)

        oldest = (self.accepted % len(self.norms)).view(1)
        self.norms.index_copy_(0, oldest, torch.where(skip, self.norms.index_select(0, oldest), norm.view(1)))
        self.accepted += ~skip
        self.not_finite += ~is_finite
        self.spikes += is_spike
        self.first_bad_step.copy_(torch.where(skip & (self.consecutive == 0), step, self.first_bad_step))
        self.consecutive.copy_(torch.where(skip, self.consecutive + 1, 0))
        return skip

    def check(
        self, window_ids: Callable[[int], np.ndarray], folder: Path, is_main_process: bool = True
    ) -> dict[str, int]:
        """Return {"skipped_steps": number of skipped updates of the run}. This waits for the device.

        Args:
            window_ids: Returns the windows of a step, counted from 0, to name the samples of bad steps.
            folder: The run's folder.
            is_main_process: Whether to write bad_steps_N.json to `folder` before raising.

        Raises:
            BadSteps: `config.bad_steps` consecutive updates were skipped.
        """
        if int(self.consecutive) < self.config.bad_steps:
            return {"skipped_steps": int(self.not_finite) + int(self.spikes)}
        first = int(self.first_bad_step)
        steps = range(first, first + self.config.bad_steps)
        path = folder / f"bad_steps_{first}.json"
        if is_main_process:
            samples = {str(step): window_ids(step - 1).tolist() for step in steps}
            write_json(path, {"steps": samples}, indent=1)
        raise BadSteps(
            f"The loss or the gradient was not finite, or spiked, in {len(steps)} consecutive updates, steps {first} "
            f"to {steps[-1]}. All of them were skipped. {path} lists their samples. Resume with a lower "
            "rate, by optim.lr=RATE 'train.allow_changes=[optim.lr]', or continue past them, by a larger "
            "train.guard.bad_steps."
        )
