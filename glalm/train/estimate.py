"""Estimate what a run needs before it spends a GPU hour: parameters, FLOPs, memory, time and disk."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from glalm.config.run import RunConfig
from glalm.config.stages import Phase
from glalm.config.strict import ConfigError, require
from glalm.data.shards import MANIFEST, read_manifest
from glalm.kernels.common import has_bf16
from glalm.model.decoder import CausalLM, model_cost
from glalm.progress import format_seconds
from glalm.train.compile import apply_training_forward, check_compile_limit, is_compiled, list_forward_shapes
from glalm.train.environment import peak_flops
from glalm.train.measured_mfu import expected_mfu
from glalm.train.memory import GIB, ParameterCounts, count_parameters, estimate_memory
from glalm.train.optim import build_optimizers
from glalm.train.run_dir import open_data
from glalm.train.state import BatchPlan, plan_batches
from glalm.train.step_graph import check_graph_support, is_captured
from glalm.train.training_data import TrainingData

ASSUMED_VOCABULARY = 32000  # tokens, where neither the config nor data says how many
ASSUMED_MFU = 0.4  # where no measurement is near
# A twentieth of the memory is reserved for fragmentation and for CUDA itself.
USABLE_MEMORY = 0.95
# What else a run can set against a lack of memory, by its parallel.mode.
SHARD_MORE = {
    "ddp": "with several GPUs parallel=fsdp2, ",
    "hsdp": "parallel=fsdp2, which shards over the GPUs of all machines, ",
    "fsdp2": "more GPUs, ",
}
# Up to 4 epochs change the loss little, and each further one is worth less (Muennighoff et al. 2023, arXiv 2305.16264).
MAX_EPOCHS = 4
MAX_ROWS_PER_TOKEN = 2  # of the embedding; a vocabulary that is padded to a round number has few rows without a token

# What the timing of a model on the CPU may take: operations in a batch, seconds for all batches, parameters.
TIMED_FLOPS = 1e11
TIMED_SECONDS = 3.0
MAX_TIMED_PARAMETERS = 100e6
PLAN_FOR_GPU = "To plan for a GPU, add train.assumed_gpu=H200."


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPU of this machine."""

    name: str
    memory: int  # bytes
    bf16: bool
    is_gpu: bool = True


# The memory that CUDA reports is a bit less than that of the data sheets. Only the H200's has been read from one.
ASSUMED_GPUS = {
    "B200": Device("NVIDIA B200", 178 * GIB, True),
    "H200": Device("NVIDIA H200", 150_109_880_320, True),
    "H100": Device("NVIDIA H100", 79 * GIB, True),
    "A100": Device("NVIDIA A100", 79 * GIB, True),
    "L40S": Device("NVIDIA L40S", 44 * GIB, True),
    "L4": Device("NVIDIA L4", 22 * GIB, True),
}


def current_device() -> Device:
    """Return this process's GPU, or this machine's CPU."""
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(f"CPU with {torch.get_num_threads()} threads", memory, bf16=False, is_gpu=False)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(properties.name, properties.total_memory, has_bf16(torch.device("cuda")))


# --------------------------------------------------------------------------------------------------------------- Report


