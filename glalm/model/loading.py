"""Checkpoints from disk or from the hub: whole or not at all, safetensors alone, and never code."""

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from glalm.compat import fla
from glalm.model.hf_config import GLALMConfig

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")  # where and how to look
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
READ_OTHERWISE = {"state_dict", "gguf_file", "variant"}  # arguments that name the weights themselves


def load(read: Callable, where: str | os.PathLike | None, *args, **kwargs) -> nn.Module:
    """A model by `read`, transformers' from_pretrained of its class, whose arguments these are.

    Beyond what that does, it reads the checkpoints of glalm.compat.fla, and raises ValueError where it would go on
    with weights that are not those of the model: a file that is no safetensors file or is cut short, weights that are
    missing, unknown or of another shape. With ignore_mismatched_sizes=True what fits is loaded, with a warning; with
    output_loading_info=True what is missing or unknown is in the report that is returned.
    """
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError("use_safetensors=False would read a pickle, which can run any code: convert it to safetensors")
    lenient, report = kwargs.pop("ignore_mismatched_sizes", False), kwargs.pop("output_loading_info", False)
    kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    kwargs["trust_remote_code"] = False  # all the code there is to run is here
    if where is None or READ_OTHERWISE & kwargs.keys():
        model, info = read(where, *args, **kwargs)
    else:
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        tree, _ = PreTrainedConfig.get_config_dict(where, **hub)
        files = weight_files(where, hub)
        if tree.get("model_type") in fla.FORMATS:
            model, info = read_converted(read, where, files, hub, *args, **kwargs)
        else:
            model, info = read(where, *args, **kwargs)
    if not lenient:
        refuse_differences(where, type(model).__name__, info, reported=report)
    return (model, info) if report else model


def weight_files(where: str | os.PathLike, hub: dict) -> list[str]:
    """The safetensors files of a folder or hub repository, each opened once to see that it is whole."""
    entry = None
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        entry = entry or cached_file(where, name, _raise_exceptions_for_missing_entries=False, **hub)
    if entry is None:
        folder = Path(where) / hub.get("subfolder", "")
        if (folder / "manifest.json").exists() and any(folder.glob("model-*-of-*.safetensors")):
            raise ValueError(
                f"{where} is a checkpoint of which several processes wrote a part each; make whole files of it: "
                f"python scripts/export_hf.py RUN --checkpoint {folder.name} --out FOLDER, and load FOLDER"
            )
        if (folder / "adapter_config.json").exists():
            raise ValueError(
                f"{where} holds a peft adapter, not a model; peft.AutoPeftModelForCausalLM.from_pretrained loads it"
            )
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        found = f"only {', '.join(pickles)}: pickles, which can run any code and are not read" if pickles else "none"
        raise ValueError(
            f"{where} must hold weights as {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}; found {found}"
        )
    files = [entry]
    if entry.endswith(SAFE_WEIGHTS_INDEX_NAME):
        files, _ = get_checkpoint_shard_files(where, entry, **hub)
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing, though {SAFE_WEIGHTS_INDEX_NAME} names it; copy it too") from error
        except SafetensorError as error:
            raise ValueError(f"{path} is cut short or no safetensors file ({error}); copy it again") from error
    return files


def read_converted(read: Callable, where, files: list[str], hub: dict, *args, **kwargs) -> tuple[nn.Module, dict]:
    """A checkpoint of another library, whose names are not all ours."""
    kwargs = {name: value for name, value in kwargs.items() if name not in HUB}
    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        config = GLALMConfig.from_pretrained(where, **hub)
    weights = {name: tensor for path in files for name, tensor in load_file(path).items()}
    if cached_file(where, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub):
        kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(where, **hub))
    model, info = read(None, *args, config=config, state_dict=fla.weights_in(weights, config), **kwargs)
    model.config.name_or_path = model.name_or_path = str(where)
    return model, info


def refuse_differences(where, model: str, info: dict, reported: bool) -> None:
    shapes = [f"{name} is {list(found)}, not {list(needed)}" for name, found, needed in info["mismatched_keys"]]
    findings = {"has weights of another shape than the config's:": shapes}
    if not reported:
        findings["has weights that the config has no place for:"] = info["unexpected_keys"]
        findings["lacks"] = info["missing_keys"]
    for what, names in findings.items():
        if names:
            some = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(
                f"{where or 'the weights given'} {what} {some}; {model} cannot be made of it. Is config.json the one "
                "that these weights were saved with? (ignore_mismatched_sizes=True goes on with what fits.)"
            )
