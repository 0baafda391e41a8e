"""The weights that a new run starts from: random ones, or those of train.init_from."""

import dataclasses
import json
from contextlib import suppress
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from glalm.config.run import DATA_RECORD, RunConfig, describe_differences
from glalm.config.strict import ConfigError, flatten_tree, require
from glalm.data.shards import read_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.model.config import ModelConfig
from glalm.model.decoder import GLALMForCausalLM
from glalm.model.hf_config import GLALMConfig
from glalm.train import checkpoint


def initial_model(config: RunConfig, anew: bool) -> GLALMForCausalLM:
    """The model of config.model, the same on every process, on the CPU.

    A run that does not begin `anew` but from a checkpoint does not look at train.init_from again. Raises ConfigError
    when there is no model in that folder, another one than config.model, or one of another tokenizer than the data's.
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
    there, here = (flatten_tree({"model": fields(c)}) for c in (model.config, shape))
    if differences := describe_differences(there, here):
        lines = "\n  ".join(differences)
        raise ConfigError(f"train.init_from={folder} holds another model than model.*:\n  {lines}")
    known, data = tokenizers(Path(folder)), read_manifest(Path(config.data.path))
    require(
        not known or data["tokenizer"]["fingerprint"] in known,
        f"train.init_from={folder} was trained with another tokenizer than data.path={config.data.path} was prepared "
        "with; prepare the data with the model's (scripts/prepare_data.py --tokenizer), or where the two give the same "
        "ids, take the model's out of its folder",
    )
    return model


def tokenizers(folder: Path) -> set[str]:
    """The fingerprints of the tokenizer of the model in `folder`, as far as it is on record: its run's, where it is a
    checkpoint, else the folder's own. An export has two: the SentencePiece model's and transformers' form of it."""
    data = folder.resolve().parent.parent / DATA_RECORD
    if (folder / checkpoint.MANIFEST).is_file() and data.is_file() and checkpoint.record(folder):
        return {json.loads(data.read_text())["tokenizer"]["fingerprint"]}
    found = set()
    for path, file in ((folder / "tokenizer.model", "tokenizer.model"), (folder, "tokenizer.json")):
        if (folder / file).is_file():
            with suppress(ValueError):  # one that no data can be prepared with
                found.add(Tokenizer(path).fingerprint)
    return found


def fields(config: ModelConfig) -> dict:
    """A ModelConfig's own, without what transformers adds."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
    return {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}
