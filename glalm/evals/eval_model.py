"""Opens what is evaluated: a run's checkpoint, an exported folder, or any transformers causal language model."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import LongTensor, Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from glalm import IGNORE_INDEX
from glalm.config.run import DATA_RECORD, RunConfig
from glalm.config.strict import ConfigError, build_dataclass, require
from glalm.data.files import file_sha256
from glalm.data.shards import TokenSet, read_manifest, select_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.evals.result_files import read_json
from glalm.hf import MODEL_TYPES, GLALMConfig, GLALMForCausalLM
from glalm.model.cache import StateCache
from glalm.model.loss import token_losses
from glalm.model.precision import choose_precision
from glalm.train import checkpoint, run_dir
from glalm.train.checkpoint import CheckpointError

LOGITS_AT_ONCE = 2**25  # held in float32: 128 MiB


@dataclass
class Subject:
    """A model as evaluators see it: ready on its device, in evaluation mode, whatever made it.

    start: the ids that a document begins with, as the model was trained, (bos,) or (); None: those that preparation
    with the tokenizer puts there. train_length: tokens, where it is known. document_boundaries:
    data.document_boundaries in training; None: the run's. max_length: tokens, where the model cannot read more (learned
    positions), else None. run: the config of the run that it is a checkpoint of. folder: where eval/ and plots/ go.
    """

    model: PreTrainedModel
    name: str = "model"
    tokenizer: Tokenizer | None = None
    start: tuple[int, ...] | None = None
    train_length: int | None = None
    document_boundaries: str | None = None
    max_length: int | None = None
    checksum: str = ""
    precision: str = "fp32"
    run: RunConfig | None = None
    folder: Path = Path()
    data_fingerprint: str | None = None  # of the data that the run was trained on
    tokenizer_fingerprint: str | None = None  # of the tokenizer that it was trained with, where that is on record
    data_manifest: dict | None = None  # of that data as it was then

    def __post_init__(self):
        model = self.model
        if self.start is None:
            self.start = tuple(self.tokenizer.bos_ids) if self.tokenizer else ()
        if self.document_boundaries is None:
            self.document_boundaries = self.run.data.document_boundaries if self.run else "ignore"
        self.device: torch.device = model.device
        self.parameters: int = sum(p.numel() for p in model.parameters())
        self.ours = isinstance(model, GLALMForCausalLM)
        # Some models scale or cap their logits after the head: these give logits only, all of them.
        self._head = model.get_output_embeddings() if self.ours or _head_gives_logits(model) else None
        self._takes = inspect.signature(model.forward).parameters.keys()

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def recurrent(self) -> bool:
        """Whether what it carries from token to token has one size."""
        return "attention" not in self.model.config.layer_mixers() if self.ours else self.model._is_stateful

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @cached_property
    def state_size(self) -> int:
        """Bytes of the state of one sequence after one token: of each token, where the model is not recurrent."""
        _, state = self.read(torch.zeros(1, 1, dtype=torch.int64, device=self.device), keep_state=True)
        return state_bytes(state)

    def autocast(self) -> AbstractContextManager:
        """What to run the model in. Ours has float32 weights; others' are loaded in their precision."""
        mixed = self.ours and self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    # ------------------------------------------------------------------------------------------------- reading

    @torch.no_grad()
    def score(self, input_ids: LongTensor, targets: LongTensor, state=None) -> tuple[Tensor, object]:
        """Cross-entropy in nats of each target [B, T] given the tokens up to it, float32 [B, T] (0 where the target is
        IGNORE_INDEX), and the state to go on from: of one size where the model is recurrent, else all keys and values.

        Raises ConfigError where a transformers model cannot go on from a state.
        """
        if self.ours:
            return self.model.score(input_ids, targets, state)
        features, state = self.read(input_ids, state=state, keep_state=True)
        if self._head is not None and self._head.bias is None:
            return token_losses(features, self._head.weight, targets), state
        parts = [
            F.cross_entropy(logits, goal, reduction="none", ignore_index=IGNORE_INDEX)
            for logits, goal in self.predictions(features.flatten(0, 1), targets.flatten())
        ]
        return torch.cat(parts).view(targets.shape), state

    @torch.no_grad()
    def read(
        self, input_ids: LongTensor, mask: Tensor | None = None, state=None, keep_state: bool = False
    ) -> tuple[Tensor, object]:
        """What `logits` makes the logits of each position of, [B, T, ...], and the state, if it is to be kept.

        mask [B, tokens of the state + T]: 0 at padding, all of it on the left; None: there is none.
        """
        if state is not None and not (self.ours or self.can_resume):
            raise ConfigError(f"{self.name}: transformers' {type(self.model).__name__} cannot go on from a state")
        more = {}
        if mask is not None:
            more["attention_mask"] = mask
            if not self.ours and "position_ids" in self._takes:
                more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if state is not None or (self._caches and keep_state):
            more["past_key_values"] = DynamicCache(config=self.model.config) if state is None else state
        body = self.model if self._head is None else self.model.base_model
        out = body(input_ids=input_ids, use_cache=keep_state, **more)
        features = out.logits if self._head is None else out.last_hidden_state
        if not keep_state:
            return features, None
        return features, out.past_key_values if self.can_resume else "none that can be gone on from"

    def logits(self, features: Tensor) -> Tensor:
        """[..., vocabulary] float32, of what `read` gave at any positions."""
        return (features if self._head is None else self._head(features)).float()

    def predictions(self, features: Tensor, targets: LongTensor) -> Iterator[tuple[Tensor, LongTensor]]:
        """Logits [n, vocabulary] of features [N, ...] that `read` gave, and their targets [n]: a part at once."""
        size = max(1, LOGITS_AT_ONCE // self.vocab_size)
        for part, goal in zip(features.split(size), targets.split(size), strict=True):
            yield self.logits(part), goal

    @property
    def can_resume(self) -> bool:
        """Whether many tokens can be read on from a state; transformers' recurrent models take one at a time."""
        return self.ours or self._caches

    @property
    def _caches(self) -> bool:
        return not self.ours and not self.model._is_stateful and "past_key_values" in self._takes

    def repeat(self, state, rows: LongTensor):
        """The states of the sequences `rows` [B'], for as many sequences that go on from them."""
        if isinstance(state, StateCache):
            return StateCache(tree_map(lambda x: x.index_select(0, rows), state.states), state.seen)
        state.batch_select_indices(rows)
        return state

    # ------------------------------------------------------------------------------------------------- demands

    def need_length(self, length: int, key: str) -> None:
        """ConfigError, naming the key that asked for it, where the model cannot read `length` tokens."""
        require(
            self.max_length is None or length <= self.max_length,
            f"{key}: {self.name} has learned positions for {self.max_length} tokens and cannot read {length}; "
            f"write {self.max_length} or less",
        )

    def need_tokenizer(self, evaluator: str) -> Tokenizer:
        require(
            self.tokenizer is not None,
            f"evals=[{evaluator}]: {self.name} comes with no tokenizer that can be read; put its tokenizer.json (or "
            "tokenizer.model) beside the model, or write data_path=... with data that was prepared with it",
        )
        require(
            self.tokenizer_fingerprint in (None, self.tokenizer.fingerprint),
            f"evals=[{evaluator}]: {self.name} was trained with another tokenizer than the data has now; prepare it "
            "with that, or write data_path=... with data that was",
        )
        return self.tokenizer

    def need_train_length(self, evaluator: str) -> int:
        require(
            self.train_length is not None,
            f"evals=[{evaluator}]: {self.name} does not say at what length it was trained; write train_length=...",
        )
        return self.train_length


def state_bytes(state) -> int:
    """Of the tensors in a StateCache or in a transformers cache's layers, each counted once."""
    held = state.states if isinstance(state, StateCache) else [vars(layer) for layer in getattr(state, "layers", ())]
    tensors = {x.untyped_storage().data_ptr(): x for x in tree_leaves(held) if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


# ------------------------------------------------------------------------------------------------------- opening


def open_subject(config: EvalConfig, device: torch.device) -> Subject:
    """What config.checkpoint names, checked against its checksums where it has any.

    Raises ConfigError when there is no such thing, when it is damaged, or is no causal language model.
    """
    path = Path(config.checkpoint).expanduser()
    precision = choose_precision(config.precision, device)
    try:
        if re.fullmatch(r"latest|step_\d+", config.checkpoint):
            return open_checkpoint(config, find_checkpoint(config), device, precision)
        if (path / checkpoint.MANIFEST).is_file():
            return open_checkpoint(config, path, device, precision)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint={config.checkpoint}: {error}") from error
    return open_pretrained(config, path if path.is_dir() else download(config.checkpoint), device, precision)


def find_checkpoint(config: EvalConfig) -> Path:
    """latest or step_N of the run. Raises CheckpointError where it is not there."""
    require(
        (config.folder / "run.json").is_file(),
        f"{config.folder} holds no run (run.json is missing); make one with python train.py name={config.name}",
    )
    return run_dir.find_checkpoint(config.folder / "checkpoints", config.checkpoint)


def open_checkpoint(config: EvalConfig, path: Path, device: torch.device, precision: str) -> Subject:
    """A checkpoint of training, also away from its run's folder. Raises CheckpointError where a checksum differs."""
    path = path.resolve()
    folder = path.parent.parent
    checkpoint.verify_checkpoint(path)
    state, record = checkpoint.read_metadata(path), run_dir.read_run_record(path)
    run = build_dataclass(TrainingRun, record["config"]) if record else None
    data = (read_json(folder / DATA_RECORD) if record else None) or {}
    model = GLALMForCausalLM(GLALMConfig.from_pretrained(path))
    checkpoint.load_model(path, model)
    return Subject(
        model=model.to(device).eval(),
        name=f"{folder.name}/{path.name}" if run else path.name,
        tokenizer=run_tokenizer(config, run),
        train_length=config.train_length or state["identity"]["data.seq_len"],
        document_boundaries=state["identity"]["data.document_boundaries"],
        checksum=checkpoint.weights_sha256(path),
        precision=precision,
        run=run,
        folder=Path(config.out or folder) if run else results_folder(config, path.name),
        data_fingerprint=record["identity"]["data fingerprint"] if record else None,
        tokenizer_fingerprint=(data.get("tokenizer") or {}).get("fingerprint"),
        data_manifest=data,
    )


def open_pretrained(config: EvalConfig, path: Path, device: torch.device, precision: str) -> Subject:
    """A folder that from_pretrained reads: ours, those of other projects' GLA models, or any transformers' own."""
    where = f"checkpoint={config.checkpoint}"
    require((path / "config.json").is_file(), f"{where}: {path} has no config.json: it is no model's folder")
    files = sorted(path.glob("*.safetensors"))
    require(bool(files), f"{where}: {path} has no .safetensors; pickled weights are not read: convert them first")
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    ours = kind in MODEL_TYPES
    # Ours stay in float32 under autocast, as in training; others run in the precision asked for, as the harness has it.
    dtype = torch.bfloat16 if precision == "bf16" and not ours else torch.float32
    try:
        cls = GLALMForCausalLM if ours else AutoModelForCausalLM
        model, info = cls.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"{where}: transformers cannot load {path}: {error}") from error
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}
    require(not wrong, f"{where}: the weights in {path} are not those of its config.json: {wrong}")
    tokenizer = folder_tokenizer(path, kind == GLALMConfig.model_type)
    others_length = getattr(model.config, "max_position_embeddings", None)
    name = path.name if Path(config.checkpoint).expanduser().is_dir() else config.checkpoint
    return Subject(
        model=model.to(device).eval(),
        name=name,
        tokenizer=tokenizer,
        start=document_start(path, tokenizer, kind == GLALMConfig.model_type),
        train_length=config.train_length or getattr(model.config, "train_length", others_length),
        document_boundaries=getattr(model.config, "document_boundaries", None),
        max_length=learned_positions(model),
        checksum=checksum_of([path / "config.json", *files]),  # other settings make another model of the same weights
        precision=precision,
        folder=results_folder(config, name),
        tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
    )


