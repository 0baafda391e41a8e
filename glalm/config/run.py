"""The config of a training run: its data, optimiser, loop and tracker."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from glalm.config.parallel import ParallelConfig
from glalm.config.reliability import CheckpointConfig, GuardConfig
from glalm.config.strict import divisors, require
from glalm.model.config import ModelConfig

DATA_RECORD = "data.json"  # in a run's folder


@dataclass
class DataConfig:
    path: str = "data/demo"  # a folder made by scripts/prepare_data.py
    seq_len: int = 256  # T: tokens a training sequence
    weights: dict[str, float] | None = None  # share of each source in the training tokens; null: as much as it has
    # At a document's start, go on from the state of the text before it (the paper's way), or from an empty one, with
    # the token before unscored.
    document_boundaries: Literal["ignore", "reset_state"] = "ignore"
    workers: int = 2  # threads a process that read ahead

    def __post_init__(self):
        require(self.seq_len > 0, f"data.seq_len must be positive, not {self.seq_len}")
        require(self.workers > 0, f"data.workers must be positive, not {self.workers}")


def one_of(where: str, config, first: str, second: str) -> None:
    """Exactly one of two keys of a config is to be given."""
    one, two = getattr(config, first), getattr(config, second)
    require(
        one is None or two is None,
        f"{where}.{first}={one} and {where}.{second}={two} say the same thing twice; write {where}.{first}=null or "
        f"{where}.{second}=null",
    )
    require(one is not None or two is not None, f"write {where}.{first}=N or {where}.{second}=N: both are null")


def format_set_key(config, where: str, *names: str) -> str:
    """The key of `names` that is given, as "key=value"."""
    name = next(n for n in names if getattr(config, n) is not None)
    return f"{where}.{name}={getattr(config, name)}"


@dataclass
class OptimConfig:
    """The optimiser, and its learning rate: a linear warm-up from min_lr to lr, then the schedule."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for all else
    lr: float = 3e-4  # the peak
    min_lr: float = 3e-5  # at the start, and at the last step unless the schedule is constant
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"  # wsd: constant, then a decay at the end
    decay_fraction: float = 0.2  # of all steps: wsd's decay
    decay_shape: Literal["sqrt", "linear"] = "sqrt"  # wsd's: 1 - sqrt(x) or 1 - x
    warmup_steps: int | None = 100
    warmup_tokens: int | None = None  # instead of warmup_steps
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's
    eps: float = 1e-8  # AdamW's
    momentum: float = 0.95  # Muon's
    weight_decay: float = 0.01  # on matrices only: not on norms, biases or embeddings
    grad_clip: float = 1.0  # largest global norm of the gradient

    def __post_init__(self):
        require(
            0 <= self.min_lr <= self.lr,
            f"optim.min_lr={self.min_lr} must lie between 0 and optim.lr={self.lr}",
        )
        one_of("optim", self, "warmup_steps", "warmup_tokens")
        for name in ("warmup_steps", "warmup_tokens"):
            require((getattr(self, name) or 0) >= 0, f"optim.{name} must not be negative")
        require(0 < self.decay_fraction <= 1, "optim.decay_fraction must lie in (0, 1]")
        require(0 <= self.momentum < 1, f"optim.momentum must lie in [0, 1), not {self.momentum}")
        require(self.grad_clip > 0, "optim.grad_clip must be positive (inf: no clipping)")
        require(self.eps > 0, f"optim.eps must be positive, not {self.eps}")
        require(self.weight_decay >= 0, f"optim.weight_decay must not be negative, not {self.weight_decay}")
        require(all(0 <= b < 1 for b in self.betas), f"optim.betas must lie in [0, 1), not {self.betas}")


