"""The configuration of a training run, and which part of it decides what is learned.

Every dataclass is a level of the config tree, and its comments document the keys. Checks raise ConfigError.
"""

import dataclasses
import fnmatch
import json
import math
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glalm.config.stages import Milestone, Phase, StageConfig, check_stages, plan_phases
from glalm.config.strict import ConfigError, describe_divisors, flatten_tree, refuse_url, require, require_positive
from glalm.model.config import ModelConfig

RUN_RECORD = "run.json"  # The id, config and versions of a run, in its folder.
DATA_RECORD = "data.json"  # The manifest of the data, in a run's folder.
STAGE_ORDER = "order of train.stages"  # An entry of the identity, in which the stages' keys have no order.

MAX_TIMEOUT_MINUTES = 366 * 24 * 60

# Which weights of a checkpoint: those that the last step left, or their moving average (train.ema_decay).
Weights = Literal["current", "average"]

# Keys that a resumed run may change: paths, reporting, how the work is divided over the hardware, and the precision, of
# which only the rounding differs. All others decide what is learned. A * stands for any name.
MAY_CHANGE = (
    "name",
    "runs_dir",
    "data.path",
    "data.workers",
    "track",
    "parallel",
    "train.micro_batch_size",
    "train.stages.*.micro_batch_size",
    "train.precision",
    "train.float8",
    "train.compile",
    "train.cuda_graph",
    "train.activation_checkpointing",
    "train.eval_every",
    "train.eval_sequences",
    "train.checkpoint",
    "train.guard.bad_steps",
    "train.guard.hang_seconds",
    "train.resume_from",
    "train.allow_changes",
    "train.log_every",
    "train.statistics_every",
    "train.profile_steps",
    "train.memory_snapshot",
    "train.dry_run",
    "train.assumed_mfu",
    "train.assumed_gpu",
    "train.assumed_gpus",
    "train.assumed_price",
)


@dataclass
class DataConfig:
    """The prepared text to train on, and how it is cut into sequences."""

    path: str = "data/demo"  # a folder written by glalm prepare
    seq_len: int = 256  # T: tokens of a training sequence
    weights: dict[str, float] | None = None  # share of each source in the training tokens; null: its share of the data
    # ignore: the state runs on from one document into the next within a sequence, as in the GLA paper. reset_state:
    # each document starts from an empty state, and the token before it has no target.
    document_boundaries: Literal["ignore", "reset_state"] = "ignore"
    workers: int = 2  # threads per process that read ahead

    def __post_init__(self):
        require_positive(self, "data", "seq_len", "workers")