def results_folder(config: EvalConfig, name: str) -> Path:
    """Where results go of a model that is no run's. Raises ConfigError where that is a run's folder."""
    folder = Path(config.out) if config.out else Path(config.runs_dir) / name.replace("/", "--")
    require(
        not (folder / "run.json").exists(),
        f"checkpoint={config.checkpoint}: {folder} holds a run of that name; write out=FOLDER for this model's results",
    )
    return folder


def download(name: str) -> Path:
    """The folder of a model of the Hugging Face hub: its weights in safetensors, its config and its tokenizer."""
    require(
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith("."),
        f"checkpoint={name}: there is no such folder. Write latest or step_N (of the run name=...), the folder of a "
        "checkpoint or of a transformers model, or a model's name on the Hugging Face hub",
    )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the hub's client raises its own, httpx's and the operating system's
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"checkpoint={name}: no such folder, and no model of that name can be had from the hub ({reason})"
        ) from error


def checksum_of(files: list[Path]) -> str:
    """The sha256 of the files' sha256s."""
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def learned_positions(model: PreTrainedModel) -> int | None:
    """The most tokens that a model with a table of positions can read, None where there is no table."""
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and re.search(r"wpe|pos", n)]
    return getattr(model.config, "max_position_embeddings", None) if tables else None


