"""Write a model as a checkpoint of flash-linear-attention 0.6. glalm.hf reads such checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from glalm.config.strict import require
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.decoder import CausalLM
from glalm.model.fla_checkpoints import FEATURE_MAPS, FORMATS, MIXERS, SHARED_FIELDS
from glalm.model.mixers.attention import attention_heads
from glalm.model.written_weights import apply_umask, collect_weights, explain_misfit

ARCHITECTURES = {"gla": "GLAForCausalLM", "retnet": "RetNetForCausalLM", "transformer": "TransformerForCausalLM"}


def export_checkpoint(model: GLALMForCausalLM, folder: str | Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, which flash-linear-attention loads.

    Raises:
        ConfigError: That library has no model that computes the same, or `model` is not what its config describes.
        ValueError: A weight is quantised.
    """
    with torch.device("meta"):
        expected = CausalLM(model.config.to_model_config())
    weights = collect_weights(model)
    misfit = explain_misfit(weights, expected)
    require(not misfit, misfit)
    tree = config_to_fla(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights_to_fla(weights, model.config), folder / "model.safetensors", metadata={"format": "pt"})
    apply_umask(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
    model.generation_config.save_pretrained(folder)


def config_to_fla(config: GLALMConfig) -> dict:
    """Return the config.json of the flash-linear-attention model that computes the same.

    Raises:
        ConfigError: There is no such model.
    """
    mixers = set(config.layer_mixers())
    kinds = [kind for kind, mixer in MIXERS.items() if mixers == {mixer} or mixers - {"attention"} == {mixer}]
    require(
        len(kinds) == 1,
        f"flash-linear-attention has no model with layers of {', '.join(sorted(mixers))}. It has models of "
        f"{', '.join(MIXERS.values())}, and of attention with one of the others",
    )
    [kind] = kinds
    require(
        config.intermediate_size > 0,
        "model.intermediate_size=0 cannot be exported: flash-linear-attention has an MLP in every layer",
    )
    tree = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], **FORMATS[kind]}
    tree |= {name: getattr(config, name) for name in (*SHARED_FIELDS, "intermediate_size")}

    num_heads, num_kv_heads = attention_heads(config)
    softmax = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "window_size": config.attention.window,
        "rope_theta": config.attention.rope_theta,
    }
    if kind == "transformer":
        return tree | softmax
    tree |= {name: getattr(config, name) for name in ("num_heads", "expand_k", "expand_v")}
    layers = [layer for layer, mixer in enumerate(config.layer_mixers()) if mixer == "attention"]
    tree["attn"] = {"layers": layers, "qkv_bias": False, **softmax} if layers else None
    if kind == "gla":
        tree |= gla_to_fla(config)
    return tree


def gla_to_fla(config: GLALMConfig) -> dict:
    """Return the fields of config.json that only flash-linear-attention's GLA has."""
    gla = config.gla
    for name, value, fixed in (
        ("gla.gate", gla.gate, "vector"),
        ("gate_low_rank_dim", config.gate_low_rank_dim, 16),
        ("gate_logit_normalizer", config.gate_logit_normalizer, 16),
    ):
        require(
            value == fixed,
            f"model.{name}={value} cannot be exported: in flash-linear-attention it is always {fixed}",
        )
    return {
        "num_kv_heads": gla.num_kv_heads,
        "clamp_min": gla.min_log_gate,
        "use_output_gate": gla.output_gate,
        "use_short_conv": gla.short_conv > 0,
        "conv_size": gla.short_conv or 4,
        "feature_map": next(name for name, ours in FEATURE_MAPS.items() if ours == gla.feature_map),
    }


def weights_to_fla(weights: dict[str, Tensor], config: GLALMConfig) -> dict[str, Tensor]:
    """Split our weights as flash-linear-attention does with fuse_norm=True. weights_from_fla is the inverse."""
    weights = dict(weights)
    for layer, mixer in enumerate(config.layer_mixers()):
        prefix = f"model.layers.{layer}.attn."
        if mixer == "gla" and config.gla.short_conv:
            widths = [weights[f"{prefix}{x}_proj.weight"].shape[0] for x in "qkv"]
            convolutions = weights.pop(f"{prefix}conv.weight").split(widths)
            for x, convolution in zip("qkv", convolutions, strict=True):
                weights[f"{prefix}{x}_conv1d.weight"] = convolution.contiguous()
    return weights
