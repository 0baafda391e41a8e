"""What a step is guarded by: signals are noted, and an update that would do harm is skipped."""

import math
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, distributed

from glalm.config.run import GuardConfig
from glalm.config.strict import RunError
from glalm.data.files import write_json
from glalm.data.order import Order
from glalm.train.collectives import rank_and_world_size

TWICE = 1.0  # seconds: some send what is meant once twice, as GNU timeout does, to a process and to its group
SHOW_CURSOR = b"\x1b[?25h"  # the progress bar hides it, and a kill would leave it so
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last: Slurm's `--signal=USR1@120`


class StopSignal:
    """While entered, Ctrl-C, SIGTERM and SIGUSR1 are noted instead of obeyed; the loop ends at its next step.

    Another signal of any of these kinds, more than a second later, kills the process, also in the midst of a save: no
    kill harms the checkpoints that are whole.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame) -> None:
        if self.received is not None:
            if time.monotonic() - self._at > TWICE:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.received, self._at = signum, time.monotonic()
        if rank_and_world_size()[0] == 0:
            shown = SHOW_CURSOR if os.isatty(2) else b""
            with suppress(OSError):  # not print(), in whose midst this may be
                os.write(2, shown + b"stopping after this step, with a checkpoint; a second signal ends it without\n")


class BadSteps(RunError):
    """Too many updates in a row had to be skipped."""


class UpdateGuard:
    """Makes the optimisers' step, or skips it: alike on all processes, weights and moments then as they were.

    Skipped is an update whose loss, on any process, or gradient norm is not finite; with config.spike_factor = k also
    one whose norm exceeds the mean of the last config.spike_window that passed by k of their standard deviations
    (none, before there are so many). After config.bad_steps in a row every update is skipped, until `check` is called
    and raises: the weights then are still those from before them.

    All of it is decided and counted on `device`; the host waits for no kernel, but with optimisers (Muon) that cannot
    be told on the device to leave everything as it is.
    """

    def __init__(self, config: GuardConfig, device: torch.device):
        self.config = config
        # A ring. Not full yet, as with another window than the checkpoint's, its limit is NaN: nothing exceeds it.
        self.norms = torch.full((config.spike_window,), math.inf, device=device)
        self.passed, self.not_finite, self.spikes, self.in_a_row, self.since = torch.zeros(
            5, dtype=torch.int64, device=device
        ).unbind()

    def step(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        largest: float = math.inf,
    ) -> None:
        """loss: this process's, a scalar; grad_norm: the global one, a scalar; step: the number of this update; its
        gradients are clipped to a norm of `largest`."""
        skip = self._judge(step, loss.detach().float(), grad_norm.detach().float())
        for optimizer in optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's fused optimisers
                # The update divides by this as it reads the gradients: a pass over them less than scaling them before.
                optimizer.grad_scale = ((grad_norm + 1e-6) / largest).clamp(min=1)
                optimizer.found_inf = skip.float()
                optimizer.step()
            elif not skip.item():
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grads_with_norm_(parameters, largest, grad_norm)
                optimizer.step()

    def check(self, order: Order, folder: Path, writes: bool = True) -> dict[str, int]:
        """{"skipped_steps": so far in this run}, for the metrics.

        Raises BadSteps after config.bad_steps skips in a row, when it `writes` with a file in `folder` that names
        every sample of these steps.
        """
        in_a_row, since = int(self.in_a_row), int(self.since)
        if in_a_row < self.config.bad_steps:
            return {"skipped_steps": int(self.not_finite) + int(self.spikes)}
        steps = range(since, since + self.config.bad_steps)
        path = folder / f"bad_steps_{since}.json"
        if writes:
            write_json(path, {"steps": {str(s): order.window_ids(s - 1).tolist() for s in steps}}, indent=1)
        raise BadSteps(
            f"the loss or the gradient was not finite, or spiked, in {len(steps)} updates in a row, steps {since} to "
            f"{steps[-1]}: none of them was made. {path} names their samples. Lower optim.lr, or raise "
            "train.guard.bad_steps to go on past them"
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run must know: to be saved, and loaded in place."""
        names = ("norms", "passed", "not_finite", "spikes", "in_a_row", "since")
        return {f"guard.{name}": getattr(self, name) for name in names}

    def _judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether to skip: bool, a scalar on the device."""
        finite = (torch.isfinite(loss) & torch.isfinite(norm)).float()
        if rank_and_world_size()[1] > 1:
            distributed.all_reduce(finite, distributed.ReduceOp.MIN)
        finite = finite > 0
        spike = torch.zeros_like(finite)
        if self.config.spike_factor is not None:
            limit = self.norms.mean() + self.config.spike_factor * self.norms.std(correction=0)
            spike = finite & (norm > limit)
        passes = finite & ~spike
        skip = ~passes | (self.in_a_row >= self.config.bad_steps)

        oldest = (self.passed % len(self.norms)).view(1)
        self.norms.index_copy_(0, oldest, torch.where(skip, self.norms.index_select(0, oldest), norm.view(1)))
        self.passed += ~skip
        self.not_finite += ~finite
        self.spikes += spike
        self.since.copy_(torch.where(skip & (self.in_a_row == 0), step, self.since))
        self.in_a_row.copy_(torch.where(skip, self.in_a_row + 1, 0))
        return skip
