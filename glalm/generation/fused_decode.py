"""One token of one sequence through a GLA model in five kernels a layer, each of which reads weights or the state.

The same function as the model's forward, but for where it rounds: sums, norms and gates stay in float32 here.
"""

import torch
from torch import LongTensor, Tensor, nn

from glalm.hf import CheckpointedBlock, GLALMForCausalLM, GLALMModel
from glalm.model.decoder import SwiGLU
from glalm.model.layers import GatedRMSNorm, RMSNorm
from glalm.model.mixers.gla import GatedLinearAttention

PLAIN = {nn.Linear, nn.Embedding, nn.Sequential, nn.ModuleList, GLALMForCausalLM, GLALMModel, CheckpointedBlock}
PLAIN |= {SwiGLU, GatedLinearAttention, RMSNorm, GatedRMSNorm}


def serves(model: GLALMForCausalLM) -> bool:
    """Whether it is the paper's GLA throughout, in plain layers, of sizes that the kernels' norm over heads takes."""
    c = model.config
    return (
        set(c.layer_mixers()) == {"gla"}
        and (c.gla.gate, c.gla.output_gate, c.gla.short_conv, c.gla.feature_map) == ("vector", True, 0, "identity")
        and c.gla.num_kv_heads in (None, c.num_heads)
        and c.gla.min_log_gate is None
        and c.intermediate_size > 0
        and model.dtype != torch.float64  # which the kernels would round
        and all(n & (n - 1) == 0 for n in (c.value_dim, c.num_heads))
        and all(plain(m) for m in model.modules())
    )


def plain(module: nn.Module) -> bool:
    """Whether calling it does what its class says: adapters and quantisation are other classes, or hooks."""
    return type(module) in PLAIN and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )


def next_logits(model: GLALMForCausalLM, token: LongTensor, states: list[Tensor]) -> Tensor:
    """token: [1, 1]; logits: [1, vocabulary]. The states move on in place."""
    from glalm.kernels.triton.matvec import matvec  # here, since a machine without a GPU may lack triton

    x = model.model.embeddings(token)[0, 0]
    for block, S in zip(model.model.layers, states, strict=True):
        x = through(block, x, S)
    norm = model.model.norm
    [logits] = matvec(x, [model.lm_head.weight], norm=norm.weight, eps=norm.eps)
    return logits[None]


def through(block: CheckpointedBlock, x: Tensor, S: Tensor) -> Tensor:
    from glalm.kernels.triton.decode_step import gla_decode_step
    from glalm.kernels.triton.matvec import matvec

    mlp, mixer = block.mlp, block.attn
    q, k, v, r, low = matvec(x, inputs(mixer), norm=block.attn_norm.weight, eps=block.attn_norm.eps)
    gate = mixer.gk_proj[1]
    o = gla_decode_step(q, k, v, low, gate.weight, gate.bias, mixer.gate_logit_normalizer, S)
    norm = mixer.g_norm_swish_gate
    [x] = matvec(o, [mixer.o_proj.weight], norm=norm.weight, eps=norm.eps, gate=r, residual=x)
    norm = block.mlp_norm
    [h] = matvec(x, [mlp.gate_proj.weight, mlp.up_proj.weight], norm=norm.weight, eps=norm.eps, swiglu=True)
    [x] = matvec(h, [mlp.down_proj.weight], residual=x)
    return x


def inputs(mixer: GatedLinearAttention) -> list[Tensor]:
    layers = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, mixer.gk_proj[0]
    return [layer.weight for layer in layers]
