"""Convert a Llama to a model with linear mixers, whose new parameters are still to be trained.

Embeddings, norms, the q, k, v and o projections, MLPs and the head keep their weights. The forget gates and a norm on
each head's output are new, and start as in a new model. Rotary positions are dropped, because the gates order the
tokens. GLA gets a ReLU as its feature map and no output gate, as flash-linear-attention's authors did for Mistral-7B.
ReGLA has its own feature map.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from glalm.config.strict import require
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.mixers.attention import attention_heads
from glalm.model.written_weights import list_some

LINEAR_MIXERS = ("gla", "regla")
SHARED_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "initializer_range")
SHARED_FIELDS += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
PARAMETER_NAMES = {  # parts of a Llama's parameter names, and ours
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attn",
    "embed_tokens": "embeddings",
}
NEW_PARAMETERS = (".gk_proj.", ".g_norm.", ".forget_proj.", ".refine_proj.", ".o_norm.")


def load_llama(folder: Path, gguf_file: str | None = None) -> LlamaForCausalLM:
    """Load a Llama in float32 from the safetensors in `folder`, or from a GGUF file in it.

    Raises:
        ConfigError: Weights are missing, or config.json has no place for some. transformers would only warn, and
            continue with random ones, or without them.
    """
    source = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    llama, info = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **source
    )
    for problem, names in (("no weights named", info["missing_keys"]), ("unknown weights", info["unexpected_keys"])):
        require(
            not names, f"{folder} has {problem} {list_some(names)}. Copy weights and config.json of one model again"
        )
    return llama.eval()


def convert_llama(llama: LlamaForCausalLM, mixer: str = "gla", softmax_layers: Iterable[int] = ()) -> GLALMForCausalLM:
    """Return a float32 model with the weights of `llama` and with linear mixers.

    GLA shares keys and values among the heads of a group as `llama` does. ReGLA gets a copy for each head.

    Args:
        mixer: gla or regla.
        softmax_layers: Layers, counted from 0, that remain softmax attention.

    Raises:
        ConfigError: `llama` has a property that no model here supports, or one of softmax_layers does not exist.
    """
    config = convert_config(llama.config, mixer, set(softmax_layers))
    model = GLALMForCausalLM(config)
    missing, unexpected = model.load_state_dict(convert_weights(llama.state_dict(), config), strict=False)
    # A converted model's new parameters have no counterpart in the Llama.
    missing = [name for name in missing if not any(part in name for part in NEW_PARAMETERS)]
    unmatched = [*unexpected, *missing]
    if config.tie_word_embeddings and "lm_head.weight" in unmatched:
        unmatched.remove("lm_head.weight")
    require(not unmatched, f"These weights are only in the checkpoint or only in the model: {', '.join(unmatched)}")
    model.tie_weights()
    model.generation_config = copy.deepcopy(llama.generation_config)  # It may name more end tokens than config.json.
    return model.eval()


def convert_config(llama, mixer: str, softmax_layers: set[int]) -> GLALMConfig:
    """Return the config of the converted model for a LlamaConfig. See convert_llama."""
    require_convertible(llama, mixer, softmax_layers)
    heads = llama.num_attention_heads
    kv_heads = llama.num_key_value_heads
    rope = llama.rope_parameters or {}
    return GLALMConfig(
        **{name: getattr(llama, name) for name in SHARED_FIELDS},
        layers=["attention" if layer in softmax_layers else mixer for layer in range(llama.num_hidden_layers)],
        num_heads=heads,
        expand_k=1.0,
        expand_v=1.0,
        norm_eps=llama.rms_norm_eps,
        gla={"output_gate": False, "num_kv_heads": kv_heads, "feature_map": "relu"},
        attention={"num_heads": heads, "num_kv_heads": kv_heads, "rope_theta": float(rope.get("rope_theta", 10000.0))},
    )


def require_convertible(llama, mixer: str, softmax_layers: set[int]) -> None:
    """Raise ConfigError if a LlamaConfig has a property that no model here supports, or the options do not fit it."""
    # Configs of other architectures lack some of the fields below.
    require(
        llama.model_type == "llama",
        f"The checkpoint's model_type is {llama.model_type!r}, but only 'llama' can be converted",
    )
    depth = llama.num_hidden_layers
    heads = llama.num_attention_heads
    head_width = getattr(llama, "head_dim", None) or llama.hidden_size // heads
    rope = llama.rope_parameters or {}
    require(mixer in LINEAR_MIXERS, f"mixer={mixer!r} is unknown. Choose one of: {', '.join(LINEAR_MIXERS)}")
    unknown = sorted(softmax_layers - set(range(depth)))
    require(not unknown, f"softmax_layers: the model has no layers {unknown}, only 0 to {depth - 1}")
    for name, value, supported in (
        ("hidden_act", llama.hidden_act, "silu"),
        ("attention_bias", llama.attention_bias, False),
        ("mlp_bias", llama.mlp_bias, False),
        ("num_attention_heads * head_dim", head_width * heads, llama.hidden_size),
        ("rope_type", rope.get("rope_type", "default") if softmax_layers else "default", "default"),
    ):
        require(value == supported, f"The checkpoint's {name} is {value!r}, but only {supported!r} can be converted")


def convert_weights(llama_weights: dict[str, Tensor], config: GLALMConfig) -> dict[str, Tensor]:
    """Rename a Llama's weights, and copy grouped keys and values to every head of layers that are ReGLA."""
    weights = {}
    for name, tensor in llama_weights.items():
        for theirs, ours in PARAMETER_NAMES.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        weights[name] = tensor
    heads, kv_heads = attention_heads(config)
    for layer, mixer in enumerate(config.layer_mixers()):
        if mixer != "regla":
            continue
        for projection in ("k_proj", "v_proj"):
            name = f"model.layers.{layer}.attn.{projection}.weight"
            groups = weights[name].unflatten(0, (kv_heads, -1))
            weights[name] = groups.repeat_interleave(heads // kv_heads, 0).flatten(0, 1)
    return weights
