"""Estimate the memory of a training step: parameters, optimizer state, and what the backward pass needs."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glalm.config.run import RunConfig, TrainConfig
from glalm.kernels.common import assume_gpu
from glalm.kernels.cross_entropy import CHUNK_ELEMENTS
from glalm.model.config import ModelConfig
from glalm.model.decoder import Block, CausalLM
from glalm.train.compile import choose_forward
from glalm.train.optim import build_optimizers
from glalm.train.state import BatchPlan

GIB = 2**30
MOMENTS_PER_PARAMETER = {"Muon": 1, "AdamW": 2}


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. Shared ones count once."""

    total: int
    blocks: int  # of all blocks
    largest_block: int
    moments: int  # numbers that the optimizers save
    averages: int  # numbers of the moving average of the weights


@dataclass(frozen=True)
class ActivationBytes:
    """What a block saves for its backward pass."""

    per_token: float
    largest_per_token: float  # of the tensor that has most
    fixed: float  # independent of the number of sequences: its weights in bfloat16, and tables of positions


def count_parameters(config: RunConfig) -> ParameterCounts:
    with torch.device("meta"):
        model = CausalLM(config.model)
    model.tie_weights()
    moments = 0
    for optimizer in build_optimizers(model, config.optim):
        for group in optimizer.param_groups:
            numel = sum(parameter.numel() for parameter in group["params"])
            moments += MOMENTS_PER_PARAMETER[type(optimizer).__name__] * numel
    blocks = [_numel(block) for block in model.model.layers]
    averages = _numel(model) if config.train.ema_decay is not None else 0
    return ParameterCounts(_numel(model), sum(blocks), max(blocks), moments, averages)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def estimate_memory(
    config: RunConfig,
    plan: BatchPlan,
    local_world_size: int,
    bf16: bool,
    compiled: bool,
    captured: bool = False,
    is_gpu: bool = False,
) -> dict[str, int]:
    """Return the bytes on each GPU at the peak of a step, by part. Their sum is the estimate.

    The peak is where the backward pass begins and all activations are allocated. Gradients are allocated if DDP, or an
    earlier micro-batch or segment, has done so. Otherwise they take the place of the activations, in a CUDA graph as
    well, and if they are larger, the peak is at the end of the backward pass. The kernels' workspaces are not counted.

    Raises:
        ConfigError: The processes do not form the config's mesh.
    """
    counts = count_parameters(config)
    is_ddp = config.parallel.mode == "ddp"
    _, shards = config.parallel.mesh(plan.world_size, local_world_size)
    parts = {
        "weights": 4 * counts.total // shards,
        "gradients": 4 * counts.total // shards,
        "optimizer": 4 * counts.moments // shards,
        "average": 4 * counts.averages // shards,
        "gathered": 0 if is_ddp else _gathered_bytes(config, plan, counts, bf16),
        **_blocks_bytes(config, plan, bf16, compiled, is_gpu),
        "loss": _loss_bytes(config.model, plan.micro_batch * plan.shard_length, bf16),
    }
    # Only the larger one counts, because the loss's memory is free when the last block's backward pass begins.
    smaller = min("loss", "one block's backward", key=parts.__getitem__)
    has_gradients = (is_ddp and plan.world_size > 1) or plan.accumulation * plan.segments > 1
    if captured:
        # CUDA graphs keep the memory of a step for themselves, so validation needs its own. It does not cut windows
        # into segments. The forward pass of a block is taken to need as much as its backward pass.
        parts["validation"] = plan.segments * parts["one block's backward"] + parts["loss"]
    parts[smaller] = 0
    if not has_gradients:
        parts["gradients"] = max(0, parts["gradients"] - parts["activations"])
    return parts


def _blocks_bytes(config: RunConfig, plan: BatchPlan, bf16: bool, compiled: bool, is_gpu: bool) -> dict[str, int]:
    """Return what the blocks need besides their weights and gradients, by part.

    All blocks count for "bf16 weights" and "activations", and the one that needs most for the others. "gathered keys
    and values" includes their gradients.
    """
    parts = {"bf16 weights": 0, "activations": 0, "one block's backward": 0, "gathered keys and values": 0}
    tokens = plan.micro_batch * plan.shard_length
    width = 2 if bf16 else 4
    assert config.model.intermediate_size is not None
    swiglu_gradients = (4 * config.model.intermediate_size + 3 * config.model.hidden_size) * width
    recomputes = config.train.activation_checkpointing in ("selective", "full")
    layers = config.model.layer_mixers()
    measure = partial(
        measure_activations, config.model, length=plan.shard_length, bf16=bf16, compiled=compiled, is_gpu=is_gpu
    )
    for mixer in set(layers):
        saved = measure(mixer, config.train)
        parts["activations"] += int(layers.count(mixer) * saved.per_token * tokens)
        # With checkpointing, the backward pass recomputes the activations of one block at a time.
        present = measure(mixer, TrainConfig()) if recomputes else saved
        recomputed = present.per_token if recomputes else 0
        # What it holds at once of each token: the gradients of SwiGLU, or of its largest product and of a factor.
        gradients = max(swiglu_gradients, 2 * present.largest_per_token)
        backward = int((recomputed + gradients) * tokens)
        parts["one block's backward"] = max(parts["one block's backward"], backward)
        gathered = gathered_channels(config.model, mixer) * (plan.context_parallel - 1) * width
        parts["gathered keys and values"] = max(parts["gathered keys and values"], 2 * gathered * tokens)
        if config.parallel.mode == "ddp":
            # Autocast keeps its copies. Sharded weights are gathered in bfloat16, and freed again.
            parts["bf16 weights"] += int(layers.count(mixer) * saved.fixed)
    return parts


