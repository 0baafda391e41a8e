"""The weights of a model as a file holds them: those that a new model of the same config has, and nothing else."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glalm.model.plain import is_plain_tensor

MERGE = "Merge the adapters into the weights, by peft's model.merge_and_unload(), before it is saved."
UNPRUNE = "Make the pruning permanent, by torch.nn.utils.prune.remove(module, 'weight'), before it is saved."
PARAMETRISATIONS = "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
ADVICE = {  # part of the names that a change of the model gives to its weights: how to undo it
    "lora_": MERGE,
    "base_layer.": MERGE,
    "base_model.": MERGE,
    "weight_mask": UNPRUNE,
    "weight_orig": UNPRUNE,
    "weight_g": "Remove the weight norm, by torch.nn.utils.remove_weight_norm(module), before it is saved.",
    "parametrizations.": f"Remove the parametrisations, by {PARAMETRISATIONS}, before it is saved.",
}
CHANGE = "Change model.config to describe the model, or the model to what its config describes."
COMPILED = "_orig_mod."  # torch.compile puts this into the names of all that it wraps.


def collect_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `model` with the names it has without torch.compile, ready to be written.

    Weights that accelerate has offloaded are loaded. Weights that share memory are copied, unless the config ties them.

    Raises:
        ValueError: A weight is quantised.
    """
    weights = model.state_dict()
    if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in weights.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model  # takes a second

        weights = get_state_dict_offloaded_model(model)
    weights = {name.replace(COMPILED, ""): tensor for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if not (is_plain_tensor(tensor) and tensor.is_floating_point()):
            kind = f"{tensor.dtype}, {tensor.layout}" if type(tensor) is Tensor else type(tensor).__name__
            raise ValueError(
                f"{name} is not a plain floating-point tensor ({kind}), so the model is quantised or sparse. Save the "
                "model that it was made from, and quantise what from_pretrained loads."
            )
    tied = {"lm_head.weight"} if ties_embeddings(model) else set()
    addresses = set()
    for name, tensor in weights.items():
        if tensor.data_ptr() in addresses and name not in tied:
            weights[name] = tensor.clone()
        addresses.add(tensor.data_ptr())
    return weights


def explain_misfit(weights: Mapping[str, Tensor], expected: nn.Module) -> str:
    """Return why `expected`, a new model of the config, cannot load these weights, and what to do; or nothing.

    Only names and shapes of `expected` matter, so it may be on the meta device.
    """
    shapes = {name: tensor.shape for name, tensor in expected.state_dict().items()}
    is_tied = ties_embeddings(expected) and "lm_head.weight" in shapes
    if is_tied and "lm_head.weight" not in weights:
        del shapes["lm_head.weight"]
    for problem, names in (
        ("holds weights that its config has no place for:", weights.keys() - shapes.keys()),
        ("lacks", shapes.keys() - weights.keys()),
    ):
        if names:
            return f"The model {problem} {list_some(names)}. {advise(weights) or CHANGE}"
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            return f"{name} is {list(weights[name].shape)}, in a model of its config {list(shape)}. {CHANGE}"
    head = weights.get("lm_head.weight")
    if is_tied and head is not None and not torch.equal(head, weights["model.embeddings.weight"].to(head.device)):
        return (
            "lm_head.weight is not the weight of the embeddings, though the config ties the two. Set "
            "model.config.tie_word_embeddings = False."
        )
    return ""


def ties_embeddings(model: nn.Module) -> bool:
    """Return whether the config of `model`, a CausalLM or its transformers face, ties the head to the embeddings."""
    config: Any = model.config
    return config.tie_word_embeddings


def advise(names: Iterable[str]) -> str:
    """Return how to undo the change of a model that gave its weights these names, if the names show it."""
    return next((advice for part, advice in ADVICE.items() if any(part in name for name in names)), "")


def list_some(names: Iterable[str], count: int = 4) -> str:
    """Return the first of `names`, sorted, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def apply_umask(path: str | os.PathLike) -> None:
    """Give a file the permissions of a new file. safetensors makes its files readable by their owner alone."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    new.touch()
    try:
        shutil.copymode(new, path)
    finally:
        new.unlink()