@dataclass
class TrainConfig:
    steps: int | None = 1000  # optimiser steps
    tokens: int | None = None  # instead of steps: as many as make up these, the last one whole
    batch_size: int | None = 32  # sequences a step, over all processes and accumulation
    batch_tokens: int | None = None  # instead of batch_size
    micro_batch_size: int | None = None  # sequences a process holds at once, at most; null: no accumulation
    # Backpropagation through so many tokens at a time: each window of data.seq_len is run as segments of this length,
    # the state handed on and the gradient cut (the GLA paper's 8K and 24K models). null: through the whole window.
    tbptt_length: int | None = None
    # What of a block its backward makes again: nothing; what is elementwise (in compiled blocks, fused with its use);
    # all but the results of matrix products and kernels; everything.
    activation_checkpointing: Literal["none", "elementwise", "selective", "full"] = "elementwise"
    compile: Literal["auto", True, False] = "auto"  # the blocks, by torch.compile; auto: on GPUs
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the GPU has it, else fp32
    # Training's large matrix products in float8 (torchao, glalm/train/float8.py), on GPUs that have it; all else, and
    # validation, in bf16.
    float8: bool = False
    eval_every: int = 250  # steps between validations; one is always made before the first step and after the last
    eval_sequences: int = 128  # validation sequences each time
    log_every: int = 10
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    init_from: str | None = None  # a folder of save_pretrained: a new run starts from its weights; null: random ones
    resume_from: str | None = None  # a checkpoint's folder to begin with, once; null: the run's own newest, if any
    allow_changes: list[str] = field(default_factory=list)  # keys that a resumed run may change all the same
    z_loss: float = 0.0  # times the mean of logsumexp(logits)^2, added to the loss in training
    profile_steps: tuple[int, int] | None = None  # [first, last]: a chrome trace of these steps in the run's folder
    memory_snapshot: bool = False  # of the profiled steps (CUDA), for pytorch.org/memory_viz
    dry_run: bool = False  # print what the run would need, and end
    assumed_mfu: float = 0.4  # of the dry run's estimate of time
    assumed_gpus: int | None = None  # of the dry run; null: as many as there are processes

    def __post_init__(self):
        one_of("train", self, "steps", "tokens")
        one_of("train", self, "batch_size", "batch_tokens")
        positive = ("steps", "tokens", "batch_size", "batch_tokens", "micro_batch_size", "eval_every")
        for name in (*positive, "assumed_gpus", "eval_sequences", "log_every"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name} must be positive, not {value}")
        require(
            not self.checkpoint.keep_best or self.checkpoint.every % self.eval_every == 0,
            f"train.checkpoint.keep_best={self.checkpoint.keep_best} needs a validation with each checkpoint; write a "
            f"train.checkpoint.every that is a multiple of train.eval_every={self.eval_every}",
        )
        require(self.z_loss >= 0, f"train.z_loss must not be negative, not {self.z_loss}")
        require(0 < self.assumed_mfu <= 1, f"train.assumed_mfu must lie in (0, 1], not {self.assumed_mfu}")
        require(
            not self.float8 or self.precision != "fp32",
            f"train.float8=true is an option of training in bf16, not in train.precision={self.precision}; write "
            "train.precision=bf16 or train.float8=false",
        )
        first, last = self.profile_steps or (1, 1)
        require(0 < first <= last, f"train.profile_steps=[{first},{last}] must be two steps in order: [10,12]")
        require(
            self.profile_steps is not None or not self.memory_snapshot,
            "train.memory_snapshot=true records the steps of train.profile_steps; write train.profile_steps=[3,4]",
        )


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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self):
        require(
            re.fullmatch(r"[^/\\\0]+", self.name) is not None and self.name not in (".", ".."),
            f"name={self.name!r} must be one folder name, without slashes",
        )
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        tokens = self.train.batch_tokens
        require(
            tokens is None or tokens % self.data.seq_len == 0,
            f"train.batch_tokens={tokens} is no multiple of data.seq_len={self.data.seq_len}; write "
            f"train.batch_tokens={self.data.seq_len * max(1, round((tokens or 0) / self.data.seq_len))}",
        )
        require(
            self.warmup_steps <= self.steps,
            f"{format_set_key(self.optim, 'optim', 'warmup_steps', 'warmup_tokens')} is longer than "
            f"{format_set_key(self.train, 'train', 'steps', 'tokens')}",
        )
        self._check_segments()

    def _check_segments(self) -> None:
        length, window = self.train.tbptt_length, self.data.seq_len
        if length is None:
            return
        require(
            length > 0 and window % length == 0,
            f"train.tbptt_length={length} does not divide data.seq_len={window}; {divisors(window)}",
        )
        require(
            self.data.document_boundaries == "ignore",
            "train.tbptt_length hands the state on, data.document_boundaries=reset_state drops it; write one of "
            "train.tbptt_length=null, data.document_boundaries=ignore",
        )
        require(
            "attention" not in self.model.layer_mixers() or self.model.attention.window is not None,
            f"train.tbptt_length={length}: attention without a window has no state of fixed size to hand on; write "
            "model.attention.window=N or train.tbptt_length=null",
        )

    @property
    def batch_size(self) -> int:
        """Sequences a step, over all processes and accumulation."""
        train = self.train
        return train.batch_size if train.batch_size is not None else train.batch_tokens // self.data.seq_len

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.seq_len

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        train = self.train
        return train.steps if train.steps is not None else math.ceil(train.tokens / self.tokens_per_step)

    @property
    def warmup_steps(self) -> int:
        optim = self.optim
        return (
            optim.warmup_steps
            if optim.warmup_steps is not None
            else math.ceil(optim.warmup_tokens / self.tokens_per_step)
        )

    def accumulation(self, world: int) -> tuple[int, int]:
        """How `world` processes share a step: (sequences a process holds at once, times it accumulates).

        The first is the largest that divides a process's share and is at most train.micro_batch_size.
        """
        given = format_set_key(self.train, "train", "batch_size", "batch_tokens")
        require(
            self.batch_size % world == 0,
            f"{given} is {self.batch_size} sequences, which do not divide over {world} processes; write a multiple of "
            f"{world}, or start a number of processes that divides {self.batch_size}",
        )
        share = self.batch_size // world
        times = next(
            n for n in range(1, share + 1) if share % n == 0 and share // n <= (self.train.micro_batch_size or share)
        )
        return share // times, times

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def data_record(self) -> Path:
        """The manifest of the data as it was when the run began, which it keeps to."""
        return self.folder / DATA_RECORD
