"""BatchPlan and TrainState: how a step's batch is divided, and everything that a step changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from glalm.config.run import RunConfig, count_groups, format_set_key
from glalm.config.strict import ConfigError, require
from glalm.model.decoder import CausalLM
from glalm.train import random_states
from glalm.train.averaging import WeightAverage
from glalm.train.guards import UpdateGuard

ADAMW_STATE_KEYS = {"step", "exp_avg", "exp_avg_sq"}  # What torch's AdamW holds of each parameter.


@dataclass(frozen=True)
class BatchPlan:
    """How the processes of a run divide the batch of one optimizer step.

    A process takes an equal share of the sequences of the global batch, runs them as `accumulation` micro-batches of
    `micro_batch` sequences, and each micro-batch as `segments` consecutive pieces of `segment_length` tokens. Of each
    piece it has `shard_length` tokens, if several processes share the sequences.
    """

    global_batch: int  # sequences per optimizer step, over all processes
    seq_len: int  # tokens per sequence
    data_parallel: int  # groups of processes that read different sequences
    context_parallel: int  # processes that share the tokens of one sequence
    micro_batch: int  # sequences per forward pass
    accumulation: int  # micro-batches per process and optimizer step
    segments: int  # pieces of a sequence that are backpropagated one after the other (truncated BPTT)

    @classmethod
    def from_config(cls, config: RunConfig, world_size: int) -> "BatchPlan":
        """Divide the batch of `config` over `world_size` processes.

        The micro-batch is the largest divisor of a process's share that is at most train.micro_batch_size.

        Raises:
            ConfigError: parallel.context does not divide the number of processes, or the batch size is not a multiple
                of the number of groups of processes that share sequences.
        """
        context = config.parallel.context
        batch = config.batch_size
        groups = count_groups(context, world_size)
        key = format_set_key(config.train, "train", "batch_size", "batch_tokens")
        over = f"{groups} processes" if context == 1 else f"{groups} groups of {context} processes (parallel.context)"
        require(
            batch % groups == 0,
            f"{key} is {batch} sequences, which cannot be divided evenly over {over}. Choose a multiple of {groups}, "
            f"or start a number of {'processes' if context == 1 else 'groups'} that divides {batch}.",
        )
        share = batch // groups
        limit = min(share, config.train.micro_batch_size or share)
        micro_batch = next(size for size in range(limit, 0, -1) if share % size == 0)
        return cls(
            global_batch=batch,
            seq_len=config.data.seq_len,
            data_parallel=groups,
            context_parallel=context,
            micro_batch=micro_batch,
            accumulation=share // micro_batch,
            segments=config.data.seq_len // (config.train.tbptt_length or config.data.seq_len),
        )

    @property
    def segment_length(self) -> int:
        """Tokens of a sequence in one forward pass, over the processes that share it."""
        return self.seq_len // self.segments

    @property
    def shard_length(self) -> int:
        """Tokens of a sequence in one forward pass of one process."""
        return self.segment_length // self.context_parallel

    @property
    def world_size(self) -> int:
        return self.data_parallel * self.context_parallel

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len


def plan_batches(config: RunConfig, world_size: int) -> list[BatchPlan]:
    """Return how the batch of each phase of a run is divided.

    Raises:
        ConfigError: The batch of a phase cannot be divided. The message names its stage.
    """
    plans = []
    for phase in config.phases:
        try:
            plans.append(BatchPlan.from_config(phase.config, world_size))
        except ConfigError as error:
            of_stage = f"In train.stages.{phase.stage}, whose keys and schedules replace those of train: "
            raise ConfigError(f"{of_stage if phase.stage else ''}{error}") from error
    return plans


@dataclass
class TrainState:
    """Everything that an optimizer step changes. A checkpoint holds all of it.

    `Trainer.step` changes it. glalm.train.checkpoint saves what `state_dict` returns.
    """

    model: CausalLM
    optimizers: list[Optimizer]
    guard: UpdateGuard | None = None
    average: WeightAverage | None = None
    step: int = 0  # optimizer steps taken, skipped ones included
    tokens: int = 0  # tokens trained on, over all processes

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and live tensors, not copies.

        Returns:
            The tree below. Parameters and the optimizer's moments may be DTensors.

                {"step": int, "tokens": int,
                 "model": {parameter name: Tensor},
                 "average": {"average.<parameter name>": Tensor}, empty if there is none,
                 "training": {"optim.<key>.<parameter name>": Tensor, "guard.<name>": Tensor},
                 "random_states": {generator: uint8 Tensor}, of this process alone}
        """
        parameters = dict(self.model.named_parameters())
        training = {}
        for name, parameter in parameters.items():
            for optimizer in self.optimizers:
                for key, tensor in sorted(optimizer.state.get(parameter, {}).items()):
                    training[f"optim.{key}.{name}"] = tensor
        if self.guard is not None:
            training |= {f"guard.{name}": tensor for name, tensor in self.guard.state_dict().items()}
        average = {}
        if self.average is not None:
            average = {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "model": parameters,
            "average": average,
            "training": training,
            "random_states": random_states.get_random_states(),
        }

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set this state to `saved`, as `state_dict` returns it. Except for step and tokens, what it lacks is kept.

        A checkpoint's tensors are read in place instead, so that no second copy of them is in memory.
        """
        self.step = saved["step"]
        self.tokens = saved["tokens"]
        training = saved.get("training", {})
        self.allocate_optimizer_state({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in training.items()})
        live = self.state_dict()
        for kind in ("model", "average"):
            for name, tensor in saved.get(kind, {}).items():
                live[kind][name].copy_(tensor)
        for name, tensor in training.items():
            live["training"][name].copy_(tensor)
        if "random_states" in saved:
            random_states.restore_random_states(saved["random_states"])

    def allocate_optimizer_state(self, stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Create the optimizers' state tensors, which do not exist before the first step, so they can be read in place.

        A parameter whose optimizer was another one gets none: its optimizer creates them in the next step.

        Args:
            stored: {"optim.<key>.<parameter name>": (global shape, dtype)}. Other names are ignored.

        Raises:
            KeyError: A tensor belongs to a parameter that is not trained now. The argument is the parameter's name.
        """
        parameters = {parameter: name for name, parameter in self.model.named_parameters()}
        owners: dict[str, tuple[nn.Parameter, Optimizer, dict]] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                owners |= {parameters[parameter]: (parameter, optimizer, group) for parameter in group["params"]}
        for full_name, (shape, dtype) in stored.items():
            if not full_name.startswith("optim."):
                continue
            _, key, name = full_name.split(".", 2)
            parameter, optimizer, group = owners[name]
            if key not in getattr(optimizer, "state_keys", ADAMW_STATE_KEYS):
                continue
            if shape == tuple(parameter.shape):
                tensor = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            elif len(shape) == 2 and shape == (len(parameter), 1):  # NorMuon's numbers of each row
                tensor = torch.zeros_like(parameter[:, :1].detach(), dtype=dtype)
            else:
                # A step count. Fused and capturable optimizers keep it on the parameter's device, others on the CPU.
                on_device = group.get("fused") or group.get("capturable")
                tensor = torch.zeros(shape, dtype=dtype, device=parameter.device if on_device else "cpu")
            optimizer.state[parameter][key] = tensor