def dry_run(config: RunConfig, requires_data: bool = False) -> int:
    """Print what the run would need, on the first process, and return 0.

    Args:
        requires_data: Raise if there is no data, as the run would. Otherwise the last line says that it is not checked.

    Raises:
        ConfigError: The batch or the mesh does not fit the number of processes, or the data does not fit the config.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        assumed = config.train.assumed_gpu
        device = ASSUMED_GPUS[assumed] if assumed else current_device()
        require(
            device.is_gpu or config.train.assumed_gpus is None,
            f"train.assumed_gpus={config.train.assumed_gpus} needs a kind of GPU, because this machine has none. Add "
            f"train.assumed_gpu=H200, or another of {', '.join(ASSUMED_GPUS)}.",
        )
        if config.model.vocab_size is None:
            config.model.vocab_size, origin = find_vocabulary(config)
            print(f"vocabulary    {origin}")
        world_size = config.train.assumed_gpus or int(os.environ.get("WORLD_SIZE", 1))
        for line in describe_needs(config, world_size, device, requires_data):
            print(line, flush=True)
    return 0


def estimate_hours_and_memory(config: RunConfig) -> tuple[float | None, int]:
    """Return the hours that a run takes on one device, and the bytes of its memory.

    The device is train.assumed_gpu, or this machine's. Hours are None where the speed is not known. A model.vocab_size
    of null becomes that of the data.
    """
    device = ASSUMED_GPUS[config.train.assumed_gpu] if config.train.assumed_gpu else current_device()
    if config.model.vocab_size is None:
        config.model.vocab_size, _ = find_vocabulary(config)
    costs = phase_costs(config, 1)
    hours = None
    if device.is_gpu and (peak := peak_flops(device.name)) is not None:
        hours = sum(cost.flops for cost in costs) / (peak * average_mfu(costs, device)[0]) / 3600
    elif not device.is_gpu and count_parameters(config).total <= MAX_TIMED_PARAMETERS:
        hours = measure_cpu_hours(costs)
    return hours, sum(_estimate_memory_of_run(config, costs, device)[0].values())


@dataclass(frozen=True)
class PhaseCost:
    """What a phase of a run costs."""

    phase: Phase
    plan: BatchPlan
    flops_per_token: int  # forward and backward
    parameters: int

    @property
    def flops(self) -> int:
        return self.flops_per_token * self.phase.tokens


def phase_costs(config: RunConfig, world_size: int) -> list[PhaseCost]:
    """Return the costs of the phases of a run on `world_size` processes. Raises ConfigError as `plan_batches` does."""
    costs = []
    for phase, plan in zip(config.phases, plan_batches(config, world_size), strict=True):
        cost = model_cost(config.model, plan.seq_len)
        costs.append(PhaseCost(phase, plan, cost.training, cost.parameters))
    return costs


def average_mfu(costs: list[PhaseCost], gpu: Device) -> tuple[float, str]:
    """Return the share of the GPU's peak that all phases together are expected to reach, and what that is based on."""
    config = costs[0].phase.config
    if config.train.assumed_mfu is not None:
        return config.train.assumed_mfu, "train.assumed_mfu"
    seconds = 0.0  # at a peak of 1 FLOP/s
    for cost in costs:
        mfu = expected_mfu(config.model.layer_mixers(), cost.parameters, cost.plan.seq_len, gpu.name)
        if mfu is None:
            return ASSUMED_MFU, "assumed; set train.assumed_mfu to what a run reaches"
        seconds += cost.flops / mfu
    return sum(cost.flops for cost in costs) / seconds, "as measured; train.assumed_mfu sets another"


def find_vocabulary(config: RunConfig) -> tuple[int, str]:
    """Return the size of the data's vocabulary, or ASSUMED_VOCABULARY, and a sentence on where it comes from."""
    try:
        size = read_manifest(Path(config.data.path))["tokenizer"]["vocab_size"]
        return size, f"{size:,} tokens, those of {config.data.path}"
    except (OSError, ValueError) as error:
        assumed = f"{ASSUMED_VOCABULARY:,} tokens are assumed, because model.vocab_size is null and {error}"
        return ASSUMED_VOCABULARY, assumed


def describe_needs(config: RunConfig, world_size: int, device: Device, requires_data: bool = False) -> Iterator[str]:
    """Yield the lines of the report of `dry_run`, with its `requires_data`, for `world_size` devices like `device`."""
    training = None
    unchecked = ""
    try:
        training, _ = open_data(config)
    except ConfigError as error:
        if requires_data or (Path(config.data.path) / MANIFEST).exists():
            raise
        unchecked = f"WARNING: data and vocabulary have not been checked. {error}"
    costs = phase_costs(config, world_size)
    plans = [cost.plan for cost in costs]
    check_compile_limit(config, plans, device.is_gpu)
    check_graph_support(config, world_size, device.is_gpu)
    counts = count_parameters(config)
    tokens = sum(cost.phase.tokens for cost in costs)
    flops = sum(cost.flops for cost in costs)
    assert config.model.vocab_size is not None  # The model has been built.
    embeddings = config.model.vocab_size * config.model.hidden_size * (1 if config.model.tie_word_embeddings else 2)
    where = "assumed" if config.train.assumed_gpu else "of this machine"
    advice = "" if device.is_gpu else f". {PLAN_FOR_GPU}"
    yield f"planned for   {world_size} x {device.name} ({device.memory / GIB:.1f} GiB), {where}{advice}"
    yield f"parameters    {counts.total:,}; {counts.total - embeddings:,} without embeddings and head"
    for cost in costs:
        yield from describe_phase(cost, device, share=cost.flops / flops)
    shapes = [f"{shape} at step {step:,}" for shape, step in list_forward_shapes(config, plans).items()]
    if len(shapes) > 1 and is_compiled(config.train, device.is_gpu):
        yield f"compilation   the blocks are compiled at the first forward pass of each shape: {', '.join(shapes)}"
    yield f"steps         {config.steps:,} ({tokens:,} tokens), warm-up over the first {config.warmup_steps:,}"
    yield from describe_missing_data(config, tokens) if training is None else describe_data(config, training)
    yield from describe_resources(config, world_size, device, costs, counts)
    if unchecked:
        yield unchecked