@dataclass
class OptimConfig:
    """The optimizer and its learning rate: a linear warm-up from min_lr to lr, then the schedule."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for all other parameters
    lr: float = 3e-4  # peak learning rate
    min_lr: float = 3e-5  # at the start, and at the last step unless the schedule is constant
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"  # wsd: constant, then a decay at the end
    decay_fraction: float = 0.2  # of all steps, for the decay of wsd
    decay_shape: Literal["sqrt", "linear"] = "sqrt"  # of wsd's decay: 1 - sqrt(x) or 1 - x
    warmup_steps: int | None = 100  # steps in which the learning rate rises
    warmup_tokens: int | None = None  # instead of warmup_steps
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    eps: float = 1e-8  # AdamW
    momentum: float = 0.95  # Muon
    # Muon: the coefficients of its iterations, Jordan's (newton_schulz) or those of arXiv 2505.16932 (polar_express).
    orthogonalization: Literal["newton_schulz", "polar_express"] = "newton_schulz"
    neuron_beta: float | None = None  # NorMuon: the decay of each neuron's mean square update; null: Muon
    weight_decay: float = 0.01  # for matrices only, not for norms, biases or embeddings
    grad_clip: float = 1.0  # largest global gradient norm; inf: no clipping
    # mup: initial weights, learning rates, weight decay and eps of each parameter follow from those of a base model, so
    # that the best learning rate of a narrow and shallow model is that of a wide and deep one. standard: all are alike.
    parametrization: Literal["standard", "mup"] = "standard"
    base_width: int | None = None  # mup: the model.hidden_size for which lr, eps and initializer_range are written
    base_heads: int | None = None  # mup: the model.num_heads at base_width; null: model.num_heads
    base_depth: int | None = None  # mup: the model.num_hidden_layers of the base model; null: model.num_hidden_layers

    def __post_init__(self):
        require_positive(self, "optim", "eps", finite=True)
        for name in ("lr", "weight_decay"):
            require(getattr(self, name) < math.inf, f"optim.{name} must be finite, not {getattr(self, name)}")
        require(0 <= self.min_lr <= self.lr, f"optim.min_lr={self.min_lr} must lie between 0 and optim.lr={self.lr}")
        require_exactly_one(self, "optim", "warmup_steps", "warmup_tokens")
        for name in ("warmup_steps", "warmup_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"optim.{name} must not be negative, not {value}")
        require(0 < self.decay_fraction <= 1, f"optim.decay_fraction must lie in (0, 1], not {self.decay_fraction}")
        require(0 <= self.momentum < 1, f"optim.momentum must lie in [0, 1), not {self.momentum}")
        require(0 <= (self.neuron_beta or 0) < 1, f"optim.neuron_beta must lie in [0, 1), not {self.neuron_beta}")
        require_positive(self, "optim", "grad_clip")
        require(self.weight_decay >= 0, f"optim.weight_decay must not be negative, not {self.weight_decay}")
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas must lie in [0, 1), not {self.betas}")
        require_positive(self, "optim", "base_width", "base_heads", "base_depth")
        is_mup = self.parametrization == "mup"
        require(
            not is_mup or self.base_width is not None,
            "optim.parametrization=mup transfers the learning rate of a base model; set optim.base_width to the "
            "model.hidden_size for which optim.lr was found, for example 256",
        )
        for name in ("base_width", "base_heads", "base_depth"):
            require(
                is_mup or getattr(self, name) is None,
                f"optim.{name}={getattr(self, name)} is an option of optim.parametrization=mup; set that, or "
                f"optim.{name}=null",
            )


@dataclass
class ParallelConfig:
    """How the processes of a run share its model."""

    # ddp: every process holds the model and gradients are averaged. fsdp2: weights, gradients and optimizer states are
    # sharded over all processes. hsdp: they are sharded over groups of `shard` processes, each group holding one copy.
    mode: Literal["ddp", "fsdp2", "hsdp"] = "ddp"
    shard: int | None = None  # hsdp: processes per copy; null: those of one machine
    replicate: int | None = None  # hsdp: copies; null: all processes / shard
    # The dtype of the collectives that average gradients. The results are float32. bf16 halves the traffic; under fsdp2
    # and hsdp, micro-batches are then accumulated in bf16, too.
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    context: int = 1  # processes that share the tokens of each sequence, for sequences that one GPU cannot hold
    reshard: bool = True  # free a block's gathered weights after its forward pass; false: after its backward pass
    timeout_minutes: float = 30.0  # a collective that waits longer ends the run

    def __post_init__(self):
        require_positive(self, "parallel", "shard", "replicate", "context", "timeout_minutes")
        minutes = self.timeout_minutes
        require(minutes <= MAX_TIMEOUT_MINUTES, f"parallel.timeout_minutes={minutes} is longer than a year; lower it")
        require(
            self.mode == "hsdp" or (self.shard is None and self.replicate is None),
            f"parallel.shard and parallel.replicate are options of parallel=hsdp, not of {self.mode}; set "
            "parallel=hsdp, or remove them",
        )

    def mesh(self, world_size: int, local_world_size: int) -> tuple[int, int]:
        """Return (copies of the model, processes per copy) for `world_size` processes, `local_world_size` per machine.

        Raises:
            ConfigError: The product is not the number of processes.
        """
        if self.mode == "ddp":
            return world_size, 1
        if self.mode == "fsdp2":
            return 1, world_size
        shard = self.shard
        if shard is None:
            shard = max(1, world_size // self.replicate) if self.replicate else local_world_size
        require(
            world_size % shard == 0,
            f"parallel.shard={shard} does not divide the number of processes, {world_size}; "
            f"{describe_divisors(world_size)}, or start a multiple of {shard} processes",
        )
        replicate = self.replicate or world_size // shard
        require(
            replicate * shard == world_size,
            f"parallel.replicate={replicate} times parallel.shard={shard} needs {replicate * shard} processes, one per "
            f"GPU, but there are {world_size}; start that many, or set parallel.replicate=null",
        )
        return replicate, shard


@dataclass
class CheckpointConfig:
    """When a run saves checkpoints, besides after the last step and when a signal stops it, and which it keeps."""

    every: int = 250  # steps
    keep_last: int = 2  # the newest checkpoints, older ones are removed
    keep_every: int | None = None  # steps: checkpoints at multiples are never removed
    keep_best: int = 0  # as many with the lowest validation loss are not removed either
    asynchronous: bool = True  # copy to host memory, and write in a background thread while training continues

    def __post_init__(self):
        require_positive(self, "train.checkpoint", "every", "keep_last", "keep_every")
        require(self.keep_best >= 0, f"train.checkpoint.keep_best must not be negative, not {self.keep_best}")


@dataclass
class GuardConfig:
    """What protects a run from bad updates and hangs; see docs/reliability.md."""

    bad_steps: int = 5  # abort after this many consecutive skipped updates
    # Skip an update whose gradient norm is more than this many standard deviations above the mean of the last
    # `spike_window` updates' norms (6 is usual); null: never.
    spike_factor: float | None = None
    spike_window: int = 128  # updates, of spike_factor
    hang_seconds: float | None = 1800.0  # a process without progress for this long ends the run; null: never

    def __post_init__(self):
        require_positive(self, "train.guard", "bad_steps", "spike_factor", "hang_seconds")
        require(self.spike_window > 1, f"train.guard.spike_window must be at least 2, not {self.spike_window}")


@dataclass
class TrainConfig:
    """How long and in which batches to train, and when to validate, log and save."""

    steps: int | None = 1000  # optimizer steps
    tokens: int | None = None  # instead of steps, rounded up to a full step, whatever batch was resumed from
    # {name: settings} of parts of the run, in their order, with other data, batches or learning rates (docs/stages.md).
    stages: dict[str, StageConfig] | None = None
    batch_size: int | None = 32  # sequences per optimizer step, over all processes and micro-batches
    batch_tokens: int | None = None  # instead of batch_size
    micro_batch_size: int | None = None  # most sequences per forward pass; null: no gradient accumulation
    # Truncated backpropagation through time: each sequence of data.seq_len tokens runs as segments of this length. The
    # state is carried from segment to segment, the gradient is not (the GLA paper's 8K and 24K models). null: the
    # gradient flows through the whole sequence.
    tbptt_length: int | None = None
    # What of a block the backward pass recomputes: nothing; elementwise operations (in compiled blocks, fused into
    # their use); everything but matrix products and kernels; everything.
    activation_checkpointing: Literal["none", "elementwise", "selective", "full"] = "elementwise"
    compile: Literal["auto", True, False] = "auto"  # compile the blocks by torch.compile; auto: on GPUs
    # Run the forward and backward pass of a micro-batch as one CUDA graph, so that training does not wait for the host.
    # auto: on one GPU, where batches have one shape, memory allows it and the mixers can be captured.
    cuda_graph: Literal["auto", True, False] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the GPU supports it, else fp32
    # Compute the large matrix products of training in float8 (torchao, glalm/train/float8.py), on GPUs that support it.
    # Everything else, and validation, stays in bf16.
    float8: bool = False
    eval_every: int = 250  # steps between validations, besides those at step 0 and at the end of each stage and the run
    eval_sequences: int = 128  # sequences per validation
    log_every: int = 10  # steps between rows of metrics.jsonl
    statistics_every: int | None = None  # steps between statistics of each layer: gates, states, norms; null: none
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    init_from: str | None = None  # a folder of save_pretrained with the initial weights; null: random weights
    resume_from: str | None = None  # a checkpoint to start from, once; null: the run's own newest, if any
    allow_changes: list[str] = field(default_factory=list)  # keys that a resumed run may change in spite of the check
    # Keep an exponential moving average of the weights, which validation, checkpoints, evaluation and export know: this
    # share of it remains from step to step, 0.999 for example. It takes as much memory as the weights. null: none.
    ema_decay: float | None = None
    z_loss: float = 0.0  # weight of the mean of logsumexp(logits)^2 in the training loss
    profile_steps: tuple[int, int] | None = None  # [first, last]: write a Chrome trace of these steps
    memory_snapshot: bool = False  # of the profiled steps, on CUDA, for pytorch.org/memory_viz
    dry_run: bool = False  # print what the run would need, and exit
    # The share of the GPU's peak, for the dry run's estimate of time; null: what was measured for the mixer, else 0.4.
    assumed_mfu: float | None = None
    # The dry run plans for this kind of GPU; null: that of this machine, or its CPU.
    assumed_gpu: Literal["B200", "H200", "H100", "A100", "L40S", "L4"] | None = None
    assumed_gpus: int | None = None  # for the dry run; null: the number of processes
    assumed_price: float | None = None  # of a GPU for an hour, for the dry run; null: no costs are printed

    def __post_init__(self):
        if self.stages is None:
            require_exactly_one(self, "train", "steps", "tokens")
        else:
            check_stages(self)
        require_exactly_one(self, "train", "batch_size", "batch_tokens")
        require_positive(self, "train", "steps", "tokens", "batch_size", "batch_tokens", "micro_batch_size")
        require_positive(self, "train", "eval_every", "eval_sequences", "log_every", "assumed_gpus")
        require_positive(self, "train", "statistics_every", "assumed_price")
        require(
            self.statistics_every is None or self.statistics_every % self.log_every == 0,
            f"train.statistics_every={self.statistics_every} must be a multiple of train.log_every={self.log_every}",
        )
        require(
            not self.checkpoint.keep_best or self.checkpoint.every % self.eval_every == 0,
            f"train.checkpoint.keep_best={self.checkpoint.keep_best} needs a validation at each checkpoint; set "
            f"train.checkpoint.every to a multiple of train.eval_every={self.eval_every}",
        )
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"train.ema_decay must lie between 0 and 1, for example 0.999, or be null, not {self.ema_decay}",
        )
        require(0 <= self.z_loss < math.inf, f"train.z_loss must be 0 or more, and finite, not {self.z_loss}")
        mfu = self.assumed_mfu
        require(mfu is None or 0 < mfu <= 1, f"train.assumed_mfu must be null or lie in (0, 1], not {mfu}")
        require(
            not self.float8 or self.precision != "fp32",
            f"train.float8=true needs bf16 training, but train.precision={self.precision}; set train.precision=bf16 or "
            "train.float8=false",
        )
        first, last = self.profile_steps or (1, 1)
        require(0 < first <= last, f"train.profile_steps=[{first},{last}] must be two steps in order: [10,12]")
        require(
            self.profile_steps is not None or not self.memory_snapshot,
            "train.memory_snapshot=true records the steps of train.profile_steps; set train.profile_steps=[3,4]",
        )


@dataclass
class TrackConfig:
    """Where to log metrics in addition to metrics.jsonl, which is always written."""

    tracker: Literal["none", "wandb", "tensorboard", "mlflow"] = "none"  # where else metrics go
    project: str = "glalm"  # the project of Weights & Biases, or the experiment of MLflow
    offline: bool = False  # keep the files in the run's folder, whatever login or server there is


@dataclass
class RunConfig:
    """Everything about a training run. It lives in runs_dir/name; starting the same name again resumes it."""

    name: str = "demo"  # the run's folder in runs_dir
    runs_dir: str = "runs"  # the folder of all runs
    seed: int = 1  # of the initial weights and the order of the data
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
        length = len(os.fsencode(self.name))
        require(length <= 255, f"name={self.name[:20]}... has {length} bytes, and a folder's name at most 255")
        refuse_url("runs_dir=", self.runs_dir)
        refuse_url("data.path=", self.data.path)
        refuse_url("train.init_from=", self.train.init_from)
        refuse_url("train.resume_from=", self.train.resume_from)
        if self.optim.parametrization == "mup":
            build_base_config(self.model, self.optim)
        self._stage_phases: list[Phase] | None = None
        self.resume_at(step=0, tokens=0)
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if self.train.stages is None:
            self._check_batch()
        else:
            # The config of each phase checks the batch and the segments that the phase has.
            self._stage_phases = plan_phases(self)
            self.milestones = [
                Milestone(phase.start_step, phase.start_tokens, phase.config.batch_size, phase.config.data.seq_len)
                for phase in self._stage_phases
            ]
        self._check_warmup()
        if self.parallel.context > 1:
            self._check_context(self.parallel.context)

    def _check_warmup(self) -> None:
        warmup = format_set_key(self.optim, "optim", "warmup_steps", "warmup_tokens")
        end = self.steps
        if self.train.stages is None:
            where = format_set_key(self.train, "train", "steps", "tokens")
        elif not self.has_stage_schedules:
            where = f"the {end:,} steps of the run"
        else:
            name = next(iter(self.train.stages))
            end = self.stage_steps[name].stop - 1
            where = f"the {end:,} steps of train.stages.{name}"
        key = warmup.partition("=")[0]
        length = end if self.optim.warmup_tokens is None else self.tokens_at(end)
        require(
            self.warmup_steps <= end,
            f"{warmup} is longer than {where}; set {key}={max(1, length // 30)} for 1/30 of that, as in the GLA paper, "
            "or train longer",
        )

    def _check_batch(self) -> None:
        tokens = self.train.batch_tokens
        require(
            tokens is None or tokens % self.data.seq_len == 0,
            f"train.batch_tokens={tokens} is not a multiple of data.seq_len={self.data.seq_len}; set "
            f"train.batch_tokens={self.data.seq_len * max(1, round((tokens or 0) / self.data.seq_len))}",
        )
        length = self.train.tbptt_length
        if length is None:
            return
        require(
            length > 0 and self.data.seq_len % length == 0,
            f"train.tbptt_length={length} does not divide data.seq_len={self.data.seq_len}; "
            f"{describe_divisors(self.data.seq_len)}",
        )
        require(
            self.data.document_boundaries == "ignore",
            "train.tbptt_length carries the state on, but data.document_boundaries=reset_state drops it; set "
            "train.tbptt_length=null or data.document_boundaries=ignore",
        )
        require(
            "attention" not in self.model.layer_mixers() or self.model.attention.window is not None,  # type: ignore[attr-defined]  # The registry adds the field.
            f"train.tbptt_length={length}: attention without a window has no state of fixed size to carry on; set "
            "model.attention.window=N or train.tbptt_length=null",
        )

    def _check_context(self, processes: int) -> None:
        self.model.check_context_support(f"parallel.context={processes}")
        # The windows of stages are checked with their phases, and those of validation are not cut into segments.
        segment = self.train.tbptt_length if self.train.stages is None else None
        length = segment or self.data.seq_len
        key = "data.seq_len" if segment is None else "train.tbptt_length"
        require(
            length % processes == 0,
            f"parallel.context={processes} does not divide {key}={length}; {describe_divisors(length)}",
        )

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step, over all processes and micro-batches."""
        if self.train.batch_size is not None:
            return self.train.batch_size
        assert self.train.batch_tokens is not None
        return self.train.batch_tokens // self.data.seq_len

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.seq_len

    def resume_at(self, step: int, tokens: int, milestones: Iterable[Sequence[int]] = ()) -> None:
        """Continue after `step`, up to which the run has trained on `tokens` tokens, perhaps in other batches.

        Args:
            milestones: The `milestones` before `step`, as they were then.

        Raises:
            ConfigError: The run has stages, by which it has another number of tokens after `step`.
        """
        if self._stage_phases is not None:
            expected = self.tokens_at(step)
            require(
                tokens == expected or step > self.steps,
                f"The checkpoint of step {step:,} has trained on {tokens:,} tokens, but by train.stages the run has "
                f"{expected:,} there. Batches, lengths and tokens of stages that have begun cannot change. Write their "
                "old values, or train from the start under another name=...",
            )
            return
        batch = (self.batch_size, self.data.seq_len)
        self.milestones = [Milestone(*values) for values in milestones]
        if not self.milestones or self.milestones[-1][2:] != batch:
            self.milestones.append(Milestone(step, tokens, *batch))

    @property
    def phases(self) -> list[Phase]:
        """The phases of the run in their order. A run without stages is one phase, with this config."""
        return self._stage_phases or [Phase("", 0, self.steps, 0, self)]

    def phase_at(self, step: int) -> Phase:
        """Return the phase of an optimizer step, counted from 1. Steps beyond the last are of the last phase."""
        return self.phases[self.phase_index(step)]

    def phase_index(self, step: int) -> int:
        """Return the place in `phases` of an optimizer step's phase. Steps beyond the last are of the last phase."""
        ends = [phase.end_step for phase in self.phases]
        return min(bisect_left(ends, step), len(ends) - 1)

    @property
    def stage_ends(self) -> set[int]:
        """The last steps of the stages, and so of the run."""
        return {steps.stop - 1 for steps in self.stage_steps.values()}

    @property
    def stage_steps(self) -> dict[str, range]:
        """The optimizer steps of each stage, counted from 1. A run without stages is the one stage ""."""
        steps: dict[str, range] = {}
        for phase in self.phases:
            first = steps[phase.stage].start if phase.stage in steps else phase.start_step + 1
            steps[phase.stage] = range(first, phase.end_step + 1)
        return steps

    @property
    def has_stage_schedules(self) -> bool:
        """Whether each stage has a schedule of the learning rate, or if not, optim.schedule goes over the run."""
        return any(stage.schedule is not None for stage in (self.train.stages or {}).values())

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self._stage_phases is not None:
            return self._stage_phases[-1].end_step
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return self._step_after(self.train.tokens)

    @property
    def warmup_steps(self) -> int:
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps
        assert self.optim.warmup_tokens is not None
        return self._step_after(self.optim.warmup_tokens)

    def tokens_at(self, step: int) -> int:
        """Return the tokens that the run has trained on after `step`, also if batches were others before a resume."""
        start = max((start for start in self.milestones if start.step < step), default=self.milestones[0])
        return start.tokens + (step - start.step) * start.tokens_per_step

    def _step_after(self, tokens: int) -> int:
        """Return the first step after which the run has trained on `tokens` tokens or more."""
        start = max((start for start in self.milestones if start.tokens < tokens), default=self.milestones[0])
        return start.step - (start.tokens - tokens) // start.tokens_per_step

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def data_record(self) -> Path:
        """The manifest of the data as it was when the run started. The run reads no data that is added later."""
        return self.folder / DATA_RECORD


