"""Open the inputs of an evaluation: a run's checkpoint, an exported folder or a hub model; its tokenizer; its data."""

import hashlib
import logging
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from glalm.config.run import DATA_RECORD, RunConfig
from glalm.config.saved_run import suggest_run
from glalm.config.strict import ConfigError, build_dataclass, require
from glalm.data.files import file_sha256
from glalm.data.loader import Windows
from glalm.data.shards import TokenSet, read_manifest, require_set, select_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.evals.eval_model import EvalModel
from glalm.evals.identity import TEXT_FILE
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.evals.result_files import load_results, read_json
from glalm.hf import MODEL_TYPE_WITH_CODE, MODEL_TYPES, GLALMConfig, GLALMForCausalLM
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.plan import SKIP_ADVICE
from glalm.prepare.records import TEXT_OPTION
from glalm.train import checkpoint, run_dir
from glalm.train.checkpoint import CheckpointError
from glalm.train.parallel import choose_precision

logger = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------------- the model


def open_eval_model(config: EvalConfig, device: torch.device) -> EvalModel:
    """Open the model that `config.checkpoint` names, and verify its checksums where it has any.

    Raises:
        ConfigError: There is no such model, it is damaged, it is not a causal language model, or the folder of its
            results has those of another model.
    """
    model = _open_model(config, device)
    for path, record in load_results(model.output_folder, skip_damaged=True).items():
        require(
            record.get("model_id") in (None, model.model_id),
            f"checkpoint={config.checkpoint}: {path} is a result of another model of that name ({record.get('model')}, "
            f"weights {record['checksum'][:12]}, not {model.checksum[:12]}); write out=FOLDER for this model's results",
        )
    return model


def _open_model(config: EvalConfig, device: torch.device) -> EvalModel:
    path = Path(config.checkpoint).expanduser()
    precision = choose_precision(config.precision, device)
    is_of_run = re.fullmatch(r"latest|step_\d+", config.checkpoint)
    try:
        if is_of_run:
            require(
                (config.folder / "run.json").is_file(),
                f"{config.folder} is not a run (run.json is missing)."
                f"{suggest_run(Path(config.runs_dir), config.name, 'name=')} To train one, run: glalm train "
                f"name={config.name}",
            )
            path = run_dir.find_checkpoint(config.folder / "checkpoints", config.checkpoint)
        if is_of_run or (path / checkpoint.MANIFEST).is_file():
            return open_checkpoint(config, path, device, precision)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint={config.checkpoint}: {error}") from error
    require(
        config.weights == "current",
        f"weights=average is for checkpoints of training, and checkpoint={config.checkpoint} is none; remove it",
    )
    return open_pretrained(config, path if path.is_dir() else download_model(config.checkpoint), device, precision)


def open_checkpoint(config: EvalConfig, path: Path, device: torch.device, precision: str) -> EvalModel:
    """Open a checkpoint of training, which may lie outside of its run's folder.

    Raises:
        CheckpointError: A file does not match its checksum.
    """
    path = path.resolve()
    folder = path.parent.parent
    checkpoint.verify_checkpoint(path)
    metadata = checkpoint.read_metadata(path)
    identity = metadata["identity"]
    # Only a checkpoint in its own run's folder has a record: a copy elsewhere must not write into another run's folder.
    record = run_dir.read_run_record(path)
    run_config = build_dataclass(TrainingRun, record["config"]) if record else None
    manifest = (read_json(folder / DATA_RECORD) if record else None) or {}
    causal_lm = GLALMForCausalLM(GLALMConfig.from_pretrained(path))
    checkpoint.load_model(path, causal_lm, config.weights)
    return EvalModel(
        causal_lm=causal_lm.to(device).eval(),
        name=f"{folder.name}/{path.name}" if record else path.name,
        tokenizer=load_run_tokenizer(config, run_config) or open_tokenizer(path),
        train_length=config.train_length or identity["data.seq_len"],
        document_boundaries=identity["data.document_boundaries"],
        weights=config.weights,
        checksum=checkpoint.weights_sha256(path, config.weights),
        model_id=metadata["run"] if record else "",
        precision=precision,
        run_config=run_config,
        step=metadata["step"],
        output_folder=Path(config.out or folder) if record else choose_output_folder(config, path.name),
        data_fingerprint=record["identity"]["data fingerprint"] if record else None,
        tokenizer_fingerprint=(manifest.get("tokenizer") or {}).get("fingerprint"),
        data_manifest=manifest,
    )


