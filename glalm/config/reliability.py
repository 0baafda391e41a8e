"""What keeps a run safe: its checkpoints, and what guards its steps. docs/reliability.md says what each is for."""

from dataclasses import dataclass

from glalm.config.strict import require


@dataclass
class CheckpointConfig:
    every: int = 250  # steps; one is always made after the last step, and when a signal stops the run
    keep_last: int = 2
    keep_every: int | None = None  # steps: those whose step is a multiple are kept for good
    keep_best: int = 0  # as many with the lowest validation loss are kept as well
    asynchronous: bool = True  # copied to host memory at once, written by a thread while training goes on

    def __post_init__(self):
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.checkpoint.{name} must be positive, not {value}")
        require(self.keep_best >= 0, f"train.checkpoint.keep_best must not be negative, not {self.keep_best}")


@dataclass
class GuardConfig:
    bad_steps: int = 5  # so many updates in a row whose loss or gradient is not finite, or spikes, end the run
    # Skip an update whose gradient norm is more than so many standard deviations above the mean of the last
    # `spike_window` updates' norms (6 is usual); null: never.
    spike_factor: float | None = None
    spike_window: int = 128
    hang_seconds: float | None = 1800.0  # a process that makes no progress for so long ends the run; null: never

    def __post_init__(self):
        require(self.bad_steps > 0, f"train.guard.bad_steps must be positive, not {self.bad_steps}")
        require(self.spike_window > 1, f"train.guard.spike_window must be at least 2, not {self.spike_window}")
        for name in ("spike_factor", "hang_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.guard.{name} must be positive or null, not {value}")