def describe_resources(
    config: RunConfig, world_size: int, device: Device, costs: list[PhaseCost], counts: ParameterCounts
) -> Iterator[str]:
    """Yield the lines on checkpoints, on time, and on the memory of devices and hosts."""
    checkpoint_size = 4 * (counts.total + counts.moments + counts.averages)
    yield from describe_checkpoints(config, checkpoint_size)
    tokens = sum(cost.phase.tokens for cost in costs)
    if device.is_gpu:
        flops_per_token = sum(cost.flops for cost in costs) / tokens
        mfu, basis = average_mfu(costs, device)
        time_needed = describe_time(config, world_size, device, flops_per_token, tokens, mfu, basis)
    elif counts.total > MAX_TIMED_PARAMETERS:
        time_needed = f"not measured, because training a model of this size on a CPU takes too long. {PLAN_FOR_GPU}"
    else:
        hours = measure_cpu_hours(costs)
        speed = f"{tokens / hours / 3600:,.0f} tokens/s, which a few batches took now on this machine"
        time_needed = f"{format_seconds(3600 * hours)}, at {speed}"
    yield f"time          {time_needed}"
    parts, description = _estimate_memory_of_run(config, costs, device)
    yield f"memory        {description}"
    if sum(parts.values()) > USABLE_MEMORY * device.memory:
        yield f"WARNING: more than the {device.memory / GIB:.1f} GiB of {device.name}. {advise_memory(config)}"
    if device.is_gpu:
        yield "host memory   " + describe_host_memory(config, world_size, 4 * counts.total, checkpoint_size)


def describe_phase(cost: PhaseCost, device: Device, share: float) -> Iterator[str]:
    """Yield the lines of a phase, which has this share of the run's operations."""
    phase = cost.phase
    plan = cost.plan
    if phase.stage:
        yield (
            f"stage         {phase.stage}: steps {phase.start_step + 1:,} to {phase.end_step:,}, "
            f"{phase.tokens:,} tokens, {share:.1%} of the operations"
        )
    operations = f"{cost.flops_per_token / 1e9:.2f} GFLOP per token"
    yield f"operations    {operations}, forward and backward, at length {plan.seq_len}"
    shard = f" of {plan.shard_length:,} tokens to a process" if plan.context_parallel > 1 else ""
    mode = f", {phase.config.parallel.mode}" if plan.world_size > 1 else ""
    yield (
        f"batch         {plan.global_batch} x {plan.seq_len} = {plan.tokens_per_step:,} tokens: {plan.world_size} x "
        f"{device.name}, each {plan.accumulation} micro-batch{'es' if plan.accumulation > 1 else ''} of "
        f"{plan.micro_batch} sequence{'s' if plan.micro_batch > 1 else ''}{shard}{mode}"
    )


def describe_missing_data(config: RunConfig, tokens: int) -> Iterator[str]:
    """Yield the size that data of `tokens` tokens would have."""
    assert config.model.vocab_size is not None  # The model has been built.
    width = 2 if config.model.vocab_size <= 2**16 else 4
    yield (
        f"data          {width * tokens / 1e9:.2f} GB for tokens that are read once, at {width} bytes per token of "
        f"a vocabulary of {config.model.vocab_size:,}"
    )


