"""Read published checkpoints: the GLA, RetNet and Transformer models of flash-linear-attention 0.6.

Nearly all parameter names are those of this package. A config.json is translated field by field. A field that asks for
a computation that no model here supports is a ConfigError that names it. glalm.compat.fla writes such checkpoints.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor

from glalm.config.strict import require

# Fields that mean the same in both formats, with their defaults in a published config.json.
SHARED_FIELDS: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000, "norm_eps": 1e-6}
SHARED_FIELDS |= {"initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True}
SHARED_FIELDS |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
SWIGLU_FIELDS = {"hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish", "attnres_block_size": None}
RECURRENT_FIELDS = {"num_kv_heads": None, "feature_map": None, "use_output_gate": True, "elementwise_affine": True}
RECURRENT_FIELDS |= {"attn": None}
FORMATS = {  # model_type: its other fields that change what the model computes, with their defaults
    "gla": SWIGLU_FIELDS
    | RECURRENT_FIELDS
    | {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "use_short_conv": False, "conv_size": 4}
    | {"clamp_min": None, "use_gk": True, "use_gv": False},
    # RetNet's use_short_conv is not listed, because that library ignores it.
    "retnet": SWIGLU_FIELDS | RECURRENT_FIELDS | {"num_heads": 8, "expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2},
    "transformer": SWIGLU_FIELDS
    | {"num_heads": 32, "num_kv_heads": None, "qkv_bias": False, "qk_norm": False}
    | {"window_size": None, "rope_theta": 10000.0},
}
FIXED_FIELDS = {  # model_type: fields of which only the default can be loaded
    "gla": ("hidden_act", "attnres_block_size", "elementwise_affine", "use_gk", "use_gv"),
    "retnet": ("hidden_act", "attnres_block_size", "elementwise_affine", "feature_map", "use_output_gate"),
    "transformer": ("hidden_act", "attnres_block_size", "qkv_bias", "qk_norm"),
}
MIXERS = {"gla": "gla", "retnet": "retention", "transformer": "attention"}  # model_type: our mixer
FEATURE_MAPS = {None: "identity", "relu": "relu"}  # GLA's feature_map: ours


def config_from_fla(tree: dict) -> dict:
    """Translate a config.json of flash-linear-attention into ours. Return any other one as it is.

    Raises:
        ConfigError: A field has a value that no model here supports.
    """
    kind = tree.get("model_type")
    if kind not in FORMATS:
        return tree
    defaults = SHARED_FIELDS | FORMATS[kind]
    fields = defaults | {name: value for name, value in tree.items() if name in defaults}
    for name in FIXED_FIELDS[kind]:
        check_supported(kind, name, fields[name], [defaults[name]])

    ours = {name: fields[name] for name in SHARED_FIELDS} | {"model_type": "glalm", "mixer": MIXERS[kind]}
    ours |= {name: tree[name] for name in ("dtype", "torch_dtype") if name in tree}
    swiglu_width = int(fields["hidden_size"] * (fields["hidden_ratio"] or 4) * 2 / 3)
    ours["intermediate_size"] = fields["intermediate_size"] or 256 * math.ceil(swiglu_width / 256)
    ours["num_heads"] = fields["num_heads"]
    if kind == "transformer":
        ours["expand_k"] = 1.0  # Attention does not use it, but it must be divisible into heads.
        ours["attention"] = attention_from_fla(fields)
        return ours

    ours |= {"expand_k": fields["expand_k"], "expand_v": fields["expand_v"]}
    if kind == "gla":
        check_supported(kind, "feature_map", fields["feature_map"], [*FEATURE_MAPS])
        ours["gla"] = {
            "feature_map": FEATURE_MAPS[fields["feature_map"]],
            "num_kv_heads": fields["num_kv_heads"],
            "min_log_gate": fields["clamp_min"],
            "output_gate": fields["use_output_gate"],
            "short_conv": fields["conv_size"] if fields["use_short_conv"] else 0,
        }
    else:
        check_supported(kind, "num_kv_heads", fields["num_kv_heads"], [None, fields["num_heads"]])
    if fields["attn"]:
        ours |= hybrid_from_fla(kind, fields["attn"], fields["num_hidden_layers"])
    return ours


def hybrid_from_fla(kind: str, attn: dict | list, depth: int) -> dict:
    """Translate the field attn of a hybrid: which of its layers are softmax attention, and their options."""
    specs = attn if isinstance(attn, list) else [attn]
    require(
        len(specs) == 1,
        f"config.json's attn has {len(specs)} kinds of attention. All attention layers of a model here are of one kind",
    )
    is_spec = isinstance(specs[0], dict) and {"layers", "num_heads"} <= specs[0].keys()
    require(is_spec, f"config.json's attn is {json.dumps(attn)}. It must be a mapping with layers and num_heads")
    spec = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0} | specs[0]
    layers = spec["layers"]
    require(
        isinstance(layers, list) and all(layer in range(depth) for layer in layers),
        f"config.json's attn.layers is {json.dumps(layers)}. It must be a list of layers from 0 to {depth - 1}",
    )
    check_supported(kind, "attn.qkv_bias", bool(spec["qkv_bias"]), [False])
    return {
        "layers": ["attention" if layer in layers else MIXERS[kind] for layer in range(depth)],
        "attention": attention_from_fla(spec),
    }


def attention_from_fla(spec: dict) -> dict:
    """Translate the fields of softmax attention into the options of our mixer."""
    return {
        "num_heads": spec["num_heads"],
        "num_kv_heads": spec["num_kv_heads"],
        "window": spec["window_size"],
        "rope_theta": float(spec["rope_theta"]),
    }


def check_supported(kind: str, field: str, value, supported: list) -> None:
    """Raise ConfigError if a model here cannot compute what this value of a field asks for."""
    require(
        value in supported,
        f"config.json of model_type {kind} has {field}={json.dumps(value)}, which no model here supports. "
        f"Supported: {', '.join(map(json.dumps, supported))}",
    )


def weights_from_fla(weights: dict[str, Tensor], config) -> dict[str, Tensor]:
    """Rename the weights of a flash-linear-attention checkpoint for a model of this GLALMConfig."""
    weights = {name: x for name, x in weights.items() if not name.endswith("rotary.inv_freq")}  # a constant
    base = "model." if any(name.startswith("model.") for name in weights) else ""
    for layer, mixer in enumerate(config.layer_mixers()):
        prefix = f"{base}layers.{layer}.attn."
        has_gated_norm = mixer == "retention" or (mixer == "gla" and config.gla.output_gate)
        if has_gated_norm and f"{prefix}g_norm.weight" in weights:  # The checkpoint was saved with fuse_norm=False.
            weights[f"{prefix}g_norm_swish_gate.weight"] = weights.pop(f"{prefix}g_norm.weight")
        convolutions = [f"{prefix}{x}_conv1d.weight" for x in "qkv"]
        if mixer == "gla" and all(name in weights for name in convolutions):
            weights[f"{prefix}conv.weight"] = torch.cat([weights.pop(name) for name in convolutions])
    return weights
