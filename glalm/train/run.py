"""The run's directory and its data: opened, checked against each other, recorded."""

import dataclasses
import json
import uuid
from pathlib import Path

from glalm.config.run import DATA_RECORD, RunConfig, run_identity
from glalm.config.strict import ConfigError, require
from glalm.data.files import write_json
from glalm.data.loader import Windows
from glalm.data.order import check_weights
from glalm.data.shards import TokenSet, pinned_manifest
from glalm.train import checkpoint
from glalm.train.collectives import gather_or_raise, rank_and_world_size
from glalm.train.environment import environment
from glalm.train.metrics import rows
from glalm.train.resume import check_same, named

TOKENS = "data tokens"  # of training: a set may grow, and keeps its fingerprint


def open_data(config: RunConfig) -> tuple[Windows, Windows]:
    """The training and validation windows of config.data, checked against the model and the batch.

    Of a set that is still being prepared or added to, they are what was complete when the run began.
    """
    reset = config.data.document_boundaries == "reset_state"
    try:
        # The first process's, for all: the set may have grown between two processes' looks.
        [manifest, *_] = gather_or_raise(lambda: _manifest(config) if rank_and_world_size()[0] == 0 else None)
        sets = [TokenSet(config.data.path, split, manifest) for split in ("train", "validation")]
        training, validation = (Windows(s, config.data.seq_len, reset) for s in sets)
        if config.data.weights is not None:
            check_weights(config.data.weights, training.source_windows)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data.path={config.data.path}: {error}") from error
    vocabulary = training.tokens.vocab_size
    require(
        vocabulary <= config.model.vocab_size,
        f"{config.data.path} has a vocabulary of {vocabulary}, more than model.vocab_size={config.model.vocab_size}; "
        f"write model.vocab_size={vocabulary}",
    )
    return training, validation


def _manifest(config: RunConfig) -> dict:
    """Of the data as the run's own record has it; else that of the run it goes on from, of the same set; else now."""
    if config.data_record.exists() and has_begun(config.folder):
        return json.loads(config.data_record.read_text())
    origin = named(config) if TOKENS not in config.train.allow_changes else None
    record = Path(origin).parent.parent / DATA_RECORD if origin else None
    then = json.loads(record.read_text()) if record and record.exists() else None
    return pinned_manifest(Path(config.data.path), then)


def open_run(config: RunConfig, data: TokenSet) -> dict:
    """The content of run.json, made by the first process for all: the run's id, the same ever after, its identity, and
    so on. Removes what an interrupted save left.

    Raises ConfigError when the directory holds a run of another identity that has begun.
    """
    [content, *_] = gather_or_raise(lambda: _open_run(config, data) if rank_and_world_size()[0] == 0 else None)
    return content


def _open_run(config: RunConfig, data: TokenSet) -> dict:
    record = config.folder / "run.json"
    identity = run_identity(config) | {"data fingerprint": data.fingerprint, TOKENS: data.num_tokens}
    run_id = uuid.uuid4().hex[:12]
    if record.exists():
        saved = json.loads(record.read_text())
        run_id = saved["id"]
        if has_begun(config.folder):
            check_same(config, saved["identity"], identity, config.folder)
    checkpoint.clean(config.folder / "checkpoints")
    return {
        "id": run_id,
        "config": dataclasses.asdict(config),
        "identity": identity,
        **environment(config.train.float8),
    }


def has_begun(folder: Path) -> bool:
    """Whether there is a step's row or a checkpoint in a run's folder. Else its records are of a start that was refused
    at step 0, or stopped soon after, and the config may still be corrected."""
    return any(folder.glob("checkpoints/step_*")) or any(row["step"] for row in rows(folder / "metrics.jsonl"))


def record_run(config: RunConfig, content: dict, data: TokenSet) -> None:
    """Writes run.json, and pins the data: once nothing can refuse the run any more, or what was refused would be the
    run's config from then on."""

    def write() -> None:
        write_json(config.folder / "run.json", content, indent=1)
        write_json(config.data_record, data.manifest)  # which shards the run reads, now and when it is resumed

    gather_or_raise(lambda: write() if rank_and_world_size()[0] == 0 else None)