def describe_data(config: RunConfig, training: TrainingData) -> Iterator[str]:
    """Yield the data's size, and warnings where it is read often or has a small part of the model's vocabulary."""
    folder = Path(config.data.path)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    vocabulary = training.tokens.vocab_size
    read = sum(reading.phase.tokens / reading.windows.length / len(reading.windows) for reading in training.phases)
    yield (
        f"data          {folder}: {training.tokens.num_tokens:,} tokens for training, read {format_epochs(read)} "
        f"times, and a vocabulary of {vocabulary:,}; {size / 1e9:.2f} GB"
    )
    epochs = count_epochs(training)
    most_read = max(epochs, key=epochs.__getitem__)
    if epochs[most_read] > MAX_EPOCHS:
        name = "its data" if len({*epochs.values()}) == 1 else f"the source {most_read}"
        fitting = int(sum(reading.phase.tokens for reading in training.phases) * MAX_EPOCHS / epochs[most_read])
        keys = f"by {'' if config.train.steps is None else 'train.steps=null '}train.tokens={fitting}"
        if config.train.stages is not None and config.train.tokens is None:
            keys = "by lower tokens of train.stages"
        yield (
            f"WARNING: the run reads {name} {format_epochs(epochs[most_read])} times. Beyond {MAX_EPOCHS} times, "
            "each further one teaches less (arXiv 2305.16264). Prepare more text, or train on at most "
            f"{fitting:,} tokens, {keys}."
        )
    rows = config.model.vocab_size
    assert rows is not None  # The data has set it.
    if rows > MAX_ROWS_PER_TOKEN * vocabulary:
        yield (
            f"WARNING: the model has embeddings for {rows:,} tokens, but the data's vocabulary has {vocabulary:,}. The "
            "others take memory and time and learn nothing. Write model.vocab_size=null for the data's vocabulary, or "
            f"prepare the data with a larger one, by --vocab-size {rows} or --tokenizer."
        )


def count_epochs(training: TrainingData) -> dict[str, float]:
    """Return how many times a run reads each source."""
    epochs = dict.fromkeys(training.tokens.source_tokens, 0.0)
    for reading in training.phases:
        phase = reading.phase
        if reading.order.weights is None:
            read = phase.tokens / reading.windows.length / len(reading.windows)
            epochs = {source: before + read for source, before in epochs.items()}
            continue
        for source, count in reading.order.count_windows(phase.start_step, phase.end_step).items():
            epochs[source] += count / max(1, reading.windows.source_windows[source])
    return epochs


def format_epochs(epochs: float) -> str:
    return f"{epochs:,.2f}" if epochs < 10 else f"{epochs:,.0f}"


def describe_checkpoints(config: RunConfig, size: int) -> Iterator[str]:
    options = config.train.checkpoint
    saved = sorted({*range(options.every, config.steps, options.every), *config.stage_ends})
    newest = {*saved[-options.keep_last :]}
    ends = config.stage_ends - newest
    multiples = {step for step in saved if options.keep_every and step % options.keep_every == 0} - ends - newest
    best = min(options.keep_best, len(saved) - len(newest) - len(ends) - len(multiples))
    others = {"at ends of stages": len(ends), "by keep_every": len(multiples), "by keep_best": best}
    of_others = "".join(f", {count:,} {which}" for which, count in others.items() if count)
    kept = len(newest) + sum(others.values())
    # An older checkpoint is removed after the new one is complete.
    is_removing = len(saved) > kept
    needed = size * (kept + is_removing)
    of_new = " and one that is being saved" if is_removing else ""
    folder = config.folder.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    yield (
        f"checkpoints   {size / 1e9:.2f} GB each, {needed / 1e9:.1f} GB for the newest {len(newest)}{of_others}"
        f"{of_new}; {config.runs_dir} has {free / 1e9:.1f} GB free here"
    )
    if needed > free:
        yield "WARNING: that is not enough here. Free some space, or choose another runs_dir=..."


def describe_host_memory(config: RunConfig, world_size: int, weights: int, checkpoint: int) -> str:
    """Return the host memory of a machine: each process builds the model there, and later copies its part of a save."""
    local = _local_world_size(world_size)
    copies = checkpoint * local // world_size if config.train.checkpoint.asynchronous else 0
    needed = max(local * weights, copies)
    processes = "process" if local == 1 else "processes"
    return (
        f"{needed / GIB:.1f} GiB per machine with {local} {processes}, besides what Python and CUDA take in each: "
        f"{local * weights / GIB:.1f} while the model is built, later {copies / GIB:.1f} for the copy of a checkpoint"
    )


def explain_out_of_memory(config: RunConfig, world_size: int) -> str:
    """Return an error message for a run of `world_size` processes whose GPU is out of memory."""
    gpu = current_device()
    parts, estimate = _estimate_memory_of_run(config, phase_costs(config, world_size), gpu)
    graphs = ""
    if "validation" in parts:
        graphs = " If that happened between steps, train.cuda_graph=false lets validation use the memory of steps."
    return (
        f"{gpu.name} with {gpu.memory / GIB:.1f} GiB is out of memory. The estimate was {estimate}. "
        f"{advise_memory(config)}{graphs}"
    )


