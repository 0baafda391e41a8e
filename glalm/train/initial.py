"""The weights that a new run starts from: random ones, or those of train.init_from."""

import dataclasses
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from glalm.config import ModelConfig, RunConfig, compare
from glalm.config.identity import flatten
from glalm.model import GLALMConfig, GLALMForCausalLM
from glalm.strict import ConfigError, require


def initial_model(config: RunConfig, anew: bool) -> GLALMForCausalLM:
    """The model of config.model, the same on every process, on the CPU.

    A run that does not begin `anew` but from a checkpoint does not look at train.init_from again. Raises ConfigError
    when there is no model in that folder, or another one than config.model.
    """
    torch.manual_seed(config.seed)
    shape, folder = GLALMConfig(**dataclasses.asdict(config.model)), config.train.init_from
    if folder is None or not anew:
        return GLALMForCausalLM(shape)
    require(
        any((Path(folder) / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)),
        f"train.init_from={folder} is no folder with a {SAFE_WEIGHTS_NAME}; of a checkpoint that several processes "
        "wrote, scripts/export_hf.py makes one",
    )
    try:
        model = GLALMForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.init_from={folder}: {error}") from error
    there, here = (flatten({"model": fields(c)}) for c in (model.config, shape))
    if differences := compare(there, here):
        lines = "\n  ".join(differences)
        raise ConfigError(f"train.init_from={folder} holds another model than model.*:\n  {lines}")
    return model


def fields(config: ModelConfig) -> dict:
    """A ModelConfig's own, without what transformers adds."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
    return {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}
