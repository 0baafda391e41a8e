"""Load checkpoints by transformers' from_pretrained, but refuse those that do not fit the model."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from glalm.model.fla_checkpoints import FORMATS, weights_from_fla
from glalm.model.written_weights import advise, list_some

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Arguments of from_pretrained with which the caller says where the weights are.
WEIGHTS_ARGUMENTS = {"state_dict", "gguf_file", "variant"}
# The files of save_pretrained(distributed_checkpoint=True), which hold parts of tensors.
DISTRIBUTED_PARTS = "shard-*-model-*-of-*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def load_pretrained(read: Callable, where: str | os.PathLike | None, *args, **kwargs) -> nn.Module:
    """Load a model by `read`, the from_pretrained method of a transformers class, whose arguments the others are.

    This also reads published checkpoints (see glalm.model.fla_checkpoints). It reads safetensors files alone and never
    runs code of a checkpoint.

    With output_loading_info=True, missing and unknown weights are not refused but reported, as transformers does. With
    ignore_mismatched_sizes=True, everything that fits is loaded, and transformers warns about the rest.

    Raises:
        ValueError: A file is damaged or no safetensors file, or the weights are not those of the model: missing,
            unknown or of another shape. transformers would continue with random weights in their place.
    """
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError("use_safetensors=False would read a pickle, which can run any code: convert it to safetensors")
    lenient = kwargs.pop("ignore_mismatched_sizes", False)
    return_info = kwargs.pop("output_loading_info", False)
    kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    kwargs["trust_remote_code"] = False
    files = None
    if where is not None and not WEIGHTS_ARGUMENTS & kwargs.keys():
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        tree, _ = PreTrainedConfig.get_config_dict(where, **hub)
        files = find_weight_files(where, hub)
    try:
        if files is not None and tree.get("model_type") in FORMATS:
            model, info = load_translated(read, where, files, hub, *args, **kwargs)
        else:
            model, info = read(where, *args, **kwargs)
    except NotImplementedError as error:
        # transformers 5.17 compares tied weights before it reports that one of them has a wrong shape.
        raise ValueError(
            f"{where or 'the state_dict'} has a head (lm_head.weight) of another shape than the embeddings, with which "
            "its config ties it. Set tie_word_embeddings to false, or vocab_size to that of the weights."
        ) from error
    if files is not None and Path(files[0]).match(DISTRIBUTED_PARTS):
        info["unexpected_keys"] = check_distributed_parts(where, files, model)
    if not lenient:
        check_loading_info(where, type(model).__name__, info, shapes_only=return_info)
    return (model, info) if return_info else model


def find_weight_files(where: str | os.PathLike, hub: dict) -> list[str]:
    """Return the safetensors files of a folder or hub repository, after checking that each can be opened."""
    entry = None
    parts = sorted(str(path) for path in Path(where, hub.get("subfolder", "")).glob(DISTRIBUTED_PARTS))
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        entry = entry or cached_file(where, name, _raise_exceptions_for_missing_entries=False, **hub)
    if entry is None and not parts:
        raise ValueError(explain_missing_weights(where, Path(where) / hub.get("subfolder", "")))
    files = parts or [entry]  # transformers prefers the parts, too.
    if not parts and entry.endswith(SAFE_WEIGHTS_INDEX_NAME):
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


def remove_stale_weights(folder: Path, is_distributed: bool) -> None:
    """Remove the weights that a save_pretrained before the latest one left in `folder`.

    transformers removes older shards alone. It would read an older single file before the shards that replace it, and
    a distributed checkpoint together with whatever lies beside it.

    Args:
        is_distributed: Whether the latest weights are a distributed checkpoint.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    shards = []
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = [folder / name for name in dict.fromkeys(names)]
    if is_distributed:
        stale = [single, index, *shards]
    else:
        is_single = not shards or not all(shard.exists() for shard in shards)
        stale = [*folder.glob(DISTRIBUTED_PARTS), index if is_single else single]
    for path in stale:
        path.unlink(missing_ok=True)


def check_distributed_parts(where: str | os.PathLike, files: list[str], model: nn.Module) -> set[str]:
    """Return the names in a distributed checkpoint that the model does not have.

    Raises ValueError if a part of a tensor is in none of the files. torch would leave that part of the weight as it is
    in memory.
    """
    saved = Counter()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                saved[name] += math.prod(file.get_slice(name).get_shape())
    needed = {name: weight.numel() for name, weight in model.state_dict().items()}
    for name in saved.keys() & needed.keys():
        if saved[name] < needed[name]:
            raise ValueError(
                f"{where} has {saved[name]} of the {needed[name]} numbers of {name}: one of its files "
                f"({DISTRIBUTED_PARTS}) is missing; copy it too"
            )
    return saved.keys() - needed.keys()


def explain_missing_weights(where: str | os.PathLike, folder: Path) -> str:
    """Return the message for a folder without weights that can be loaded."""
    if (folder / "manifest.json").exists() and any(folder.glob("model-*-of-*.safetensors")):
        return (
            f"{where} is a checkpoint of which several processes wrote a part each. Merge them by "
            f"glalm export RUN --checkpoint {folder.name} --out FOLDER, and load FOLDER."
        )
    if (folder / "adapter_config.json").exists():
        return f"{where} holds a peft adapter, not a model; peft.AutoPeftModelForCausalLM.from_pretrained loads it"
    pickles = sorted(path.name for path in folder.glob("*") if any(path.match(pattern) for pattern in PICKLES))
    found = f"only {', '.join(pickles)}: pickles, which can run any code and are not read" if pickles else "none"
    return f"{where} must hold weights as {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}; found {found}"


def load_translated(read: Callable, where, files: list[str], hub: dict, *args, **kwargs) -> tuple[nn.Module, dict]:
    """Load a published checkpoint, whose config and parameter names glalm.model.fla_checkpoints translates."""
    kwargs = {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}
    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        config = read.__self__.config_class.from_pretrained(where, **hub)
    weights = {}
    for path in files:
        weights |= load_file(path)
    if cached_file(where, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub):
        kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(where, **hub))
    model, info = read(None, *args, config=config, state_dict=weights_from_fla(weights, config), **kwargs)
    model.config.name_or_path = model.name_or_path = str(where)
    return model, info


def check_loading_info(where, model: str, info: dict, shapes_only: bool) -> None:
    """Raise ValueError if transformers' loading report says that the weights are not those of the model."""
    shapes = [f"{name} is {list(found)}, not {list(needed)}" for name, found, needed in info["mismatched_keys"]]
    findings = {"has weights of another shape than the config's:": shapes}
    if not shapes_only:
        findings["has weights that the config has no place for:"] = info["unexpected_keys"]
        findings["lacks"] = info["missing_keys"]
    for finding, names in findings.items():
        if names:
            advice = advise(info["unexpected_keys"]) or "Check that config.json was saved together with these weights."
            raise ValueError(
                f"{where or 'the state_dict'} {finding} {list_some(names)}, so it is not a {model} of this config. "
                f"{advice} (ignore_mismatched_sizes=True loads what fits.)"
            )
