"""The initial weights of a new run: random, or those of train.init_from."""

import dataclasses
from contextlib import suppress
from pathlib import Path

import torch
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from glalm.config.run import DATA_RECORD, RunConfig, describe_differences
from glalm.config.strict import ConfigError, flatten_tree, require
from glalm.data.files import read_json
from glalm.data.shards import MANIFEST_SHAPE, read_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.hf import GLALMForCausalLM
from glalm.model.decoder import CausalLM
from glalm.train import checkpoint
from glalm.train.parametrization import find_multipliers
from glalm.train.random_states import seed_generators
from glalm.train.run_dir import read_run_record, refuse_run_folder


def build_initial_model(config: RunConfig, from_scratch: bool) -> CausalLM:
    """Build the model of config.model on the CPU, with the same weights on every process, and seed all generators.

    Args:
        from_scratch: The run starts at step 0. If not, a checkpoint overwrites the weights, which have no values here.

    Raises:
        ConfigError: train.init_from holds no model, another model than config.model, or a model of another tokenizer.
    """
    seed_generators(config.seed)
    if not from_scratch:
        with no_init_weights():  # Drawing those of a 1.3B model takes 8 s.
            return CausalLM(config.model)
    if config.train.init_from is None:
        model = CausalLM(config.model)
        if config.optim.parametrization == "mup":
            multipliers = find_multipliers(config.model, config.optim)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.mul_(multipliers[name].init)
        return model

    folder = Path(config.train.init_from)
    refuse_run_folder("train.init_from", folder)
    require(
        any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)),
        f"train.init_from={folder} is not a folder with a {SAFE_WEIGHTS_NAME}. If it is a checkpoint of several "
        "processes, convert it with glalm export first.",
    )
    try:
        model = GLALMForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.init_from={folder}: {error}") from error
    stored = flatten_tree({"model": dataclasses.asdict(model.config.to_model_config())})
    expected = flatten_tree({"model": dataclasses.asdict(config.model)})
    if differences := describe_differences(stored, expected):
        lines = "\n  ".join(differences)
        raise ConfigError(f"train.init_from={folder} holds another model than model.*:\n  {lines}")
    known = tokenizer_fingerprints(folder)
    require(
        not known or read_manifest(Path(config.data.path))["tokenizer"]["fingerprint"] in known,
        f"train.init_from={folder} was trained with another tokenizer than data.path={config.data.path} was prepared "
        "with. Prepare the data with the tokenizer of the model (glalm prepare --tokenizer). If both give "
        "the same ids, remove the tokenizer from the model's folder instead.",
    )
    return model.to_core()


def tokenizer_fingerprints(folder: Path) -> set[str]:
    """Return the known fingerprints of the tokenizer with which the model in `folder` was trained.

    A checkpoint has that of its run's data. An export has two: of the SentencePiece model and of the transformers
    tokenizer made from it. A folder without a tokenizer has none.
    """
    data_record = folder.resolve().parent.parent / DATA_RECORD
    if (folder / checkpoint.MANIFEST).is_file() and data_record.is_file() and read_run_record(folder):
        return {read_json(data_record, MANIFEST_SHAPE)["tokenizer"]["fingerprint"]}
    fingerprints = set()
    for path, file in ((folder / "tokenizer.model", "tokenizer.model"), (folder, "tokenizer.json")):
        if (folder / file).is_file():
            with suppress(ValueError):  # No data can be prepared with this tokenizer.
                fingerprints.add(Tokenizer(path).fingerprint)
    return fingerprints
