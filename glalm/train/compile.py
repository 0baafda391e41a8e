"""How blocks run in training: compiled by torch.compile, and with recomputation of activations in the backward pass."""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from glalm.config.run import RunConfig, TrainConfig
from glalm.config.strict import require
from glalm.model.decoder import Block, CausalLM
from glalm.train.state import BatchPlan

BlockForward = Callable[..., tuple[Tensor, object]]

# Selective checkpointing saves the results of these, which are slow to recompute and small compared with the results of
# all elementwise operations together.
aten = torch.ops.aten
SAVED_OPS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
SAVED_NAMESPACES = {"glalm", "torch_attn"}  # our kernels, and torch's attention over packed sequences
# These take no longer than an elementwise operation, and their results are wide.
RECOMPUTED_KERNELS = {"glalm::short_conv", "glalm::gated_rms_norm"}
# The most compiled variants of a block: mixers x with or without an initial state x shapes.
RECOMPILE_LIMIT = 32


def apply_training_forward(model: CausalLM, config: TrainConfig, device: torch.device) -> None:
    """Let the blocks of `model` run in training as train.compile and train.activation_checkpointing say.

    Call this before the model is sharded or wrapped. Only `forward` of each block is replaced, not the module, so the
    parameters keep their names, and FSDP2's hooks are neither compiled nor run again by a recomputation. In evaluation
    mode the blocks run their own forward, because evaluations come in many shapes.
    """
    compiled = is_compiled(config, device.type == "cuda")
    training_forward = choose_forward(config, compiled)
    if compiled:
        training_forward = _compile_forward(training_forward)

    def forward(block: Block, x: Tensor, **options) -> tuple[Tensor, object]:
        block_forward = training_forward if block.training else Block.forward
        return block_forward(block, x, **options)

    for block in model.model.layers:
        block.forward = MethodType(forward, block)


def choose_forward(config: TrainConfig, compiled: bool) -> BlockForward:
    """Return the forward pass of a block that recomputes what the config says, before it is compiled."""
    # torch.compile recomputes elementwise operations, but saves operands of matrix products: norms, SwiGLU's product,
    # weights in bfloat16. Recomputing these too saves a quarter of a step's memory for 2% of its time.
    torch._functorch.config.ban_recompute_materialized_backward = config.activation_checkpointing == "none"
    if compiled:
        _let_compiler_recompute(torch.ops.glalm.gated_rms_norm)
    checkpointed_forwards = COMPILED_CHECKPOINTED_FORWARDS if compiled else CHECKPOINTED_FORWARDS
    return checkpointed_forwards[config.activation_checkpointing]


def _let_compiler_recompute(operator: torch._ops.OpOverloadPacket) -> None:
    """Let torch.compile recompute an operator as it does elementwise ones. It saves the results of all other kernels.

    The operator must be as cheap as an elementwise one. torch.compile knows only its own operators by torch.Tag.
    """
    from torch._functorch.partitioners import pointwise_ops  # This imports torch._dynamo, which takes a second.

    if operator not in pointwise_ops():  # This is the cached list itself.
        pointwise_ops().append(operator)


def is_compiled(config: TrainConfig, is_gpu: bool) -> bool:
    """Return whether the blocks are compiled in training."""
    return is_gpu if config.compile == "auto" else config.compile


class ForwardShape(NamedTuple):
    """What torch.compile builds the blocks for, and Triton may choose other kernels for."""

    sequences: int
    length: int  # tokens of a sequence in one process
    is_packed: bool  # The sequences' documents are one row.
    has_state: bool  # The sequences continue from a state, as all segments of a sequence do but its first.

    def __str__(self) -> str:
        packed = " packed" if self.is_packed else ""
        return f"{self.sequences} x {self.length:,}{packed}{' from a state' if self.has_state else ''}"


def list_forward_shapes(config: RunConfig, plans: list[BatchPlan]) -> dict[ForwardShape, int]:
    """Return {shape of a forward pass: the first step, counted from 1, that has it}, for all phases of a run."""
    shapes: dict[ForwardShape, int] = {}
    for phase, plan in zip(config.phases, plans, strict=True):
        is_packed = phase.config.data.document_boundaries == "reset_state"
        for has_state in (False, True)[: plan.segments]:
            shape = ForwardShape(plan.micro_batch, plan.shard_length, is_packed, has_state)
            shapes.setdefault(shape, phase.start_step + 1)
    return shapes


def check_compile_limit(config: RunConfig, plans: list[BatchPlan], is_gpu: bool) -> None:
    """Raise ConfigError if the blocks are compiled, and a run has more shapes than torch.compile keeps."""
    shapes = len(list_forward_shapes(config, plans))
    variants = shapes * len(set(config.model.layer_mixers()))
    require(
        variants <= RECOMPILE_LIMIT or not is_compiled(config.train, is_gpu),
        f"The stages have {shapes} shapes of forward passes, for which torch.compile builds {variants} variants of a "
        f"block and keeps {RECOMPILE_LIMIT}. Use fewer batches and lengths in train.stages, or set train.compile=false",
    )


def _compile_forward(forward: BlockForward) -> BlockForward:
    """Compile one function for all blocks: blocks with the same mixer then share a graph, however many there are."""
    torch._dynamo.reset()  # The variants of a sweep's previous run would count towards the limit.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # Training has few shapes, and a graph for all lengths would be slower than one for each.
    return torch.compile(forward, dynamic=False)


def _checkpointed_forward(**options) -> BlockForward:
    """Return a Block.forward that recomputes activations in the backward pass, with torch's `options` of checkpoint."""

    def forward(block: Block, x: Tensor, **block_options) -> tuple[Tensor, object]:
        run = partial(Block.forward, block, **block_options)
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, **options)

    return forward


def _selective_policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    is_kernel = op.namespace in SAVED_NAMESPACES and op.name() not in RECOMPUTED_KERNELS
    is_saved = op in SAVED_OPS or is_kernel
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def _recompute_all_policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTED_FORWARDS: dict[str, BlockForward] = {
    "none": Block.forward,
    "elementwise": Block.forward,
    "full": _checkpointed_forward(),
    "selective": _checkpointed_forward(context_fn=partial(create_selective_checkpoint_contexts, _selective_policy)),
}
# Before 2.13, torch.compile recomputes what is inside an autograd.Function only if a policy says so. In eager mode, the
# policy would slow down every operation.
COMPILED_CHECKPOINTED_FORWARDS = CHECKPOINTED_FORWARDS | {
    "full": _checkpointed_forward(context_fn=partial(create_selective_checkpoint_contexts, _recompute_all_policy)),
}
