"""The config of an evaluation: which checkpoint, which evaluators, their settings."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from glalm.strict import require


@dataclass
class ExtrapolationConfig:
    max_length: int = 4096  # tokens read of each document
    documents: int = 32  # at most; only documents of max_length tokens or more are read
    split: Literal["train", "validation", "test"] = "test"

    def __post_init__(self):
        require(self.max_length > 0, "extrapolation.max_length must be positive")
        require(self.documents > 0, "extrapolation.documents must be positive")


@dataclass
class SampleConfig:
    tokens: int = 120  # new tokens a continuation
    temperature: float = 0.8
    top_p: float = 0.95
    prompts: list[str] = field(default_factory=lambda: ["def ", "class "])

    def __post_init__(self):
        require(self.temperature > 0, "samples.temperature must be positive")
        require(0 < self.top_p <= 1, "samples.top_p must lie in (0, 1]")
        require(self.tokens > 0, "samples.tokens must be positive")


@dataclass
class EvalConfig:
    """Everything `python eval.py` does: which checkpoint, which evaluators, their settings."""

    name: str = "demo"  # the run to evaluate
    runs_dir: str = "runs"
    checkpoint: str = "latest"  # or step_N
    data_path: str | None = None  # a prepared folder; null: the one that the run was trained on
    seed: int = 1
    batch_size: int = 16  # sequences at once
    evals: list[Literal["perplexity", "extrapolation", "samples"]] = field(
        default_factory=lambda: ["perplexity", "extrapolation", "samples"]
    )
    extrapolation: ExtrapolationConfig = field(default_factory=ExtrapolationConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self):
        require(self.batch_size > 0, f"batch_size must be positive, not {self.batch_size}")
        require(
            len(self.evals) > 0,
            "evals is empty; write evals=[perplexity,extrapolation,samples] or a part of it",
        )
        require(
            re.fullmatch(r"latest|step_\d+", self.checkpoint) is not None,
            f"checkpoint={self.checkpoint!r} must be latest or step_N",
        )

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name

    def check_lengths(self, train_length: int) -> None:
        """Refuses an extrapolation that ends before the length that the model was trained at."""
        require(
            self.extrapolation.max_length >= train_length,
            f"extrapolation.max_length={self.extrapolation.max_length} is under the training length {train_length}; "
            f"write extrapolation.max_length={10 * train_length} for ten times it",
        )
