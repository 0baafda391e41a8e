"""Export a checkpoint of a run as a folder that transformers loads: weights, tokenizer, generation config, model card.

A checkpoint of several processes, which from_pretrained does not read, can be exported too.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, LlamaTokenizer, PreTrainedTokenizerBase

import glalm
from glalm.compat.mixer_code import find_mixer_packages, write_mixer_code
from glalm.config.run import DATA_RECORD, Weights
from glalm.config.stages import Milestone, describe_stage
from glalm.config.strict import RunError, build_dataclass
from glalm.data.files import read_json, temporary_folder
from glalm.data.shards import MANIFEST_SHAPE, read_manifest
from glalm.data.tokenizer import PROBE, Tokenizer
from glalm.evals.identity import describe_conditions
from glalm.evals.options import TrainingRun
from glalm.evals.result_files import load_results
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.mixers import import_mixer
from glalm.train.checkpoint import index_weights, read_metadata, verify_checkpoint, weights_sha256
from glalm.train.run_dir import RUN_RECORD, find_checkpoint
from glalm.train.staging import read_tensors

logger = logging.getLogger(__name__)

# Two tokenizers that encode this text and each of its lines alike count as the same.
SAMPLE = PROBE.replace("<s></s>", "") + " The quick brown fox, (1 + 2) * 3 == 9;\n\n\tdef f(x):\n        return x\n"
# The options of a run that say where files are on this machine. Those that only name the run are left out of its card.
RUN_FOLDERS = ("runs_dir", "resume")
PATH_OPTIONS = ("path", "init_from", "resume_from", "data_dir")
NO_SCORES = "No scores were measured for this checkpoint."
MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [glalm]
---

# {name}

A causal language model, pretrained with glalm. To load it, install glalm {version}: `pip install .` in a clone of its
repository, or `pip install` of its wheel.

{loading}

## Recipe

| | |
|-|-|
{recipe}

## Scores

{scores}

## Config

```json
{config}
```
"""


def export_run(run: Path, checkpoint: str, out: Path, mixers: Iterable[str] = (), weights: Weights = "current") -> None:
    """Write a checkpoint of a run to the new folder `out`. See `export_checkpoints`.

    Args:
        run: The folder of the run.
        checkpoint: latest or step_N.
    """
    require_new_folder(out)
    export_checkpoints({find_checkpoint(run / "checkpoints", checkpoint): 1.0}, out, mixers, weights)


def require_new_folder(out: Path) -> None:
    """Raise RunError if `out` exists."""
    if out.exists():
        raise RunError(f"{out} exists. Choose another --out")


def export_checkpoints(
    shares: Mapping[Path, float], out: Path, mixers: Iterable[str] = (), weights: Weights = "current"
) -> None:
    """Write the weighted sum of checkpoints to the new folder `out`. If that fails, or is killed, `out` does not exist.

    Args:
        shares: The checkpoints, in their runs' folders, and the share of each. They must be of one model and tokenizer;
            the other settings are those of the first.
        mixers: `package.module:Class` of every mixer of the user's own code that the model has.
        weights: Which weights of the checkpoints.

    Raises:
        ConfigError: One of the mixers cannot be imported, or is not among `mixers`.
        RunError: `out` exists, the data of the run has another tokenizer by now, or transformers cannot represent it.
            Or a mixer of the user's own needs other files of theirs.
        CheckpointError: A checkpoint is damaged, or lacks the weights.
        FileNotFoundError: The data of the run or its tokenizer is missing.
    """
    for mixer in mixers:
        import_mixer(mixer)
    run = next(iter(shares)).parents[1]
    record = read_json(run / RUN_RECORD, {"config": dict, "versions": dict})
    config = build_dataclass(TrainingRun, record["config"])
    packages = find_mixer_packages(config.model)
    model = GLALMForCausalLM(GLALMConfig.from_model_config(config.model))
    load_weighted_sum(shares, model, weights)
    tokenizer_path, tokenizer = open_run_tokenizer(run, Path(config.data.path))
    hf_tokenizer = load_hf_tokenizer(tokenizer_path, tokenizer)
    complete_configs(model, config, tokenizer, hf_tokenizer.pad_token_id)

    with temporary_folder(out) as folder:
        model.save_pretrained(folder)
        hf_tokenizer.save_pretrained(folder)
        if tokenizer_path.is_file():
            shutil.copy(tokenizer_path, folder)
        write_mixer_code(folder, packages)
        loading = format_loading(packages)
        card = format_model_card(shares, weights, record, config, model.num_parameters(), loading)
        (folder / "README.md").write_text(card, encoding="utf-8", errors="surrogateescape")
        folder.rename(out)
    for name, package in packages.items():
        code = f"is in the package {package}; its code was not copied" if package else "has its code in this folder"
        logger.info(f"{out}: the mixer {name} {code}")