@torch.no_grad()
def _head_gives_logits(model: PreTrainedModel) -> bool:
    """Whether the logits are the head's of the last hidden state, and nothing is done to them afterwards."""
    head, ids = model.get_output_embeddings(), torch.arange(4, device=model.device)[None]
    if not isinstance(head, nn.Linear):
        return False
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.in_features:
        return False
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.allclose(head(hidden).float(), logits.float(), rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------- tokenizers and data


def run_tokenizer(config: EvalConfig, run: RunConfig | None) -> Tokenizer | None:
    """That of data_path, or of the data that the run was trained on; None where that is not there any more."""
    folder = Path(config.data_path or (run.data.path if run else "."))
    with suppress(FileNotFoundError, ValueError, KeyError):
        return Tokenizer(folder / read_manifest(folder)["tokenizer"]["name"])


def folder_tokenizer(path: Path, ours: bool) -> Tokenizer | None:
    """Of our exports the SentencePiece model that data was prepared with, beside which is transformers' form of it."""
    original = path / "tokenizer.model"
    with suppress(FileNotFoundError, ValueError, KeyError):
        return Tokenizer(original if ours and original.is_file() else path)


def document_start(path: Path, tokenizer: Tokenizer | None, ours: bool) -> tuple[int, ...] | None:
    """What stands before a text: what transformers' own tokenizer puts there; None, of ours: what preparation does."""
    if tokenizer is None or ours or not (path / "tokenizer.json").is_file():
        return None
    first = AutoTokenizer.from_pretrained(path)("a").input_ids[:1]
    return (tokenizer.bos_id,) if first == [tokenizer.bos_id] else ()


def open_split(config: EvalConfig, subject: Subject, split: str) -> TokenSet:
    """A split of config.data_path, or of the data that the run was trained on.

    Raises ConfigError when it is missing or damaged, was prepared anew since the run, or with another tokenizer.
    """
    folder = config.data_path or (subject.run.data.path if subject.run else None)
    require(folder is not None, f"{subject.name} is no run's checkpoint: write data_path=, a folder of prepared data")
    try:
        tokens = TokenSet(folder, split, select_manifest(Path(folder), subject.data_manifest))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data_path={folder}: {error}") from error
    require(
        config.data_path is not None or tokens.fingerprint == subject.data_fingerprint,
        f"{folder} is not the data that this run was trained on: it was prepared anew since; prepare the old "
        f"data again, or write data_path={folder} to evaluate on the new (its tokenizer must be the old one)",
    )
    require(
        tokens.vocab_size <= subject.vocab_size,
        f"data_path={folder} has a vocabulary of {tokens.vocab_size}, the model one of {subject.vocab_size}; "
        "prepare it with the tokenizer that the model was trained with (scripts/prepare_data.py --tokenizer)",
    )
    require(
        subject.tokenizer_fingerprint in (None, tokens.tokenizer_fingerprint),
        f"data_path={folder} was prepared with another tokenizer than {subject.name} has; prepare it with that "
        "(scripts/prepare_data.py --tokenizer)",
    )
    return tokens
