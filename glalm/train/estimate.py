"""What a run will need, before any GPU hour is spent: parameters, operations, memory, time, disk."""

import dataclasses
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glalm.config.run import RunConfig, TrainConfig
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.model.flops import model_cost
from glalm.model.loss import CHUNK_ELEMENTS
from glalm.model.precision import has_bf16
from glalm.train.compile import prepare_block_forwards
from glalm.train.environment import peak_flops
from glalm.train.optim import build_optimizers
from glalm.train.state import BatchPlan

GIB = 2**30
LENGTHS = (128, 256)  # tokens of the two traces by which a block's activations are measured


class Device(NamedTuple):
    name: str
    memory: int  # bytes
    bf16: bool


class Sizes(NamedTuple):
    """Numbers of parameters, each counted once."""

    total: int
    blocks: int  # of all blocks
    largest: int  # of the largest block
    moments: int  # numbers that the optimisers keep


class Kept(NamedTuple):
    """Bytes that a block keeps for its backward."""

    token: float  # for each token
    fixed: float  # whatever the number of tokens: its weights in bfloat16


def device_here() -> Device:
    """This process's GPU; without one, an H200, so that runs can be planned anywhere."""
    if not torch.cuda.is_available():
        return Device("NVIDIA H200", 150_109_880_320, True)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(properties.name, properties.total_memory, has_bf16(torch.device("cuda")))


def sizes(config: RunConfig) -> Sizes:
    with torch.device("meta"):
        model = CausalLM(config.model)
    blocks = [_numel(block) for block in model.model.layers]
    moments = {"Muon": 1, "AdamW": 2}
    kept = sum(
        moments[type(optimizer).__name__] * p.numel()
        for optimizer in build_optimizers(model, config.optim)
        for group in optimizer.param_groups
        for p in group["params"]
    )
    return Sizes(_numel(model), sum(blocks), max(blocks), kept)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def memory(config: RunConfig, world: int, local_world: int, bf16: bool, compiled: bool) -> dict[str, int]:
    """Bytes on each GPU by part, at the peak of a step; their sum is the estimate.

    The parts do not all peak at the same moment, and kernels' workspaces are left out. Raises ConfigError where the
    batch or the mesh does not fit `world`.
    """
    plan = BatchPlan.from_config(config, world)
    tokens, accumulates = plan.micro_batch * plan.segment_length, plan.accumulation * plan.segments > 1
    size, mode = sizes(config), config.parallel.mode
    _, shard = config.parallel.mesh(world, local_world)
    parts = {
        "weights": 4 * size.total // shard,
        "gradients": 4 * size.total // shard,
        "optimiser": 4 * size.moments // shard,
        "gathered": _gathered(config, size, bf16, accumulates) if mode != "ddp" else 0,
        "bf16 weights": 0,
        "activations": 0,
        "one block's backward": 0,
        "loss": _loss(config.model, tokens, 2 if bf16 else 4),
    }
    layers = config.model.layer_mixers()
    for mixer in set(layers):
        every = activations(config.model, mixer, config.train, bf16, compiled)
        recomputes = config.train.activation_checkpointing in ("selective", "full")
        whole = activations(config.model, mixer, TrainConfig(), bf16, compiled) if recomputes else every
        parts["activations"] += int(layers.count(mixer) * every.token * tokens)
        if mode == "ddp":  # sharded weights are gathered in bfloat16, and nothing is kept of them
            parts["bf16 weights"] += int(layers.count(mixer) * every.fixed)
        parts["one block's backward"] = max(parts["one block's backward"], int(whole.token * tokens))
    return parts


def _gathered(config: RunConfig, size: Sizes, bf16: bool, accumulates: bool) -> int:
    """What sharding has whole for a while: the root's weights, two blocks' or all, and gradients that are not summed
    over processes yet."""
    root = size.total - size.blocks
    held = 2 * size.largest if config.parallel.reshard else size.blocks
    gradients = size.total if accumulates else root + 2 * size.largest
    width = 2 if accumulates and config.parallel.reduce_dtype == "bf16" else 4  # FSDP2 adds up in what it sums in
    return 4 * root + (2 if bf16 else 4) * held + width * gradients


def _loss(model: ModelConfig, tokens: int, width: int) -> int:
    """The residual stream's end, its norm, their gradients and the head's, its weight's, and a chunk of logits."""
    d, V = model.hidden_size, model.vocab_size
    return tokens * d * 5 * width + V * d * (4 + width % 4) + width * min(tokens * V, CHUNK_ELEMENTS)