def count_groups(context: int, world_size: int) -> int:
    """Return the number of groups of processes of which `context` each share their sequences.

    Raises:
        ConfigError: The processes do not form such groups.
    """
    require(
        world_size % context == 0,
        f"parallel.context={context} does not divide the number of processes, {world_size}; "
        f"{describe_divisors(world_size)}, or start a multiple of {context} processes",
    )
    return world_size // context


def build_base_config(model: ModelConfig, optim: OptimConfig) -> ModelConfig:
    """Return the model from which optim.parametrization=mup transfers to `model`, with as many layers as `model` has.

    Raises:
        ConfigError: There is no such model, or nothing transfers from it.
    """
    width = optim.base_width
    assert width is not None
    require(
        not model.tie_word_embeddings,
        "optim.parametrization=mup gives embeddings and head different learning rates, so they cannot share a weight; "
        "set model.tie_word_embeddings=false",
    )
    heads = optim.base_heads or model.num_heads
    # The width of SwiGLU is a multiple of 256 by default. Here it is in proportion to hidden_size.
    swiglu = model.intermediate_size and max(1, round(model.intermediate_size * width / model.hidden_size))
    try:
        return dataclasses.replace(model, hidden_size=width, num_heads=heads, intermediate_size=swiglu)
    except ConfigError as error:
        raise ConfigError(
            f"The base model of optim.base_width={width} with {heads} heads is refused; choose another width, or "
            f"optim.base_heads: {error}"
        ) from error


