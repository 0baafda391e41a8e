"""Profile some steps of a run: a trace of its operators and kernels, and a snapshot of the GPU's memory."""

import logging

import torch
from torch.profiler import ProfilerActivity, profile

from glalm.config.run import RunConfig
from glalm.config.strict import require

logger = logging.getLogger(__name__)


class Profiler:
    """Record train.profile_steps on every process. Use it as a context manager around the training loop.

    Rank 0 logs a warning if the run resumes after these steps.

    It writes into the run's folder:

        profile/rank_R.json.gz      for chrome://tracing or ui.perfetto.dev
        profile/memory_R.pickle     with train.memory_snapshot, for pytorch.org/memory_viz

    Args:
        config: The run's config.
        device: The process's device.
        rank: The process's rank.
        step: The last step before the loop.

    Raises:
        ConfigError: train.memory_snapshot is set, but there is no GPU. Or the run ends before train.profile_steps.
    """

    def __init__(self, config: RunConfig, device: torch.device, rank: int, step: int):
        require(
            device.type == "cuda" or not config.train.memory_snapshot, "train.memory_snapshot=true needs a CUDA device"
        )
        self.first_step, self.last_step = config.train.profile_steps or (0, -1)
        steps = f"train.profile_steps=[{self.first_step},{self.last_step}]"
        # The number of steps is known once a resumed run has said which batches it had before.
        end = config.steps
        require(self.first_step <= end, f"{steps} begins after the run's last step, {end:,}; choose others")
        if rank == 0 and 0 < self.last_step <= step:
            logger.warning(f"{steps} is over, as the run resumes after step {step:,}. To profile, choose later steps.")
        self.memory_snapshot = config.train.memory_snapshot
        self.folder = config.folder / "profile"
        self.rank = rank
        self.step = step
        self.activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None

    def __enter__(self) -> "Profiler":
        self.advance(self.step)
        return self

    def __exit__(self, *_) -> None:
        if self._profile is not None:
            self._stop(self._profile)

    def advance(self, step: int) -> None:
        """Start or stop recording after `step`."""
        if self._profile is not None and step >= self.last_step:
            self._stop(self._profile)
        elif self._profile is None and self.first_step <= step + 1 <= self.last_step:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.memory_snapshot:
                torch.cuda.memory._record_memory_history(max_entries=200_000)
            self._profile = profile(activities=self.activities, record_shapes=True)
            self._profile.__enter__()

    def _stop(self, recording: profile) -> None:
        recording.__exit__(None, None, None)
        recording.export_chrome_trace(str(self.folder / f"rank_{self.rank}.json.gz"))
        if self.memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
