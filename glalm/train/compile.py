"""How each block is run in training: compiled, and with how much of it kept for its backward."""

from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from glalm.config.run import TrainConfig
from glalm.model.decoder import Block, CausalLM

# Costly to make again, and small beside what elementwise operations would keep.
aten = torch.ops.aten
MATMULS = {
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
KERNELS = {"glalm", "torch_attn"}  # the namespaces of ours, and of torch's attention over packed sequences
VARIANTS = 32  # compiled forms of a block: mixers x fresh or carried state x shapes


def prepare_block_forwards(model: CausalLM, config: TrainConfig, device: torch.device) -> None:
    """Replaces each block's forward by the one that the config asks for. Before the model is sharded or wrapped.

    Only forward, not the module: parameters keep their names, and FSDP2's hooks stay outside what is compiled and
    what is made again. Blocks with the same mixer share one compiled graph, so that the time of the first step does
    not grow with the number of layers. Outside of training blocks run as they are: evaluations come in any shape.
    """
    train = RECOMPUTING[config.activation_checkpointing]
    # torch.compile makes again what is elementwise, but not what the backward needs as a matmul's operand: norms,
    # SwiGLU's product, weights in bfloat16. These are a quarter of a step's memory, and 2% of its time.
    torch._functorch.config.ban_recompute_materialized_backward = config.activation_checkpointing == "none"
    if device.type == "cuda" if config.compile == "auto" else config.compile:
        torch._dynamo.reset()  # of a sweep's runs before, whose forms would count
        torch._dynamo.config.recompile_limit = VARIANTS
        # Training has few shapes, and a graph for any length would be slower than one for each.
        train = torch.compile(train, dynamic=False)

    def forward(block: Block, x: Tensor, **mixing):
        return (train if block.training else Block.forward)(block, x, **mixing)

    for block in model.model.layers:
        block.forward = MethodType(forward, block)


def recomputing(**options) -> Callable:
    """Block.forward that keeps its input, and what `options` say, and makes the rest again in the backward."""

    def forward(block: Block, x: Tensor, **mixing):
        run = partial(Block.forward, block, **mixing)
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, **options)

    return forward


def selective(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    keep = op in MATMULS or op.namespace in KERNELS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTING = {
    "none": Block.forward,
    "elementwise": Block.forward,
    "full": recomputing(),
    "selective": recomputing(context_fn=partial(create_selective_checkpoint_contexts, selective)),
}
