"""Looking into some steps of a run: a trace of its kernels, and of its memory."""

import torch
from torch.profiler import ProfilerActivity, profile

from glalm.config.run import RunConfig
from glalm.config.strict import require


class Profiler:
    """Records train.profile_steps, on every process, into the run's folder:

        profile/rank_R.json.gz      for chrome://tracing or ui.perfetto.dev
        profile/memory_R.pickle     with train.memory_snapshot, for pytorch.org/memory_viz

    A context manager around the loop, whose `advance` is called after every step. Raises ConfigError when a memory
    snapshot is asked for without a GPU.
    """

    def __init__(self, config: RunConfig, device: torch.device, rank: int, step: int):
        self.first, self.last = config.train.profile_steps or (0, -1)
        self.memory, self.step, self.rank = config.train.memory_snapshot, step, rank
        self.folder, self.running = config.folder / "profile", None
        self.activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        require(device.type == "cuda" or not self.memory, "train.memory_snapshot=true needs a CUDA device")

    def __enter__(self) -> "Profiler":
        self.advance(self.step)
        return self

    def __exit__(self, *_) -> None:
        if self.running is not None:
            self._finish()

    def advance(self, step: int) -> None:
        """`step` is done."""
        if self.running is not None and step >= self.last:
            self._finish()
        elif self.running is None and self.first <= step + 1 <= self.last:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.memory:
                torch.cuda.memory._record_memory_history(max_entries=200_000)
            self.running = profile(activities=self.activities, record_shapes=True).__enter__()

    def _finish(self) -> None:
        self.running.__exit__(None, None, None)
        self.running.export_chrome_trace(str(self.folder / f"rank_{self.rank}.json.gz"))
        if self.memory:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.running = None