def complete_configs(
    model: GLALMForCausalLM, config: TrainingRun, tokenizer: Tokenizer, pad_token_id: int | None
) -> None:
    """Set what the run and its tokenizer decide in the model's config, and its generation config."""
    model.config.bos_token_id = tokenizer.bos_id
    model.config.eos_token_id = tokenizer.eos_id
    model.config.pad_token_id = pad_token_id
    # Evaluators read these two. max_position_embeddings would not do, because generate() takes it for a limit.
    model.config.train_length = config.data.seq_len
    model.config.document_boundaries = config.data.document_boundaries
    token_ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**token_ids, do_sample=True, temperature=0.8)


def open_run_tokenizer(run: Path, data: Path) -> tuple[Path, Tokenizer]:
    """Return the tokenizer that a run was trained with, and its file or folder in the run's `data`.

    Raises:
        RunError: The data has another tokenizer by now.
        FileNotFoundError: The data or its tokenizer is missing.
    """
    path = data / read_manifest(data)["tokenizer"]["name"]
    tokenizer = Tokenizer(path)
    if tokenizer.fingerprint != read_json(run / DATA_RECORD, MANIFEST_SHAPE)["tokenizer"]["fingerprint"]:
        raise RunError(
            f"{data} has another tokenizer now than {run} was trained with. Prepare it again with the tokenizer of the "
            "run (glalm prepare --tokenizer)"
        )
    return path, tokenizer


@torch.no_grad()
def load_weighted_sum(shares: Mapping[Path, float], model: nn.Module, weights: Weights = "current") -> None:
    """Set the parameters of `model` to the sum of the checkpoints' weights, each times its share.

    Checkpoints are verified, and read one tensor at a time. One checkpoint with a share of 1 is loaded bit for bit.

    Raises:
        CheckpointError: A checkpoint is damaged, holds another model, or lacks the weights.
    """
    parameters = dict(model.named_parameters())
    for number, (path, share) in enumerate(shares.items()):
        verify_checkpoint(path)
        stored = index_weights(path, parameters, weights)
        for name, parameter in parameters.items():
            tensor = torch.empty_like(parameter)
            read_tensors(stored, {name: tensor})
            if number == 0:
                parameter.copy_(tensor.mul_(share))
            else:
                parameter.add_(tensor, alpha=share)