def gathered_channels(model: ModelConfig, mixer: str) -> int:
    """Return Mixer.gathered_channels of a layer."""
    with torch.device("meta"):
        one_block = CausalLM(dataclasses.replace(model, mixer=mixer, layers=None, num_hidden_layers=1, vocab_size=8))
    block = one_block.model.layers[0]
    assert isinstance(block, Block)
    return block.attn.gathered_channels()


def _gathered_bytes(config: RunConfig, plan: BatchPlan, counts: ParameterCounts, bf16: bool) -> int:
    """Return the size of what is unsharded at once: gradients, and weights of the root and of two (or all) blocks."""
    root = counts.total - counts.blocks
    block_weights = 2 * counts.largest_block if config.parallel.reshard else counts.blocks
    weight_bytes = 4 * root + (2 if bf16 else 4) * block_weights
    if plan.accumulation * plan.segments == 1:
        return weight_bytes + 4 * (root + 2 * counts.largest_block)
    # FSDP2 accumulates unsharded gradients, in reduce_dtype.
    return weight_bytes + (2 if config.parallel.reduce_dtype == "bf16" else 4) * counts.total


def _loss_bytes(model: ModelConfig, tokens: int, bf16: bool) -> int:
    """Return the size of the last hidden state, its norm, the head, their gradients, and a chunk of logits."""
    assert model.vocab_size is not None  # The data's tokenizer has set it.
    width = 2 if bf16 else 4
    hidden = tokens * model.hidden_size * 5 * width
    # Of the head there are a float32 gradient and, with bf16, the cast weight.
    head = model.vocab_size * model.hidden_size * (4 + (2 if bf16 else 0))
    return hidden + head + width * min(tokens * model.vocab_size, CHUNK_ELEMENTS)


def measure_activations(
    model: ModelConfig, mixer: str, train: TrainConfig, length: int, bf16: bool, compiled: bool, is_gpu: bool = False
) -> ActivationBytes:
    """Measure what one block saves for the backward pass, by running its forward pass on one and on two sequences.

    What it saves of a token may depend on the number of the sequence's tokens, `length`.

    For compiled blocks this counts what the forward half of torch.compile's partitioned graph hands to the backward
    half. No code is generated. With `is_gpu` the tensors are fake: they have the shapes and dtypes that they would have
    on a GPU, but no data.
    """
    with ExitStack() as stack:
        if is_gpu:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(assume_gpu())  # Operators choose the kernels that they would choose there.
        one_block = CausalLM(dataclasses.replace(model, mixer=mixer, layers=None, num_hidden_layers=1, vocab_size=8))
        block = one_block.model.layers[0]
        forward: Callable = partial(choose_forward(train, compiled), block)
        # Autograd's hooks do not see the tensors that selective checkpointing saves, but a traced graph shows them.
        if compiled or train.activation_checkpointing == "selective":
            torch._dynamo.reset()  # A graph that was partitioned under other settings would be reused.
            forward = torch.compile(forward, backend="aot_eager_decomp_partition", dynamic=False)
        one = _saved_bytes(block, forward, (1, length, model.hidden_size), bf16)
        two = _saved_bytes(block, forward, (2, length, model.hidden_size), bf16)
    total = sum(two) - sum(one)
    return ActivationBytes(total / length, (max(two) - max(one)) / length, sum(one) - total)


def _saved_bytes(block: nn.Module, forward: Callable, shape: tuple[int, int, int], bf16: bool) -> list[int]:
    """Return the sizes of the tensors that a forward pass of an input of `shape` saves, without the parameters."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x = torch.randn(shape, requires_grad=True, dtype=torch.bfloat16 if bf16 else torch.float32)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        forward(x)
    parameters = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    return [tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in parameters]