def open_pretrained(config: EvalConfig, path: Path, device: torch.device, precision: str) -> EvalModel:
    """Open a folder that from_pretrained reads: our export, another project's GLA model, or any model of transformers.

    Raises:
        ConfigError: transformers cannot load it, or its weights do not fit its config.json.
    """
    where = f"checkpoint={config.checkpoint}"
    beside = "" if path.parent == Path(config.runs_dir) else f" runs_dir={path.parent}"
    is_run = (path / "run.json").is_file()
    require(not is_run, f"{where} is the folder of a run. Remove it and write name={path.name}{beside}")
    require((path / "config.json").is_file(), f"{where}: {path} has no config.json, so it is not a model's folder")
    files = sorted(path.glob("*.safetensors"))
    require(bool(files), f"{where}: {path} has no .safetensors; convert its weights, pickled ones are not read")
    model_type = (read_json(path / "config.json") or {}).get("model_type")
    is_export = model_type in (GLALMConfig.model_type, MODEL_TYPE_WITH_CODE)
    causal_lm = load_pretrained(path, where, is_export or model_type in MODEL_TYPES, precision)
    tokenizer, document_prefix = load_folder_tokenizer(path, is_export)
    tokenizer = tokenizer or load_run_tokenizer(config, None)
    max_positions = getattr(causal_lm.config, "max_position_embeddings", None)
    # The config is part of the checksum: the same weights with other settings are another model.
    checksums = map(file_sha256, [path / "config.json", *files])
    name = path.name if Path(config.checkpoint).expanduser().is_dir() else config.checkpoint
    return EvalModel(
        causal_lm=causal_lm.to(device).eval(),
        name=name,
        tokenizer=tokenizer,
        document_prefix=document_prefix,
        train_length=config.train_length or getattr(causal_lm.config, "train_length", max_positions),
        document_boundaries=getattr(causal_lm.config, "document_boundaries", None),
        max_length=count_learned_positions(causal_lm),
        checksum=hashlib.sha256("".join(checksums).encode()).hexdigest(),
        precision=precision,
        output_folder=choose_output_folder(config, name),
        tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
    )


def load_pretrained(path: Path, where: str, is_ours: bool, precision: str) -> PreTrainedModel:
    """Return the model in the folder `path`. Its weights are those of the files, all of them and no others."""
    # Our weights stay in float32 and run under autocast, as in training. Other models are loaded in the precision to
    # run in, as lm-evaluation-harness does.
    dtype = torch.bfloat16 if precision == "bf16" and not is_ours else torch.float32
    try:
        model_class = GLALMForCausalLM if is_ours else AutoModelForCausalLM
        causal_lm, info = model_class.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"{where}: transformers cannot load {path}: {error}") from error
    wrong = {problem: sorted(map(str, names))[:3] for problem, names in info.items() if names}
    require(not wrong, f"{where}: the weights in {path} do not fit its config.json: {wrong}")
    return causal_lm


def choose_output_folder(config: EvalConfig, name: str) -> Path:
    """Return where the results of a model outside of a run are written. Raise ConfigError where that is a run."""
    folder = Path(config.out) if config.out else Path(config.runs_dir) / name.replace("/", "--")
    require(
        not (folder / "run.json").exists(),
        f"checkpoint={config.checkpoint}: {folder} holds a run of that name; write out=FOLDER for this model's results",
    )
    return folder


def download_model(name: str) -> Path:
    """Return the local folder of a model of the Hugging Face hub: its safetensors, config and tokenizer."""
    require(
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith("."),
        f"checkpoint={name}: there is no such folder. Write latest or step_N (of the run name=...), the folder of a "
        "checkpoint or of a transformers model, or a model's name on the Hugging Face hub",
    )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # The hub's client raises its own errors, httpx's and the operating system's.
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"checkpoint={name}: there is no such folder, and the hub gave no model of that name ({reason})"
        ) from error


def count_learned_positions(causal_lm: PreTrainedModel) -> int | None:
    """Return how many tokens a model with a table of positions can read. None: it has no such table."""
    for name, module in causal_lm.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"wpe|pos", name):
            return getattr(causal_lm.config, "max_position_embeddings", None)
    return None


# ---------------------------------------------------------------------------------------------- tokenizers and data


def load_run_tokenizer(config: EvalConfig, run_config: RunConfig | None) -> Tokenizer | None:
    """Return the tokenizer of `config.data_path`, or else of the run's data. None: there is none, or not any more."""
    folder = config.data_path or (run_config.data.path if run_config else None)
    if folder is None:
        return None
    with suppress(FileNotFoundError, ValueError, KeyError):
        return open_tokenizer(Path(folder) / read_manifest(Path(folder))["tokenizer"]["name"])
    return None


