"""Decode one token of one sequence of a GLA model by five kernels per layer, each of which reads weights or the state.

This computes the same function as the model's forward, except for rounding: sums, norms and gates stay in float32.
"""

import copy

import torch
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedModel

from glalm.generation.captured import describe_value
from glalm.hf import CheckpointedBlock, GLALMForCausalLM, GLALMModel
from glalm.model.decoder import SwiGLU
from glalm.model.layers import BiasedLinear, GatedRMSNorm, RMSNorm
from glalm.model.mixers.gla import GatedLinearAttention
from glalm.model.plain import is_called_plainly, is_plain_linear, is_plain_tensor

MODEL_TYPES = (
    GLALMForCausalLM, GLALMModel, CheckpointedBlock, BiasedLinear, GatedLinearAttention, SwiGLU, RMSNorm, GatedRMSNorm,
)  # fmt: skip
# The forward methods that decode_token stands for.
FORWARDS = {kind: kind.forward for kind in (*MODEL_TYPES, nn.Linear, nn.Embedding, nn.Sequential, nn.ModuleList)}


def is_supported(model: GLALMForCausalLM) -> bool:
    """Return whether the model is the paper's GLA in every layer, unmodified, and of sizes that the kernels support."""
    config = model.config
    options = config.gla
    return (
        set(config.layer_mixers()) == {"gla"}
        and (options.gate, options.output_gate, options.short_conv) == ("vector", True, 0)
        and options.feature_map == "identity"
        and options.num_kv_heads in (None, config.num_heads)
        and options.min_log_gate is None
        and config.intermediate_size > 0
        and model.dtype != torch.float64  # The kernels compute in float32.
        and config.value_dim.bit_count() == config.num_heads.bit_count() == 1  # They are powers of two.
        and is_unmodified(model)
    )


def is_unmodified(model: GLALMForCausalLM) -> bool:
    """Return whether the model has the modules that its config describes, each of which computes what its class says.

    Adapters, quantisation, pruning and offloading replace modules, add hooks, or hold weights in their own tensors.
    """
    with torch.device("meta"):
        fresh = dict(GLALMForCausalLM(copy.deepcopy(model.config)).named_modules())
    modules = dict(model.named_modules())
    return modules.keys() == fresh.keys() and all(is_like(module, fresh[name]) for name, module in modules.items())


def is_like(module: nn.Module, fresh: nn.Module) -> bool:
    """Return whether the kernels may read the module's weights, which are of the shapes of a fresh module."""
    kind = type(module)
    names = fresh._parameters.keys()
    return (
        kind is type(fresh)
        and kind.forward is FORWARDS.get(kind)
        and is_called_plainly(module)
        and (kind is not nn.Linear or is_plain_linear(module, bias=True))
        and module._parameters.keys() == names
        and all(is_readable(module._parameters[name], fresh._parameters[name]) for name in names)
        and (isinstance(module, PreTrainedModel) or settings(module) == settings(fresh))
    )


def is_readable(parameter: Tensor | None, fresh: Tensor | None) -> bool:
    """Return whether a kernel may read the parameter as an array of the fresh one's shape."""
    if parameter is None or fresh is None:
        return parameter is fresh
    return is_plain_tensor(parameter) and parameter.shape == fresh.shape and parameter.is_contiguous()


def settings(module: nn.Module) -> object:
    """Return the public attributes of the module itself: numbers and names that it computes with."""
    values = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return describe_value(values)


def decode_token(model: GLALMForCausalLM, token: LongTensor, states: list[Tensor]) -> Tensor:
    """Return the logits [1, vocabulary] after one more token [1, 1], and advance the states in place."""
    from glalm.kernels.triton.matvec import matvec  # Triton may be missing on a machine without a GPU.

    x = model.model.embeddings(token)[0, 0]
    for block, S in zip(model.model.layers, states, strict=True):
        x = decode_block(block, x, S)
    norm = model.model.norm
    [logits] = matvec(x, [model.lm_head.weight], norm=norm.weight, eps=norm.eps)
    return logits[None]


def decode_block(block: CheckpointedBlock, x: Tensor, S: Tensor) -> Tensor:
    """Return the residual stream [d] after the block, and advance its state S [1, H, K, V] in place."""
    from glalm.kernels.triton.decode_step import gla_decode_step
    from glalm.kernels.triton.matvec import matvec

    mixer = block.attn
    low_rank, gate = mixer.gk_proj
    inputs = [layer.weight for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, low_rank)]
    norm = block.attn_norm
    q, k, v, r, low = matvec(x, inputs, norm=norm.weight, eps=norm.eps)
    o = gla_decode_step(q, k, v, low, gate.weight, gate.bias, mixer.gate_logit_normalizer, S)
    norm = mixer.g_norm_swish_gate
    [x] = matvec(o, [mixer.o_proj.weight], norm=norm.weight, eps=norm.eps, gate=r, residual=x)

    mlp = block.mlp
    norm = block.mlp_norm
    [h] = matvec(x, [mlp.gate_proj.weight, mlp.up_proj.weight], norm=norm.weight, eps=norm.eps, swiglu=True)
    [x] = matvec(h, [mlp.down_proj.weight], residual=x)
    return x