def activations(model: ModelConfig, mixer: str, train: TrainConfig, bf16: bool, compiled: bool) -> Kept:
    """What one block keeps, by running it on the CPU at two lengths.

    What autograd saves is counted; of compiled blocks, what the graph that torch.compile cuts in two hands from one
    half to the other, without generating code.
    """
    traced = compiled or train.activation_checkpointing == "selective"  # whose cache autograd does not see
    shape = CausalLM(dataclasses.replace(model, mixer=mixer, layers=None, num_hidden_layers=1, vocab_size=8))
    prepare_block_forwards(shape, dataclasses.replace(train, compile=False), torch.device("cpu"))
    block = shape.model.layers[0]
    if traced:
        torch._dynamo.reset()  # or a graph that was cut by another setting is taken for this one's
        block.forward = torch.compile(block.forward, backend="aot_eager_decomp_partition", dynamic=False)
    short, long = (sum(_saved(block, block.forward, T, model.hidden_size, bf16)) for T in LENGTHS)
    token = (long - short) / (LENGTHS[1] - LENGTHS[0])
    # A scan that keeps a state between any two chunks keeps one less than there are chunks: 0 is crossed below.
    return Kept(token, max(0.0, short - token * LENGTHS[0]))


def _saved(block: nn.Module, forward, T: int, d: int, bf16: bool) -> Iterator[int]:
    """The bytes of each tensor that a forward of `T` tokens saves, the block's parameters aside."""
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x
        return x

    x = torch.randn(1, T, d, requires_grad=True, dtype=torch.bfloat16 if bf16 else torch.float32)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        forward(x)
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    yield from (x.untyped_storage().nbytes() for storage, x in saved.items() if storage not in own)


# ---------------------------------------------------------------------------------------------------- what is printed


def dry_run(config: RunConfig) -> int:
    """Prints what the run would need and returns 0. Of several processes the first prints.

    Raises ConfigError where the config does not fit the GPUs.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        world = config.train.assumed_gpus or int(os.environ.get("WORLD_SIZE", 1))
        print("\n".join(lines(config, world, device_here())))
    return 0


def lines(config: RunConfig, world: int, device: Device) -> Iterator[str]:
    plan = BatchPlan.from_config(config, world)
    size, flops = sizes(config), model_cost(config.model, config.data.seq_len).training
    tokens = config.steps * config.tokens_per_step
    embedded = config.model.vocab_size * config.model.hidden_size * (1 if config.model.tie_word_embeddings else 2)
    yield f"parameters    {size.total:,}; {size.total - embedded:,} without embeddings and head"
    yield f"operations    {flops / 1e9:.2f} GFLOP a token, forward and backward, at length {config.data.seq_len}"
    yield (
        f"batch         {config.batch_size} x {config.data.seq_len} = {config.tokens_per_step:,} tokens: {world} x "
        f"{device.name}, each {plan.accumulation} x {plan.micro_batch} sequences, {config.parallel.mode}"
    )
    yield f"steps         {config.steps:,} ({tokens / 1e9:.3g}B tokens), warm-up over the first {config.warmup_steps:,}"
    saved = 4 * (size.total + size.moments)
    kept = config.train.checkpoint.keep_last
    yield f"checkpoints   {saved / 1e9:.2f} GB each, {saved * kept / 1e9:.1f} GB for the {kept} that are kept"
    peak, mfu = peak_flops(device.name), config.train.assumed_mfu
    if peak is None:
        yield f"time          the peak of {device.name} is not known"
    else:
        rate = peak * mfu / flops
        hours = tokens / (rate * world) / 3600
        yield (
            f"time          {hours:,.1f} hours, {hours * world:,.0f} GPU hours, at {mfu:.0%} of the GPU's "
            f"{peak / 1e12:.0f} TFLOP/s: {rate:,.0f} tokens/s a GPU"
        )
    parts = _memory(config, world, device)
    yield "memory        " + _spelt(parts)
    yield from too_large(parts, device)


def _memory(config: RunConfig, world: int, device: Device) -> dict[str, int]:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", min(world, 8)))
    bf16 = device.bf16 and config.train.precision != "fp32"
    return memory(config, world, local, bf16, config.train.compile in ("auto", True))


def _spelt(parts: dict[str, int]) -> str:
    each = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    return f"{sum(parts.values()) / GIB:.1f} GiB a GPU: {each}"


def too_large(parts: dict[str, int], device: Device) -> Iterator[str]:
    """A warning where the estimate, with a twentieth for fragments and CUDA itself, is more than the device has."""
    if sum(parts.values()) > 0.95 * device.memory:
        yield f"WARNING: more than the {device.memory / GIB:.1f} GiB of {device.name}. {REMEDIES}"


REMEDIES = (
    "Write a smaller train.micro_batch_size (the batch stays the same), train.activation_checkpointing=full, "
    "train.tbptt_length, or with several GPUs parallel=fsdp2"
)


def explain_out_of_memory(config: RunConfig, world: int) -> str:
    """What to say when a GPU's memory was not enough."""
    device = device_here()
    estimate = _spelt(_memory(config, world, device))
    return f"{device.name} with {device.memory / GIB:.1f} GiB is out of memory; the estimate was {estimate}. {REMEDIES}"