def load_hf_tokenizer(path: Path, tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Return transformers' tokenizer for the file or folder `path`, from which `tokenizer` was loaded.

    Raises:
        RunError: It gives other ids than `tokenizer`, with which the model was trained.
    """
    if path.is_file():
        return load_llama_tokenizer(path, tokenizer)
    hf_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if hf_tokenizer.pad_token is None:
        hf_tokenizer.pad_token = hf_tokenizer.convert_ids_to_tokens(tokenizer.eos_id)
    return hf_tokenizer


def load_llama_tokenizer(path: Path, tokenizer: Tokenizer) -> LlamaTokenizer:
    """Convert a SentencePiece model, and pad with its unknown token, which every such model has.

    See load_hf_tokenizer.
    """
    texts = [SAMPLE, *SAMPLE.splitlines()]
    # transformers does not read from a SentencePiece model whether it adds a space before the text.
    for adds_space in (False, True):
        hf_tokenizer = LlamaTokenizer.from_pretrained(
            path.parent, legacy=False, add_prefix_space=adds_space, add_bos_token=bool(tokenizer.bos_ids)
        )
        hf_tokenizer.pad_token = hf_tokenizer.unk_token
        if all(hf_tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text) for text in texts):
            return hf_tokenizer
    raise RunError(
        f"transformers encodes text to other ids than the SentencePiece model {path}, so nothing was exported. It "
        "supports byte-pair encoding (glalm tokenizer --type bpe), but no unigram models"
    )


def format_loading(packages: dict[str, str | None]) -> str:
    """Return the card's lines on the mixers that are not glalm's, and on how to load the model.

    Args:
        packages: What find_mixer_packages returned.
    """
    lines = []
    imports = ["import glalm.hf  # registers the architecture"]
    trust = ""
    for name, package in packages.items():
        if package is not None:
            lines.append(f"The token mixer `{name}` is in the Python package `{package}`: install it, too.")
            if ":" in name:
                imports += ["from glalm.model.mixers import import_mixer", f'import_mixer("{name}")']
        else:
            lines.append(f"The code of the token mixer `{name}` is in this folder. Read it before you trust it.")
            trust = ", trust_remote_code=True"
    code = [
        *imports,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})',
    ]
    return "\n".join([*lines, *([""] if lines else []), "```python", *dict.fromkeys(code), "```"])


def format_model_card(
    shares: Mapping[Path, float], weights: Weights, record: dict, config: TrainingRun, parameters: int, loading: str
) -> str:
    """Return the model card: how to load the model, how it was trained, its scores and its config.

    Args:
        shares, weights: As of `export_checkpoints`.
        record: The content of run.json of the first checkpoint's run.
        parameters: The number of parameters.
        loading: What format_loading returned.
    """
    recipe = {
        "parameters": f"{parameters:,}",
        **describe_recipe(shares, weights, config),
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    return MODEL_CARD.format(
        name=config.name,
        version=glalm.__version__,
        loading=loading,
        recipe="\n".join(f"| {name} | {value} |" for name, value in recipe.items()),
        scores=NO_SCORES if len(shares) > 1 else format_scores(next(iter(shares)), weights),
        config=json.dumps(shorten_paths(record["config"]), indent=1),
    )


def shorten_paths(config: Mapping[str, object]) -> dict[str, object]:
    """Return a run's config with the last part of each path, so that a card does not reveal where files are."""
    public = {}
    for name, value in config.items():
        if name in RUN_FOLDERS:
            continue
        if isinstance(value, Mapping):
            value = shorten_paths(value)
        elif name in PATH_OPTIONS and isinstance(value, str):
            value = Path(value).name
        public[name] = value
    return public


def describe_recipe(shares: Mapping[Path, float], weights: Weights, config: TrainingRun) -> dict[str, object]:
    """Return how the model was trained, which checkpoints it has and their shares in it, by the names on its card."""
    model = config.model
    optim = config.optim
    metadata = max(map(read_metadata, shares), key=lambda metadata: metadata["tokens"])
    config = dataclasses.replace(config)
    config.milestones = [Milestone(*values) for values in metadata["milestones"]]  # They count the steps of warm-up.
    # If the batch changed when the run was resumed, the steps have different sizes.
    step_sizes = {start.tokens_per_step for start in config.milestones}
    of_tokens = f" of {step_sizes.pop():,}" if len(step_sizes) == 1 else ""
    schedule = "the schedules of the stages" if config.has_stage_schedules else f"{optim.schedule} schedule"
    checkpoints = []
    for path, share in shares.items():
        name = path.name if share == 1 else f"{share:.4g} times {path.parents[1].name}/{path.name}"
        average = "moving average, " if weights == "average" else ""
        checkpoints.append(f"{name}, {average}weights sha256 {weights_sha256(path, weights)}")
    return {
        "token mixer": ", ".join(f"`{name}`" for name in dict.fromkeys(model.layer_mixers())),
        "architecture": f"{model.num_hidden_layers} layers, width {model.hidden_size}, {model.num_heads} heads, "
        f"vocabulary {model.vocab_size:,}",
        "training tokens": f"{metadata['tokens']:,} ({metadata['step']:,} steps{of_tokens})",
        "data": Path(config.data.path).name,
        "sequence length": config.data.seq_len,
        **{f"stage {name}": describe_stage(stage) for name, stage in (config.train.stages or {}).items()},
        "optimiser": f"{optim.name}, {schedule}, peak {optim.lr:g}, floor {optim.min_lr:g}, "
        f"{config.warmup_steps} steps of warm-up, weight decay {optim.weight_decay:g}, clip {optim.grad_clip:g}",
        "seed": config.seed,
        "checkpoint": "; ".join(checkpoints),
    }


def format_scores(checkpoint: Path, weights: Weights = "current") -> str:
    """Return a table of the metrics that were measured on the weights of this checkpoint, and on what text each was."""
    rows = []
    sha256 = weights_sha256(checkpoint, weights)
    for result in load_results(checkpoint.parents[1]).values():
        if result["checksum"] == sha256:
            conditions = describe_conditions(result)
            evaluation = f"{result['evaluator']} ({conditions})" if conditions else result["evaluator"]
            metrics = {name: value for name, value in result["metrics"].items() if value is not None}
            rows += [f"| {evaluation} | {name} | {value:,.4g} |" for name, value in metrics.items()]
    if not rows:
        return NO_SCORES
    return "\n".join(["| evaluation | metric | value |", "|-|-|-|", *rows])