def require_exactly_one(config, where: str, first: str, second: str) -> None:
    """Raise ConfigError unless exactly one of two alternative keys of `config` is set."""
    one, other = getattr(config, first), getattr(config, second)
    require(
        one is None or other is None,
        f"{where}.{first}={one} and {where}.{second}={other} are alternatives; set {where}.{first}=null or "
        f"{where}.{second}=null",
    )
    require(one is not None or other is not None, f"set {where}.{first}=N or {where}.{second}=N: both are null")


def format_set_key(config, where: str, *names: str) -> str:
    """Return the first of the keys `names` that is not null, as "where.name=value"."""
    name = next(name for name in names if getattr(config, name) is not None)
    return f"{where}.{name}={getattr(config, name)}"


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Return {dotted key: value} of everything in `config` that decides what is learned.

    Resuming with another identity would be another run. Keys that a subclass of RunConfig adds, such as evaluators,
    are not part of it, and neither is MAY_CHANGE.
    """
    tree = dataclasses.asdict(config)
    own = {key.name: tree[key.name] for key in dataclasses.fields(RunConfig)}
    flat = flatten_tree(json.loads(json.dumps(own)))  # As it is read back from JSON, where tuples are lists.
    if config.train.stages is not None:
        flat[STAGE_ORDER] = ", ".join(config.train.stages)
    return {key: value for key, value in flat.items() if not may_change(key)}


def may_change(key: str) -> bool:
    """Return whether MAY_CHANGE has a dotted key, or a level of the config above it."""
    return any(fnmatch.fnmatchcase(key, name) or fnmatch.fnmatchcase(key, f"{name}.*") for name in MAY_CHANGE)


def describe_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return a line "key: saved -> current" for each key in which two identities differ."""
    keys = [key for key in sorted(saved | current) if saved.get(key) != current.get(key)]
    return [f"{key}: {saved.get(key)!r} -> {current.get(key)!r}" for key in keys]
