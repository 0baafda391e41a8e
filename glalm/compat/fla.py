"""Checkpoints of flash-linear-attention (0.6): its GLA, RetNet and Transformer models in and out.

Parameter names are nearly all the same; a config.json is translated field by field. What their format can say and our
model cannot be, or the other way round, is a ConfigError that names the field.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from glalm.config.strict import require
from glalm.model.mixers.attention import attention_heads

SHARED = {  # fields with our meaning, and their defaults there
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "vocab_size": 32000,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SWIGLU = {"hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish"}
RECURRENT = {
    "num_kv_heads": None,
    "feature_map": None,
    "use_output_gate": True,
    "elementwise_affine": True,
    "attn": None,
}
FORMATS = {  # model_type -> its other fields that change what the model computes, and their defaults
    "gla": SWIGLU
    | RECURRENT
    | {"expand_k": 0.5, "expand_v": 1.0, "num_heads": 4, "use_short_conv": False, "conv_size": 4, "clamp_min": None}
    | {"use_gk": True, "use_gv": False, "attnres_block_size": None},
    # Its use_short_conv is left out: the library's RetNet has that field and makes no convolution of it.
    "retnet": SWIGLU
    | RECURRENT
    | {"hidden_ratio": 2, "expand_k": 1.0, "expand_v": 2.0, "num_heads": 8, "attnres_block_size": None},
    "transformer": SWIGLU
    | {"num_heads": 32, "num_kv_heads": None, "qkv_bias": False, "qk_norm": False, "window_size": None}
    | {"rope_theta": 10000.0, "attnres_block_size": None},
}
MIXER = {"gla": "gla", "retnet": "retention", "transformer": "attention"}
FEATURE_MAP = {None: "identity", "relu": "relu"}  # GLA's: their names for ours
ARCHITECTURE = {"gla": "GLAForCausalLM", "retnet": "RetNetForCausalLM", "transformer": "TransformerForCausalLM"}
CANNOT_BE_OTHERWISE = {  # fields with one value that our models have an equal of
    "hidden_act": "swish",
    "elementwise_affine": True,
    "use_gk": True,
    "use_gv": False,
    "qkv_bias": False,
    "qk_norm": False,
    "attnres_block_size": None,
}


def config_in(tree: dict) -> dict:
    """The tree of our config that says what a config.json of theirs does; another project's comes back as it is.

    Raises ConfigError, naming the field, where our model cannot be what it says.
    """
    kind = tree.get("model_type")
    if kind not in FORMATS:
        return tree
    theirs = SHARED | FORMATS[kind] | {k: v for k, v in tree.items() if k in SHARED or k in FORMATS[kind]}
    for field, value in CANNOT_BE_OTHERWISE.items():
        check(field not in theirs or theirs[field] == value, kind, field, theirs.get(field), value)
    ours = {name: theirs[name] for name in SHARED} | {"model_type": "glalm", "mixer": MIXER[kind]}
    ours |= {name: tree[name] for name in ("dtype", "torch_dtype") if name in tree}
    ours["intermediate_size"] = theirs["intermediate_size"] or swiglu_width(theirs)
    if kind == "transformer":
        return ours | {
            "num_heads": theirs["num_heads"],
            "expand_k": 1.0,  # unused by attention, but every width has to be cut into the heads
            "attention": attention_in(theirs),
        }
    ours |= {name: theirs[name] for name in ("num_heads", "expand_k", "expand_v")}
    feature_map = theirs["feature_map"]
    if kind == "gla":
        check(feature_map in FEATURE_MAP, kind, "feature_map", feature_map, *FEATURE_MAP)
        ours["gla"] = {
            "feature_map": FEATURE_MAP[feature_map],
            "num_kv_heads": theirs["num_kv_heads"],
            "min_log_gate": theirs["clamp_min"],
            "output_gate": theirs["use_output_gate"],
            "short_conv": theirs["conv_size"] if theirs["use_short_conv"] else 0,
        }
    else:
        check(feature_map is None, kind, "feature_map", feature_map, None)
        check(theirs["num_kv_heads"] in (None, theirs["num_heads"]), kind, "num_kv_heads", theirs["num_kv_heads"], None)
        check(theirs["use_output_gate"], kind, "use_output_gate", False, True)
    return ours | (hybrid_in(kind, theirs["attn"], theirs["num_hidden_layers"]) if theirs["attn"] else {})


def hybrid_in(kind: str, attn: dict | list, depth: int) -> dict:
    """Our fields for their `attn`: which layers are softmax attention, and of what kind."""
    specs = attn if isinstance(attn, list) else [attn]
    require(len(specs) == 1, f"config.json's attn has {len(specs)} kinds of attention; one model here has one kind")
    wanted = isinstance(specs[0], dict) and {"layers", "num_heads"} <= specs[0].keys()
    require(wanted, f"config.json's attn is {json.dumps(attn)}; it must be a mapping with layers and num_heads")
    spec = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0} | specs[0]
    outside = not isinstance(spec["layers"], list) or [layer for layer in spec["layers"] if layer not in range(depth)]
    require(
        not outside, f"config.json's attn.layers is {json.dumps(spec['layers'])}; it must list layers 0 to {depth - 1}"
    )
    check(not spec["qkv_bias"], kind, "attn.qkv_bias", True, False)
    return {
        "layers": ["attention" if layer in spec["layers"] else MIXER[kind] for layer in range(depth)],
        "attention": attention_in(spec),
    }


def attention_in(spec: dict) -> dict:
    return {
        "num_heads": spec["num_heads"],
        "num_kv_heads": spec["num_kv_heads"],
        "window": spec["window_size"],
        "rope_theta": float(spec["rope_theta"]),
    }


def check(ok: bool, kind: str, field: str, value, *served) -> None:
    require(
        ok,
        f"config.json of model_type {kind} has {field}={json.dumps(value)}; the models here have no equal of that, "
        f"only of {field}={' or '.join(map(json.dumps, served))}",
    )


def swiglu_width(theirs: dict) -> int:
    width = int(theirs["hidden_size"] * (theirs["hidden_ratio"] or 4) * 2 / 3)
    return 256 * math.ceil(width / 256)


def config_out(config) -> dict:
    """The config.json of flash-linear-attention's model that computes what ours of this GLALMConfig does.

    Raises ConfigError where there is none.
    """
    mixers = set(config.layer_mixers())
    recurrent = mixers - {"attention"}
    kinds = [kind for kind, mixer in MIXER.items() if recurrent == {mixer} or mixers == {mixer}]
    require(
        len(kinds) == 1,
        f"flash-linear-attention's GLA, RetNet and Transformer have no layers of {', '.join(sorted(mixers))}; of "
        f"{', '.join(MIXER.values())}, or attention and one of the others, they do",
    )
    kind = kinds[0]
    tree = {name: getattr(config, name) for name in SHARED} | {"intermediate_size": config.intermediate_size}
    require(
        config.intermediate_size > 0, "model.intermediate_size=0 cannot be exported: theirs has a SwiGLU in each layer"
    )
    attention = config.attention
    heads, kv_heads = attention_heads(config)
    softmax = {"num_kv_heads": kv_heads, "window_size": attention.window, "rope_theta": attention.rope_theta}
    if kind == "transformer":
        tree |= {"num_heads": heads, **softmax}
    else:
        tree |= {name: getattr(config, name) for name in ("num_heads", "expand_k", "expand_v")}
        layers = [i for i, mixer in enumerate(config.layer_mixers()) if mixer == "attention"]
        tree["attn"] = {"layers": layers, "num_heads": heads, "qkv_bias": False, **softmax} if layers else None
    if kind == "gla":
        gla = config.gla
        for name, value, needed in (
            ("gla.gate", gla.gate, "vector"),
            ("gate_low_rank_dim", config.gate_low_rank_dim, 16),
            ("gate_logit_normalizer", config.gate_logit_normalizer, 16),
        ):
            require(value == needed, f"model.{name}={value} cannot be exported: theirs is always {needed}")
        tree |= {"num_kv_heads": gla.num_kv_heads, "clamp_min": gla.min_log_gate, "use_output_gate": gla.output_gate}
        tree |= {"use_short_conv": gla.short_conv > 0, "conv_size": gla.short_conv or 4}
        tree["feature_map"] = next(theirs for theirs, ours in FEATURE_MAP.items() if ours == gla.feature_map)
    return {"model_type": kind, "architectures": [ARCHITECTURE[kind]], **FORMATS[kind], **tree}


def weights_in(weights: dict[str, Tensor], config) -> dict[str, Tensor]:
    """Their weights under our names, for a model of this GLALMConfig."""
    weights = {k: v for k, v in weights.items() if not k.endswith("rotary.inv_freq")}  # a constant
    for layer, mixer in enumerate(config.layer_mixers()):
        attn = next((k[: k.index(".attn.") + 6] for k in weights if re.search(rf"\blayers\.{layer}\.attn\.", k)), "")
        gated = mixer == "retention" or (mixer == "gla" and config.gla.output_gate)
        if gated and f"{attn}g_norm.weight" in weights:  # saved with fuse_norm=False
            weights[f"{attn}g_norm_swish_gate.weight"] = weights.pop(f"{attn}g_norm.weight")
        convolutions = [f"{attn}{x}_conv1d.weight" for x in "qkv"]
        if mixer == "gla" and all(name in weights for name in convolutions):
            weights[f"{attn}conv.weight"] = torch.cat([weights.pop(name) for name in convolutions])
    return weights


def weights_out(weights: dict[str, Tensor], config) -> dict[str, Tensor]:
    """The inverse of weights_in, as with fuse_norm=True."""
    weights = dict(weights)
    for layer, mixer in enumerate(config.layer_mixers()):
        attn = f"model.layers.{layer}.attn."
        if mixer == "gla" and config.gla.short_conv:
            widths = [weights[f"{attn}{x}_proj.weight"].shape[0] for x in "qkv"]
            for x, part in zip("qkv", weights.pop(f"{attn}conv.weight").split(widths), strict=True):
                weights[f"{attn}{x}_conv1d.weight"] = part.contiguous()
    return weights


def export(model, folder: str | Path) -> None:
    """Writes a GLALMForCausalLM as flash-linear-attention's model: config.json, generation_config.json and weights.

    Raises ConfigError where that library has no such model, nor for one that peft has wrapped: merge_and_unload() it.
    """
    require(
        not hasattr(model, "merge_and_unload"),
        "export: the model is wrapped by peft; export what model.merge_and_unload() gives",
    )
    tree, folder = config_out(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}, Path(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights_out(weights, model.config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
    model.generation_config.save_pretrained(folder)
