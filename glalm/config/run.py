"""The config of a training run: its data, optimiser, loop and tracker."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from glalm.config.model import ModelConfig
from glalm.strict import divisors, require


@dataclass
class DataConfig:
    path: str = "data/demo"  # a folder made by scripts/prepare_data.py
    seq_len: int = 256  # T: tokens a training sequence
    weights: dict[str, float] | None = None  # share of each source in the training tokens; null: as much as it has
    # At a document's start, go on from the state of the text before it (the paper's way), or from an empty one, with
    # the token before unscored.
    boundaries: Literal["concatenate", "reset"] = "concatenate"
    workers: int = 2  # threads a process that read ahead

    def __post_init__(self):
        require(self.seq_len > 0, f"data.seq_len must be positive, not {self.seq_len}")
        require(self.workers > 0, f"data.workers must be positive, not {self.workers}")


@dataclass
class OptimConfig:
    """AdamW with a linear warm-up from min_lr to lr, then a cosine back to min_lr at the last step."""

    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01  # on matrices only: not on norms, biases or embeddings
    grad_clip: float = 1.0  # largest global norm of the gradient

    def __post_init__(self):
        require(
            0 <= self.min_lr <= self.lr,
            f"optim.min_lr={self.min_lr} must lie between 0 and optim.lr={self.lr}",
        )
        require(self.warmup_steps >= 0, "optim.warmup_steps must not be negative")
        require(self.grad_clip > 0, "optim.grad_clip must be positive (inf: no clipping)")
        require(all(0 <= b < 1 for b in self.betas), f"optim.betas must lie in [0, 1), not {self.betas}")


@dataclass
class TrainConfig:
    steps: int = 1000  # optimiser steps
    batch_size: int = 32  # sequences a step, over all processes and accumulation
    micro_batch_size: int | None = None  # sequences a process holds at once; null: no accumulation
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the GPU has it, else fp32
    eval_every: int = 250  # steps between validations; one is always made before the first step and after the last
    eval_sequences: int = 128  # validation sequences each time
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self):
        positive = ("steps", "batch_size", "eval_every", "eval_sequences", "checkpoint_every", "keep_checkpoints")
        for name in (*positive, "log_every"):
            require(getattr(self, name) > 0, f"train.{name} must be positive, not {getattr(self, name)}")
        micro = self.micro_batch_size
        require(
            micro is None or (micro > 0 and self.batch_size % micro == 0),
            f"train.micro_batch_size={micro} does not divide train.batch_size={self.batch_size}; "
            f"{divisors(self.batch_size)}",
        )

    def accumulation(self, world: int) -> tuple[int, int]:
        """How `world` processes share a step: (sequences a process holds at once, times it accumulates)."""
        require(
            self.batch_size % world == 0,
            f"train.batch_size={self.batch_size} does not divide over {world} processes; write a multiple of {world}",
        )
        share = self.batch_size // world
        micro = self.micro_batch_size or share
        require(
            share % micro == 0,
            f"train.micro_batch_size={micro} does not divide the {share} sequences that each of {world} processes "
            f"takes of train.batch_size={self.batch_size}; {divisors(share)}",
        )
        return micro, share // micro


@dataclass
class TrackConfig:
    """metrics.jsonl is always written; this adds Weights & Biases as a view of it."""

    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "glalm"


@dataclass
class RunConfig:
    """Everything `python train.py` does. The run lives in runs_dir/name; starting the same name again resumes it."""

    name: str = "demo"
    runs_dir: str = "runs"
    seed: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self):
        require(
            re.fullmatch(r"[^/\\\0]+", self.name) is not None and self.name not in (".", ".."),
            f"name={self.name!r} must be one folder name, without slashes",
        )
        require(
            self.optim.warmup_steps <= self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} is longer than train.steps={self.train.steps}",
        )

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name
