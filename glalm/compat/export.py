"""Export a checkpoint of a run as a folder that transformers loads: weights, tokenizer, generation config, model card.

A checkpoint of several processes, which from_pretrained does not read, can be exported too.
"""

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, LlamaTokenizer, PreTrainedTokenizerBase

from glalm.config.run import DATA_RECORD
from glalm.config.strict import RunError, build_dataclass
from glalm.data.files import read_json, temporary_folder
from glalm.data.shards import MANIFEST_SHAPE, read_manifest
from glalm.data.tokenizer import PROBE, Tokenizer
from glalm.evals.identity import describe_conditions
from glalm.evals.options import TrainingRun
from glalm.evals.result_files import load_results
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.train.checkpoint import load_model, read_metadata, verify_checkpoint, weights_sha256
from glalm.train.run_dir import RUN_RECORD, find_checkpoint

# Two tokenizers that encode this text and each of its lines alike count as the same.
SAMPLE = PROBE.replace("<s></s>", "") + " The quick brown fox, (1 + 2) * 3 == 9;\n\n\tdef f(x):\n        return x\n"
MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [glalm]
---

# {name}

A causal language model, pretrained with glalm.

```python
import glalm.hf  # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

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


def export_run(run: Path, checkpoint: str, out: Path) -> None:
    """Write a checkpoint of a run to the new folder `out`. If that fails, or is killed, `out` does not exist.

    Args:
        run: The folder of the run.
        checkpoint: latest or step_N.

    Raises:
        RunError: `out` exists, the data of the run has another tokenizer by now, or transformers cannot represent it.
        CheckpointError: The checkpoint is missing or damaged.
        FileNotFoundError: The data of the run or its tokenizer is missing.
    """
    if out.exists():
        raise RunError(f"{out} exists. Choose another --out")
    path = find_checkpoint(run / "checkpoints", checkpoint)
    record = read_json(run / RUN_RECORD, {"config": dict, "versions": dict})
    config = build_dataclass(TrainingRun, record["config"])
    model = GLALMForCausalLM(GLALMConfig.from_model_config(config.model))
    verify_checkpoint(path)
    load_model(path, model)

    data = Path(config.data.path)
    tokenizer_path = data / read_manifest(data)["tokenizer"]["name"]
    tokenizer = Tokenizer(tokenizer_path)
    if tokenizer.fingerprint != read_json(run / DATA_RECORD, MANIFEST_SHAPE)["tokenizer"]["fingerprint"]:
        raise RunError(
            f"{data} has another tokenizer now than {run} was trained with. Prepare it again with the tokenizer of the "
            "run (glalm prepare --tokenizer)"
        )
    hf_tokenizer = load_hf_tokenizer(tokenizer_path, tokenizer)

    model.config.bos_token_id = tokenizer.bos_id
    model.config.eos_token_id = tokenizer.eos_id
    # Evaluators read these two. max_position_embeddings would not do, because generate() takes it for a limit.
    model.config.train_length = config.data.seq_len
    model.config.document_boundaries = config.data.document_boundaries
    token_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    model.generation_config = GenerationConfig(**token_ids, do_sample=True, temperature=0.8)

    with temporary_folder(out) as folder:
        model.save_pretrained(folder)
        hf_tokenizer.save_pretrained(folder)
        if tokenizer_path.is_file():
            shutil.copy(tokenizer_path, folder)
        card = format_model_card(path, record, config, model.num_parameters())
        (folder / "README.md").write_text(card, encoding="utf-8", errors="surrogateescape")
        folder.rename(out)


def load_hf_tokenizer(path: Path, tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Return transformers' tokenizer for the file or folder `path`, from which `tokenizer` was loaded.

    Raises:
        RunError: It gives other ids than `tokenizer`, with which the model was trained.
    """
    if path.is_dir():
        hf_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    else:
        hf_tokenizer = load_llama_tokenizer(path, tokenizer)
    if hf_tokenizer.pad_token is None:
        hf_tokenizer.pad_token = hf_tokenizer.convert_ids_to_tokens(tokenizer.eos_id)
    return hf_tokenizer


def load_llama_tokenizer(path: Path, tokenizer: Tokenizer) -> LlamaTokenizer:
    """Convert a SentencePiece model. See load_hf_tokenizer."""
    texts = [SAMPLE, *SAMPLE.splitlines()]
    # transformers does not read from a SentencePiece model whether it adds a space before the text.
    for adds_space in (False, True):
        hf_tokenizer = LlamaTokenizer.from_pretrained(
            path.parent, legacy=False, add_prefix_space=adds_space, add_bos_token=bool(tokenizer.bos_ids)
        )
        if all(hf_tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text) for text in texts):
            return hf_tokenizer
    raise RunError(
        f"transformers encodes text to other ids than the SentencePiece model {path}, so nothing was exported. It "
        "supports byte-pair encoding (glalm tokenizer --type bpe), but no unigram models"
    )


def format_model_card(checkpoint: Path, record: dict, config: TrainingRun, parameters: int) -> str:
    """Return the model card: how to load the model, how it was trained, its scores and its config.

    Args:
        record: The content of the run's run.json.
        parameters: The number of parameters.
    """
    model = config.model
    optim = config.optim
    metadata = read_metadata(checkpoint)
    # If the batch changed when the run was resumed, the steps have different sizes.
    same_batch = metadata["tokens"] == metadata["step"] * config.tokens_per_step
    of_tokens = f" of {config.tokens_per_step:,}" if same_batch else ""
    recipe = {
        "parameters": f"{parameters:,}",
        "architecture": f"{model.num_hidden_layers} layers, width {model.hidden_size}, {model.num_heads} heads, "
        f"vocabulary {model.vocab_size:,}",
        "training tokens": f"{metadata['tokens']:,} ({metadata['step']:,} steps{of_tokens})",
        "data": Path(config.data.path).name,
        "sequence length": config.data.seq_len,
        "optimiser": f"{optim.name}, {optim.schedule} schedule, peak {optim.lr:g}, floor {optim.min_lr:g}, "
        f"{config.warmup_steps} steps of warm-up, weight decay {optim.weight_decay:g}, clip {optim.grad_clip:g}",
        "seed": config.seed,
        "checkpoint": f"{checkpoint.name}, weights sha256 {weights_sha256(checkpoint)}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    # The card does not reveal where runs and data are on this machine.
    public_config = {name: value for name, value in record["config"].items() if name != "runs_dir"}
    public_config["data"] = public_config["data"] | {"path": Path(config.data.path).name}
    return MODEL_CARD.format(
        name=config.name,
        recipe="\n".join(f"| {name} | {value} |" for name, value in recipe.items()),
        scores=format_scores(checkpoint),
        config=json.dumps(public_config, indent=1),
    )


def format_scores(checkpoint: Path) -> str:
    """Return a table of the metrics that were measured on the weights of this checkpoint, and on what text each was."""
    rows = []
    sha256 = weights_sha256(checkpoint)
    for result in load_results(checkpoint.parents[1]).values():
        if result["checksum"] == sha256:
            conditions = describe_conditions(result)
            evaluation = f"{result['evaluator']} ({conditions})" if conditions else result["evaluator"]
            metrics = {name: value for name, value in result["metrics"].items() if value is not None}
            rows += [f"| {evaluation} | {name} | {value:,.4g} |" for name, value in metrics.items()]
    if not rows:
        return "No scores were measured for this checkpoint."
    return "\n".join(["| evaluation | metric | value |", "|-|-|-|", *rows])
