"""Processes and devices: join the process group, choose the precision, and shard or replicate the model.

Accelerate reads the launcher's environment (torchrun, accelerate launch, or none) and provides the device, autocast and
reductions. torch wraps the model: Accelerate's own wrapping casts outputs to float32 and, for FSDP2, needs the
optimizer together with the model.
"""

import atexit
import functools
import logging
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from glalm.config.run import ParallelConfig, RunConfig, count_groups
from glalm.config.strict import ConfigError, require
from glalm.data.processes import call_without_parent
from glalm.kernels.common import has_bf16
from glalm.kernels.context_parallel import ContextShard
from glalm.model.decoder import CausalLM
from glalm.train.collectives import rank_and_world_size
from glalm.train.flight_recorder import enable_flight_recorder

logger = logging.getLogger(__name__)

# What `accelerate launch` or the file of `accelerate config` may set, although the config decides it: the values that
# do no harm, the default first, and what to use instead.
OFF = ("false", "0", "no", "off", "")
LAUNCHER_SETTINGS = {
    "ACCELERATE_USE_FSDP": (OFF, "parallel=fsdp2 or parallel=hsdp"),
    "ACCELERATE_USE_DEEPSPEED": (OFF, "parallel=fsdp2"),
    "ACCELERATE_USE_MEGATRON_LM": (OFF, "parallel=fsdp2"),
    # Accelerate's context parallelism reorders the shards of a sequence, which softmax attention allows. A recurrent
    # state would be wrong.
    "ACCELERATE_USE_PARALLELISM_CONFIG": (OFF, "parallel=ddp, fsdp2 or hsdp"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1", "auto"), "train.micro_batch_size=N"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "train.compile=true"),
    "ACCELERATE_MIXED_PRECISION": (("no", "bf16"), "train.precision=bf16 or fp32"),
}
LAUNCHER_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16"}
# The precision of float32 matmuls: exact, or TF32, which still has 3 more bits of precision than bfloat16.
FP32_MATMUL_PRECISION = {"fp32": "highest", "bf16": "high"}
REDUCE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
DDP_BUCKET_MIB = 100  # One collective per few blocks.


def start_processes(config: RunConfig) -> Accelerator:
    """Join the processes that the launcher started, and set this one's device and precision.

    Raises:
        ConfigError: The launcher's settings, the number of processes or the devices contradict the config.
    """
    refuse_launcher_settings(os.environ)
    stop_with_launcher()
    if not is_launched(os.environ):
        os.environ.pop("LOCAL_RANK", None)  # Accelerate takes it for a launcher.
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if not use_cpu:
        check_devices(os.environ, torch.cuda.device_count())
    precision = choose_precision(config.train.precision, torch.device("cpu" if use_cpu else "cuda"), "train.precision")
    enable_flight_recorder(config.folder, os.environ)
    # FSDP2 and HSDP need a process group even for one process.
    join_process_group(use_cpu, config.parallel.timeout_minutes, always=config.parallel.mode != "ddp")
    torch.set_float32_matmul_precision(FP32_MATMUL_PRECISION[precision])
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    # Accelerate caches its state per process. The runs of a sweep share a process, but not a precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=ACCELERATE_PRECISION[precision], cpu=use_cpu)
    config.parallel.mesh(accelerator.num_processes, local_world_size())  # Raises if the mesh does not fit.
    return accelerator


def choose_precision(wanted: str, device: torch.device, key: str = "precision") -> str:
    """Return "bf16" or "fp32" for the config key `key`. "auto" is bf16 on GPUs with bfloat16, and fp32 elsewhere.

    Raises ConfigError if bf16 is wanted on a GPU that would emulate it.
    """
    if wanted == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if wanted == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise ConfigError(f"{key}=bf16: {torch.cuda.get_device_name(device)} has no bfloat16. Use {key}=fp32.")
    return wanted


def refuse_launcher_settings(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if `accelerate launch` was told to do something that the config decides."""
    for name, (harmless, instead) in LAUNCHER_SETTINGS.items():
        value = environ.get(name, harmless[0])
        require(
            value.lower() in harmless,
            f"accelerate launch has set {name}={value}, which has no effect. Use {instead} instead, and remove the "
            "setting from the command or from the file of `accelerate config`.",
        )


@functools.cache  # The runs of a sweep share a process.
def stop_with_launcher() -> None:
    """Send this process SIGTERM once the launcher that started it has been killed, so that it does not train on."""

    def stop() -> None:
        logger.info("The launcher of this process has ended.")
        os.kill(os.getpid(), signal.SIGTERM)

    # torchrun sets the first, and `accelerate launch` of one process the second. Of its variables, this is one that a
    # container or a shell, which the process may outlive, does not set as well.
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"} & os.environ.keys():
        call_without_parent(stop)


def check_devices(environ: Mapping[str, str], gpu_count: int) -> None:
    """Raise ConfigError unless every process has a GPU of its own and the processes know of each other."""
    local_rank = int(environ.get("LOCAL_RANK", 0))
    require(
        local_rank < gpu_count,
        f"Process {local_rank} of this machine has no GPU: {gpu_count} are visible. Start at most as many processes as "
        f"GPUs (--nproc-per-node={gpu_count}), or check CUDA_VISIBLE_DEVICES="
        f"{environ.get('CUDA_VISIBLE_DEVICES', '')}",
    )
    if int(environ.get("WORLD_SIZE", 1)) > 1:
        require("LOCAL_RANK" in environ, "WORLD_SIZE is set but LOCAL_RANK is not. Start the processes with torchrun.")
        return
    # Without WORLD_SIZE, each of srun's tasks would train by itself, and all of them in the same folder.
    slurm_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    require(
        slurm_tasks == 1,
        f"srun started {slurm_tasks} processes that do not know of each other. Let srun start torchrun.",
    )


def is_launched(environ: Mapping[str, str]) -> bool:
    """Return whether a launcher such as torchrun started this process.

    Clusters and containers set some of its variables, too. This process is alone then, if WORLD_SIZE is 1.

    Raises:
        ConfigError: WORLD_SIZE is not 1, and another variable is not set.
    """
    world_size = environ.get("WORLD_SIZE", "1")
    missing = [name for name in LAUNCHER_VARIABLES if name not in environ]
    require(
        world_size == "1" or not missing,
        f"WORLD_SIZE={world_size} is set without {', '.join(missing)}. Start the processes with torchrun. To start one "
        "process, unset WORLD_SIZE.",
    )
    return not missing


def join_process_group(use_cpu: bool, timeout_minutes: float = 30.0, always: bool = False) -> None:
    """Initialize torch.distributed, with NCCL for tensors on GPUs and gloo for tensors on the host.

    Host values are reduced over gloo so that this does not wait for the GPU.

    Args:
        use_cpu: Use gloo only.
        timeout_minutes: A collective that waits longer fails.
        always: Form a group of one process if no launcher started this process.
    """
    launched = is_launched(os.environ)
    if dist.is_initialized() or not (launched or always):
        return
    if not use_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "gloo" if use_cpu else "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=timeout_minutes)
    if launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    if use_cpu:
        # Without this, gloo's threads abort one process in six at exit. NCCL's teardown is left to the entry point,
        # because it may wait for processes that have failed.
        atexit.register(leave_process_group)


def leave_process_group() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def find_context_shard(context: int, device: torch.device) -> ContextShard | None:
    """Return which shard of its sequences this process has, if `context` processes share them, else None.

    They are neighbours: processes 0 to context - 1, and so on.

    Raises:
        ConfigError: `context` does not divide the number of processes.
    """
    groups = count_groups(context, rank_and_world_size()[1])
    if context == 1:
        return None
    mesh = dist.init_device_mesh(device.type, (groups, context), mesh_dim_names=("data", "context"))
    return ContextShard(mesh.get_group("context").group_name, mesh.get_local_rank("context"), context)


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size() if dist.is_initialized() else 1))


def parallelize_model(model: CausalLM, config: RunConfig, accelerator: Accelerator) -> nn.Module:
    """Return the module to train with: `model` itself, sharded in place, or its DDP wrapper.

    Build the optimizers afterwards, because sharding replaces the parameters.
    """
    if config.parallel.mode != "ddp":
        return _shard_fsdp2(model, config.parallel, accelerator)
    if accelerator.num_processes == 1:
        return model
    # Dynamo would split each block's graph at DDP's bucket boundaries. One graph per block overlaps well enough.
    torch._dynamo.config.optimize_ddp = False
    wrapped = DistributedDataParallel(
        model,
        device_ids=[accelerator.device] if accelerator.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=DDP_BUCKET_MIB,
    )
    if config.parallel.reduce_dtype == "bf16":
        wrapped.register_comm_hook(None, reduce_in_bf16)
    return wrapped


def reduce_in_bf16(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over processes in bfloat16.

    Without CUDA, torch refuses bf16_compress_hook by its name, although gloo can reduce bfloat16: hence another name.
    """
    return bf16_compress_hook(group, bucket)


def _shard_fsdp2(model: CausalLM, config: ParallelConfig, accelerator: Accelerator) -> nn.Module:
    """Apply FSDP2 over a mesh [replicate, shard]: one unit per block, the rest of the model in the root unit."""
    replicate, shard = config.mesh(accelerator.num_processes, local_world_size())
    sizes = {"shard": shard} if replicate == 1 else {"replicate": replicate, "shard": shard}
    mesh = dist.init_device_mesh(accelerator.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    root_policy = MixedPrecisionPolicy(reduce_dtype=REDUCE_DTYPE[config.reduce_dtype], cast_forward_inputs=False)
    for block in model.model.layers:
        # Autocast would cast the blocks' weights to bfloat16 anyway, so they are gathered in bfloat16.
        gather_in_bf16 = accelerator.mixed_precision == "bf16" and not has_fp32_parameters(block)
        policy = replace(root_policy, param_dtype=torch.bfloat16 if gather_in_bf16 else None)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard)
    # The root's weights stay in float32, because the embeddings start the residual stream, which has DDP's precision.
    # They stay gathered after the forward pass, because the backward pass begins with the head.
    fully_shard(model, mesh=mesh, mp_policy=root_policy, reshard_after_forward=False)
    return model


def has_fp32_parameters(block: nn.Module) -> bool:
    """Return whether the block computes with float32 parameters under autocast, such as Mamba's A_log and dt_bias.

    Those are all parameters that are neither the weight nor the bias of a layer.
    """
    return any(name.rpartition(".")[2] not in ("weight", "bias") for name, _ in block.named_parameters())


@contextmanager
def no_sync_unless(sync: bool, module: nn.Module) -> Iterator[None]:
    """Within the `with` statement, let backward passes reduce gradients over processes only if `sync`."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(sync)
        yield
    elif isinstance(module, DistributedDataParallel) and not sync:
        with module.no_sync():
            yield
    else:
        yield


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the gradient's norm over all parameters and processes, as a scalar on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def free_gathered_weights(module: nn.Module) -> None:
    """Return FSDP2's modules to their shards after a forward pass without a backward pass.

    Only a backward pass frees the gathered weights of the root, and of the blocks with parallel.reshard=false. Until
    then module.parameters() are the gathered weights, not the shards that are trained and saved.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()