def open_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer of a file or folder. None: there is none, or, with a warning, it cannot be used."""
    try:
        return Tokenizer(path)
    except (FileNotFoundError, KeyError, ValueError) as error:
        if path.is_file() or any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            logger.warning(f"The tokenizer cannot be used: {error}")
        return None


def load_folder_tokenizer(path: Path, is_export: bool) -> tuple[Tokenizer | None, tuple[int, ...] | None]:
    """Return the tokenizer of a model's folder, if it has one, and the ids that transformers' own puts before a text.

    Our exports hold the SentencePiece model that prepared the data, beside its conversion for transformers. For them,
    and where transformers has no tokenizer of its own, the ids are None: those of data preparation.
    """
    original = path / "tokenizer.model"
    tokenizer = open_tokenizer(original if is_export and original.is_file() else path)
    if tokenizer is None or is_export or not (path / "tokenizer.json").is_file():
        return tokenizer, None
    first = AutoTokenizer.from_pretrained(path, trust_remote_code=False)("a").input_ids[:1]
    return tokenizer, (tokenizer.bos_id,) if first == [tokenizer.bos_id] else ()


def open_windows(tokens: TokenSet, length: int, evaluator: str, reset_state: bool = False) -> Windows:
    """Return the windows of a split or a file. Raise ConfigError where it is shorter than one."""
    option = {"perplexity": "train_length", "extrapolation": "extrapolation.max_length"}[evaluator]
    require(
        tokens.split != TEXT_FILE or tokens.num_tokens > length,
        f"evals=[{evaluator}]: {tokens.folder} has {tokens.num_tokens} tokens, and a window of {length} reads "
        f"{length + 1}; name a longer file, or write {option}={tokens.num_tokens - 1} or less",
    )
    try:
        return Windows(tokens, length, reset_state=reset_state)
    except ValueError as error:
        raise ConfigError(f"evals=[{evaluator}]: {error}") from error


def describe_data(tokens: TokenSet) -> dict[str, str]:
    """Return the settings of an evaluator that say which data it read."""
    return {"data_path": str(tokens.folder), "data_sha256": tokens.sha256, "split": tokens.split}


def open_text(config: EvalConfig, model: EvalModel) -> TokenSet:
    """Tokenize the file `config.text` with the model's tokenizer, as data preparation does, and open all of it.

    Raises:
        ConfigError: The model has no tokenizer, or the file cannot be read, or has no text.
    """
    saved = (model.data_manifest or {}).get("settings", {})
    text_field = config.text_field or saved.get("text_field", "text")
    return _prepare_text(Path(config.text).expanduser(), text_field, model.require_tokenizer("text"))


@lru_cache(maxsize=1)  # Several evaluators of one command read the same file.
def _prepare_text(path: Path, text_field: str, tokenizer: Tokenizer) -> TokenSet:
    """Return the documents of a file as one split, whose shards are mapped into memory and gone from the disk."""
    with TemporaryDirectory(prefix="glalm-") as folder:
        saved_tokenizer = Path(folder) / tokenizer.save(Path(folder))
        options = {"held_out": {}, "text_field": text_field, "workers": 1, "progress": False}
        try:
            prepare_data([path], Path(folder) / "set", tokenizer=saved_tokenizer, **options)
        except ValueError as error:
            advice = str(error).replace(TEXT_OPTION, "text_field=FIELD").removesuffix(SKIP_ADVICE)
            raise ConfigError(f"text={path}: {advice}") from error
        tokens = TokenSet(Path(folder) / "set", "train")
    tokens.folder = path
    tokens.split = TEXT_FILE
    return tokens


def check_data_path(folder: str) -> None:
    """Raise ConfigError if `folder` is no prepared data."""
    require(
        not Path(folder).is_file(),
        f"data_path={folder} is a file, not a folder of prepared data; to read it as it lies, write text={folder}",
    )
    require_set(f"data_path={folder}", Path(folder))


def open_split(config: EvalConfig, model: EvalModel, split: str) -> TokenSet:
    """Open a split of `config.data_path`, or else of the data that the run was trained on; or all of `config.text`.

    Raises:
        ConfigError: It is missing, damaged, or prepared with another tokenizer, or the run's data was replaced.
    """
    if config.text is not None:
        return open_text(config, model)
    folder = config.data_path or (model.run_config.data.path if model.run_config else None)
    require(
        folder is not None,
        f"{model.name} is not a checkpoint of a run: write data_path=FOLDER (prepared data) or text=FILE",
    )
    try:
        tokens = TokenSet(folder, split, select_manifest(Path(folder), model.data_manifest))
    except (OSError, ValueError) as error:
        where = f"data_path={folder}" if config.data_path else f"{folder}, the data of the run"
        raise ConfigError(f"{where}: {error}") from error
    require_data_of_model(tokens, folder, config, model)
    return tokens


def require_data_of_model(tokens: TokenSet, folder: str, config: EvalConfig, model: EvalModel) -> None:
    """Raise ConfigError where the data in `folder` has another tokenizer than the model, or is not the run's now."""
    require(
        config.data_path is not None or tokens.fingerprint == model.data_fingerprint,
        f"{folder} is not the data that this run was trained on: it was prepared anew since; prepare the old "
        f"data again, or write data_path={folder} to evaluate on the new data (prepared with the same tokenizer)",
    )
    require(
        tokens.vocab_size <= model.vocab_size,
        f"data_path={folder} has a vocabulary of {tokens.vocab_size}, the model one of {model.vocab_size}; "
        "prepare it with the tokenizer that the model was trained with (glalm prepare --tokenizer)",
    )
    require(
        model.tokenizer_fingerprint in (None, tokens.tokenizer_fingerprint),
        f"data_path={folder} was prepared with another tokenizer than {model.name} has; prepare it with that "
        "(glalm prepare --tokenizer)",
    )
