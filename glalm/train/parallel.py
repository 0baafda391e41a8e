"""Processes: how they meet, on which devices and in what precision they compute, and how they share a model.

Accelerate reads what the launcher (torchrun, accelerate launch, none) says and gives device, autocast and reductions.
The model is wrapped by torch itself: Accelerate's own wrapping casts outputs to float32 and, for FSDP2, wants the
optimiser with the model.
"""

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

from glalm.config.parallel import ParallelConfig
from glalm.config.run import RunConfig
from glalm.config.strict import ConfigError, require
from glalm.model.precision import has_bf16

# What an Accelerate config file or a flag of `accelerate launch` may set that this loop does itself, otherwise.
FOREIGN = {
    "ACCELERATE_USE_FSDP": "its FSDP; write parallel=fsdp2 or parallel=hsdp",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed; write parallel=fsdp2",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM; write parallel=fsdp2",
    # Its context parallelism reorders the shards of a sequence for softmax attention: a recurrent state is then wrong.
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its parallelism config; write parallel=ddp, fsdp2 or hsdp",
}
MATMUL = {"fp32": "highest", "bf16": "high"}  # float32 matmuls: exact, or in TF32, 3 bits more precise than bf16
REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start_processes(config: RunConfig) -> Accelerator:
    """Joins the processes that the launcher started, and makes this one's device and precision ready.

    Raises ConfigError when the launcher's settings, the processes or the devices do not fit the config.
    """
    refuse_launcher_settings(os.environ)
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if not cpu:
        check_devices(os.environ, torch.cuda.device_count())
    precision = choose_precision(config.train.precision, cpu)
    join_process_group(config.parallel, cpu)
    torch.set_float32_matmul_precision(MATMUL[precision])
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    AcceleratorState._reset_state()  # of the sweep's run before, whose precision may be another
    accelerator = Accelerator(mixed_precision={"fp32": "no", "bf16": "bf16"}[precision], cpu=cpu)
    config.parallel.mesh(accelerator.num_processes, local_world_size())
    return accelerator


def refuse_launcher_settings(environ: dict[str, str]) -> None:
    """Raises ConfigError where Accelerate was told to do otherwise than the config says."""
    for name, what in FOREIGN.items():
        require(
            environ.get(name, "false").lower() not in ("true", "1"),
            f"accelerate launch was told to use {what}, and turn it off in `accelerate config`'s file or the command "
            f"({name})",
        )
    accumulation = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    require(
        accumulation in ("1", "auto"),
        f"accelerate launch --gradient_accumulation_steps={accumulation}: write train.micro_batch_size=N instead",
    )
    dynamo = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    require(dynamo.lower() == "no", f"accelerate launch --dynamo_backend={dynamo}: write train.compile=true instead")
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")  # `no` is what the launcher sets by itself
    require(
        precision in ("no", "bf16"),
        f"accelerate launch --mixed_precision={precision}: write train.precision=bf16 or fp32 instead",
    )


def check_devices(environ: dict[str, str], gpus: int) -> None:
    """Raises ConfigError unless every process has a GPU of its own and knows of the others."""
    local, tasks = int(environ.get("LOCAL_RANK", 0)), int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    require(
        local < gpus,
        f"process {local} of this machine finds {gpus} GPUs: start at most as many processes as GPUs "
        f"(--nproc-per-node={gpus}), or look at CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES', '')}",
    )
    if int(environ.get("WORLD_SIZE", 1)) > 1:
        require("LOCAL_RANK" in environ, "WORLD_SIZE is set but LOCAL_RANK is not; start the processes by torchrun")
    else:  # each of them would train by itself, all in the same folder
        require(tasks == 1, f"srun started {tasks} processes that do not know of each other; start torchrun by srun")


def choose_precision(wanted: str, cpu: bool = False) -> str:
    """`auto` is bf16 where the GPU computes in it and fp32 elsewhere. ConfigError where bf16 is not to be had."""
    gpu = torch.cuda.is_available() and not cpu
    can = has_bf16(torch.device("cuda" if gpu else "cpu"))
    if wanted == "auto":
        return "bf16" if can else "fp32"
    if wanted == "bf16" and gpu and not can:
        raise ConfigError(f"train.precision=bf16: {torch.cuda.get_device_name()} has no bf16; write fp32")
    return wanted