def advise_memory(config: RunConfig) -> str:
    """Return what a run without enough memory can set."""
    of_stages = "" if config.train.stages is None else " Where a stage has such a key of its own, set that."
    return (
        "Set a smaller train.micro_batch_size (the batch size stays the same), train.activation_checkpointing=full, "
        f"train.tbptt_length, or {SHARD_MORE[config.parallel.mode]}and for long sequences parallel.context=N."
        f"{of_stages}"
    )


def describe_time(
    config: RunConfig, world_size: int, gpu: Device, flops_per_token: float, tokens: int, mfu: float, basis: str
) -> str:
    """Return the hours and the costs at `mfu` of the GPU's peak. `basis` says where this share comes from."""
    peak = peak_flops(gpu.name)
    if peak is None:
        return f"not estimated, because the peak of {gpu.name} is unknown. For another GPU, add train.assumed_gpu=H200"
    tokens_per_second = peak * mfu / flops_per_token
    hours = tokens / (tokens_per_second * world_size) / 3600
    gpu_hours = hours * world_size
    price = config.train.assumed_price
    cost = f" for {gpu_hours * price:,.0f} at {price:g} an hour" if price else ""
    return (
        f"{format_seconds(3600 * hours)}, {gpu_hours:,.{1 if gpu_hours < 10 else 0}f} GPU hours{cost}, at {mfu:.0%} of "
        f"the GPU's {peak / 1e12:.0f} TFLOP/s ({basis}): {tokens_per_second:,.0f} tokens/s per GPU"
    )


def measure_cpu_hours(costs: list[PhaseCost]) -> float:
    """Return how long a run takes on the CPU. Each shape of its forward passes is timed."""
    speeds: dict[tuple[int, int], float] = {}
    hours = 0.0
    for cost in costs:
        shape = (cost.plan.micro_batch, cost.plan.segment_length)
        if shape not in speeds:
            speeds[shape] = measure_cpu_speed(cost.phase.config, cost.plan, cost.flops_per_token)
        hours += cost.phase.tokens / speeds[shape] / 3600
    return hours


def measure_cpu_speed(config: RunConfig, plan: BatchPlan, flops_per_token: float) -> float:
    """Train on random tokens for TIMED_SECONDS, on the CPU, and return tokens per second.

    The processes of a run on one CPU share its cores, so this is their speed together.
    """
    model = CausalLM(config.model)
    apply_training_forward(model, config.train, torch.device("cpu"))
    optimizers = build_optimizers(model, config.optim)
    most_tokens = max(64, int(TIMED_FLOPS / flops_per_token))
    length = min(plan.segment_length, most_tokens)
    ids = torch.randint(model.model.embeddings.num_embeddings, (min(plan.micro_batch, most_tokens // length), length))

    def time_batch() -> float:
        start = time.perf_counter()
        model(ids, shift_labels=ids).loss.backward()
        return time.perf_counter() - start

    time_batch()  # The first one allocates memory.
    times = [time_batch()]
    while sum(times) < TIMED_SECONDS:
        times.append(time_batch())
    start = time.perf_counter()
    for optimizer in optimizers:
        optimizer.step()
    update = (time.perf_counter() - start) * ids.numel() / plan.tokens_per_step
    return ids.numel() / (sum(times) / len(times) + update)


def _local_world_size(world_size: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", min(world_size, 8)))


def _estimate_memory_of_run(config: RunConfig, costs: list[PhaseCost], device: Device) -> tuple[dict[str, int], str]:
    """Return the bytes on each device at the peak of a run, by part, and a description of them."""
    # The phase whose forward passes have the most tokens has the largest activations.
    largest = max(costs, key=lambda cost: cost.plan.micro_batch * cost.plan.shard_length)
    plan = largest.plan
    bf16 = device.bf16 and config.train.precision != "fp32"
    compiled = is_compiled(config.train, device.is_gpu)
    captured = is_captured(config, plan.world_size, device.is_gpu)
    local = _local_world_size(plan.world_size)
    parts = estimate_memory(largest.phase.config, plan, local, bf16, compiled, captured, device.is_gpu)
    where = f" in stage {largest.phase.stage}" if largest.phase.stage else ""
    each = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    return parts, f"{sum(parts.values()) / GIB:.1f} GiB per process{where}: {each}"