def join_process_group(config: ParallelConfig, cpu: bool) -> None:
    """The process group: NCCL for tensors on GPUs, gloo for those on the host, which wait for no GPU."""
    launched = "WORLD_SIZE" in os.environ
    if dist.is_initialized() or not (launched or config.mode != "ddp"):
        return
    if not cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(
        "gloo" if cpu else "cpu:gloo,cuda:nccl",
        timeout=timedelta(minutes=config.timeout_minutes),
        **({} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}),
    )
    if cpu:  # gloo's threads, left running, abort one process in six as it exits; NCCL's end might wait for the others
        atexit.register(leave_process_group)


def leave_process_group() -> None:
    """Ends the process group of a run that ended well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size() if dist.is_initialized() else 1))


# ------------------------------------------------------------------------------------------------- sharing a model


def parallelize_model(model: nn.Module, config: RunConfig, accelerator: Accelerator) -> nn.Module:
    """The module to train with: `model`, sharded in place, or wrapped. Optimisers are made after it."""
    replicate, shard = config.parallel.mesh(accelerator.num_processes, local_world_size())
    if config.parallel.mode != "ddp":
        return sharded(model, replicate, shard, config.parallel, accelerator)
    if accelerator.num_processes == 1:
        return model
    # torch.compile would cut each block's graph into DDP's buckets; a graph a block is fine enough to overlap with.
    torch._dynamo.config.optimize_ddp = False
    wrapped = DistributedDataParallel(
        model,
        device_ids=[accelerator.device] if accelerator.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=100,  # of float32: a collective for every few blocks
    )
    if config.parallel.reduce_dtype == "bf16":
        wrapped.register_comm_hook(None, sum_in_bf16)
    return wrapped


def sum_in_bf16(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over processes of a bucket's gradients, in place, from copies in bfloat16. torch's hook under another
    name: by its own, torch refuses it without CUDA, though gloo sums bfloat16 as well."""
    return bf16_compress_hook(group, bucket)


def sharded(
    model: nn.Module, replicate: int, shard: int, parallel: ParallelConfig, accelerator: Accelerator
) -> nn.Module:
    """FSDP2 over a mesh [replicate, shard]: each block a unit, embeddings, last norm and head the root's."""
    sizes, names = ((shard,), ("shard",)) if replicate == 1 else ((replicate, shard), ("replicate", "shard"))
    mesh = dist.init_device_mesh(accelerator.device.type, sizes, mesh_dim_names=names)
    # The blocks' weights are gathered in bf16, in which autocast would use them anyway. The root's are not: the
    # embeddings begin the residual stream, which is as precise as under DDP.
    halve = accelerator.mixed_precision == "bf16"
    common = {"reduce_dtype": REDUCE[parallel.reduce_dtype], "cast_forward_inputs": False}
    for block in model.model.layers:
        dtype = torch.bfloat16 if halve and not has_fp32_parameters(block) else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, **common)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=parallel.reshard)
    # The root's last part, the head, is what the backward begins with.
    return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**common), reshard_after_forward=False)


def has_fp32_parameters(block: nn.Module) -> bool:
    """Whether a module of the block computes in float32 with parameters of its own, such as Mamba's A and dt's bias."""
    return any(name.rpartition(".")[2] not in ("weight", "bias") for name, _ in block.named_parameters())


@contextmanager
def no_sync_unless(model: nn.Module, wanted: bool) -> Iterator[None]:
    """In here, a forward and its backward sum the gradients over processes only if `wanted`."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
        yield
    elif isinstance(model, DistributedDataParallel) and not wanted:
        with model.no_sync():
            yield
    else:
        yield


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm over all parameters and processes, on the device, without waiting for it."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def free_gathered_weights(model: nn.Module) -> None:
    """After forwards without a backward: only a backward frees the gathered weights of the root, and of blocks with
    parallel.reshard=false, and until then model.parameters() are these and not the shards that are trained and saved.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
