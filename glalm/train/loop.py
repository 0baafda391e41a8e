"""The training loop: from a RunConfig to a folder of checkpoints and metrics."""

import dataclasses
import json
import math
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

import glalm
from glalm import config as configs
from glalm.config import RunConfig
from glalm.data.files import write_json
from glalm.data.loader import Batch, Windows, batches, packed, sequential
from glalm.data.order import Order, check_weights
from glalm.data.shards import TokenSet, read_manifest
from glalm.model import GLALMConfig, GLALMForCausalLM
from glalm.model.loss import IGNORE
from glalm.strict import ConfigError, RunError, require
from glalm.train import checkpoint
from glalm.train.guards import StopSignal
from glalm.train.metrics import Metrics
from glalm.train.optim import adamw, learning_rate

DATA = "data.json"  # in the run's folder: the manifest of the data as it was when the run began


class TrainingError(RunError):
    """Training cannot go on; what was saved before is whole."""


def train(config: RunConfig) -> int:
    """Trains, or resumes, the run `config.name` to its last step. Returns the signal that stopped it early, or 0.

    Raises ConfigError before any work when the config, the data and the run directory do not fit each other, and
    TrainingError when the loss is no longer finite.
    """
    precision = choose_precision(config.train.precision)
    accelerator = Accelerator(mixed_precision={"fp32": "no", "bf16": "bf16"}[precision])
    micro_batch, _ = config.train.accumulation(accelerator.num_processes)
    training, validation = open_data(config)
    run_id = open_run(config, training.tokens.fingerprint, accelerator.is_main_process)
    if accelerator.is_main_process:
        pin_data(config, training.tokens.manifest)
    model, optimizer = build(config, accelerator)
    start = restore(config, model, optimizer)
    wrapped = accelerator.prepare_model(model)

    saves = config.folder / "checkpoints"
    with (
        Metrics(config.folder, config, run_id, start, accelerator.is_main_process) as metrics,
        StopSignal() as stop,
    ):
        report_start(metrics, config, model, training, start, accelerator)
        if start == 0:
            metrics.log({"step": 0, **validate(accelerator, wrapped, validation, config)})
        sources = SourceTokens(config, training, start)
        clock = Clock(start)
        for step, batch in clock.waiting(steps(config, training, start, accelerator)):
            lr = learning_rate(step, config.train.steps, config.optim)
            loss, grad_norm = update(accelerator, wrapped, optimizer, batch, micro_batch, lr, config.optim.grad_clip)
            metrics.advance(step)
            last = step == config.train.steps
            stopping = any_process(accelerator, stop.received is not None)
            saving = last or stopping or step % config.train.checkpoint_every == 0
            row = {}
            if last or saving or step % config.train.log_every == 0:
                row |= training_row(accelerator, loss, grad_norm, lr, step, config, clock)
                row |= sources.until(step)
            if last or step % config.train.eval_every == 0:
                row |= validate(accelerator, wrapped, validation, config)
            if row:
                metrics.log({"step": step, **row})
                if saving:  # after its row: resuming drops rows beyond the newest checkpoint, but cannot add one
                    save(config, accelerator, model, optimizer, step)
                clock.restart(step)
            if stopping and not last:
                metrics.say(f"stopped: {saves / f'step_{step}'} is saved; the same command goes on from there")
                return stop.received or 0
        metrics.say(f"trained to step {config.train.steps}: {checkpoint.latest(saves)}")
    return 0


# ------------------------------------------------------------------------------------------------- the run's parts


def choose_precision(wanted: str) -> str:
    """`auto` is bf16 where the GPU computes in it and fp32 elsewhere. ConfigError where bf16 is not to be had."""
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if has_bf16 else "fp32"
    if wanted == "bf16" and torch.cuda.is_available() and not has_bf16:
        raise ConfigError(f"train.precision=bf16: {torch.cuda.get_device_name()} has no bf16; write fp32")
    return wanted


def open_data(config: RunConfig) -> tuple[Windows, Windows]:
    """The training and validation windows of config.data, checked against the model and the batch.

    Of a set that is still being prepared or added to, they are what was complete when the run began.
    """
    reset = config.data.boundaries == "reset"
    try:
        record = config.folder / DATA
        manifest = json.loads(record.read_text()) if record.exists() else read_manifest(Path(config.data.path))
        if torch.distributed.is_initialized():
            [manifest] = broadcast_object_list([manifest])  # the set may have grown between two processes' looks
        sets = [TokenSet(config.data.path, split, manifest) for split in ("train", "validation")]
        training, validation = (Windows(s, config.data.seq_len, reset) for s in sets)
        if config.data.weights is not None:
            check_weights(config.data.weights, training.by_source)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data.path={config.data.path}: {error}") from error
    vocabulary = training.tokens.vocab_size
    require(
        vocabulary <= config.model.vocab_size,
        f"{config.data.path} has a vocabulary of {vocabulary}, more than model.vocab_size={config.model.vocab_size}; "
        f"write model.vocab_size={vocabulary}",
    )
    return training, validation


def open_run(config: RunConfig, data_fingerprint: str, writes: bool) -> str:
    """Checks that the run directory, where there is one, holds this run, and returns the run's id, the same ever after.

    The process that `writes` makes the directory and its run.json, and removes what an interrupted save left.
    """
    record = config.folder / "run.json"
    identity = configs.identity(config) | {"data fingerprint": data_fingerprint}
    run_id = uuid.uuid4().hex[:12]
    if record.exists():
        saved = json.loads(record.read_text())
        run_id, changes = saved["id"], configs.compare(saved["identity"], identity)
        require(
            not changes,
            f"{config.folder} holds a run with another config:\n  "
            + "\n  ".join(changes)
            + "\nTo resume it, write the old values; to train anew, choose another name=...",
        )
    if writes:
        config.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(config.folder / "checkpoints")
        content = {"id": run_id, "config": dataclasses.asdict(config), "identity": identity, "versions": versions()}
        write_json(record, content, indent=1)
    return run_id


def pin_data(config: RunConfig, manifest: dict) -> None:
    """Records which shards the run reads, now and when it is resumed."""
    record = config.folder / DATA
    if not record.exists():
        write_json(record, manifest)


def versions() -> dict[str, str]:
    modules = {m.__name__: m.__version__ for m in (glalm, torch, transformers, accelerate)}
    return modules | {"python": platform.python_version()}


def build(config: RunConfig, accelerator: Accelerator) -> tuple[GLALMForCausalLM, torch.optim.AdamW]:
    """The model with its initial weights, the same on every process, and its optimiser."""
    torch.manual_seed(config.seed)
    model = GLALMForCausalLM(GLALMConfig(**dataclasses.asdict(config.model))).to(accelerator.device)
    return model, adamw(model, config.optim)


def restore(config: RunConfig, model: GLALMForCausalLM, optimizer: torch.optim.AdamW) -> int:
    """Loads the run's newest checkpoint, if it has one, and returns its step."""
    newest = checkpoint.latest(config.folder / "checkpoints")
    return checkpoint.load(newest, model, optimizer)["step"] if newest else 0


# --------------------------------------------------------------------------------------------------------- a step


def steps(config: RunConfig, windows: Windows, start: int, accelerator: Accelerator) -> Iterator[tuple[int, dict]]:
    """(step, this process's share of its batch) from the step after `start` to the last."""
    stream = batches(
        windows,
        seed=config.seed,
        batch_size=config.train.batch_size,
        start_step=start,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        weights=config.data.weights,
        workers=config.data.workers,
        pin=accelerator.device.type == "cuda",
    )
    for index, batch in stream:
        if index == config.train.steps:
            return
        yield index + 1, on_device(batch, accelerator)


def on_device(batch: Batch, accelerator: Accelerator) -> Batch:
    """The batch on the process's device, but for `starts`, of which sizes are made."""
    return {k: x if k == "starts" else x.to(accelerator.device, non_blocking=True) for k, x in batch.items()}


def model_inputs(batch: Batch) -> dict[str, Tensor | None]:
    """What the model is called with: rows, or where documents begin anew, one row of packed documents."""
    batch = packed(batch) if "starts" in batch else batch
    names = {"labels": "shift_labels"}
    return {names.get(name, name): x for name, x in batch.items()}


def update(
    accelerator: Accelerator, model, optimizer, batch: dict, micro_batch: int, lr: float, clip: float
) -> tuple[Tensor, Tensor]:
    """One optimiser step. Returns this process's part of the mean loss over all processes' scored tokens (their mean
    is that loss) and the gradient's norm before clipping, both on device."""
    splits = {name: x.split(micro_batch) for name, x in batch.items()}
    micros = [dict(zip(splits, values, strict=True)) for values in zip(*splits.values(), strict=True)]
    parts = scored_parts(accelerator, micros)
    model.train()
    total = 0.0
    for i, (micro, part) in enumerate(zip(micros, parts, strict=True)):
        # Gradients are summed across processes once a step, with the last micro-batch.
        synchronise = i == len(micros) - 1
        with accelerator.autocast(), _unless(synchronise, accelerator.no_sync, model):
            loss = model(**model_inputs(micro)).loss * part
            accelerator.backward(loss)
        total = total + loss.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


def scored_parts(accelerator: Accelerator, micros: list[Batch]) -> list[float] | Tensor:
    """Each micro-batch's part of the tokens that all processes score in a step, times the number of processes."""
    if "starts" not in micros[0]:
        return [1 / len(micros)] * len(micros)
    scored = torch.stack([(micro["labels"] != IGNORE).sum() for micro in micros]).float()
    return scored / accelerator.reduce(scored.sum(), "mean")


@torch.no_grad()
def validate(accelerator: Accelerator, model, windows: Windows, config: RunConfig) -> dict[str, float]:
    """Mean cross-entropy (nats a token) and perplexity over train.eval_sequences validation windows, evenly spaced."""
    model.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    micro_batch, _ = config.train.accumulation(world)
    total = torch.zeros(2, device=accelerator.device)  # nats, targets
    for batch in sequential(windows, micro_batch, rank=rank, world=world, limit=config.train.eval_sequences):
        batch = on_device(batch, accelerator)
        with accelerator.autocast():
            loss = model(**model_inputs(batch), use_cache=False).loss
        scored = (batch["labels"] != IGNORE).sum()
        total += torch.stack([loss * scored, scored])
    loss, tokens = accelerator.reduce(total, "sum").tolist()
    return {"val_loss": loss / tokens, "val_perplexity": math.exp(loss / tokens)}


def save(config: RunConfig, accelerator: Accelerator, model, optimizer, step: int) -> None:
    """The first process saves; the others wait, since none may run past a checkpoint that could still fail."""
    if accelerator.is_main_process:
        folder = config.folder / "checkpoints"
        checkpoint.save(folder, step, model, optimizer, {"tokens": step * tokens_per_step(config)})
        checkpoint.prune(folder, config.train.keep_checkpoints)
    accelerator.wait_for_everyone()


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process raised its flag, so that all leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def _unless(condition: bool, context, *args):
    return nullcontext() if condition else context(*args)


# ------------------------------------------------------------------------------------------------------- reporting


class Clock:
    """Seconds and steps since it was started, and how many of the seconds went by waiting for data."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self.step, self.time, self.waited = step, time.perf_counter(), 0.0

    def waiting(self, stream: Iterator) -> Iterator:
        """The items of `stream`, each waited for by this clock."""
        while True:
            begun = time.perf_counter()
            try:
                item = next(stream)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - begun
            yield item

    def tokens_per_second(self, step: int, tokens: int) -> float:
        return (step - self.step) * tokens / (time.perf_counter() - self.time)

    def data_wait(self, step: int) -> float:
        """Seconds a step."""
        return self.waited / (step - self.step)


class SourceTokens:
    """Tokens of each source that a run has read so far. It only goes forward."""

    def __init__(self, config: RunConfig, windows: Windows, start: int):
        self.order = Order(config.seed, config.train.batch_size, windows.by_source, config.data.weights)
        self.length, self.step = windows.length, start
        self.counts = self.order.counts(0, start) if len(windows.by_source) > 1 else {}

    def until(self, step: int) -> dict[str, int]:
        """{"tokens/SOURCE": read in the steps up to `step`}; empty where there is one source."""
        if self.counts:
            more = self.order.counts(self.step, step)
            self.step, self.counts = step, {name: n + more[name] for name, n in self.counts.items()}
        return {f"tokens/{name}": n * self.length for name, n in self.counts.items()}


def tokens_per_step(config: RunConfig) -> int:
    return config.train.batch_size * config.data.seq_len


def training_row(accelerator, loss: Tensor, grad_norm: Tensor, lr: float, step: int, config, clock: Clock) -> dict:
    """The metrics of a step: means over processes. Raises TrainingError when the loss or gradient is not finite."""
    value, norm = accelerator.reduce(torch.stack([loss, grad_norm]), "mean").tolist()
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise TrainingError(
            f"the loss is {value} and the gradient's norm {norm} at step {step}; the newest checkpoint is "
            f"{checkpoint.latest(config.folder / 'checkpoints') or 'none'}. Lower optim.lr under another name=..."
        )
    return {
        "loss": value,
        "perplexity": math.exp(min(value, 700.0)),
        "lr": lr,
        "grad_norm": norm,
        "tokens": step * tokens_per_step(config),
        "tokens_per_second": clock.tokens_per_second(step, tokens_per_step(config)),
        "data_wait_seconds": clock.data_wait(step),
    }


def report_start(metrics: Metrics, config: RunConfig, model, windows: Windows, start: int, accelerator) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    tokens = config.train.steps * tokens_per_step(config)
    epochs = config.train.steps * config.train.batch_size / len(windows)
    unfinished = "" if windows.tokens.is_complete else "; being prepared, and the run keeps to what is there now"
    metrics.say(
        f"{config.data.path}: {len(windows):,} windows of {windows.length} tokens, {windows.dropped_tokens:,} at "
        f"the ends of sources fill none{unfinished}"
    )
    metrics.say(
        f"{config.folder}: {parameters / 1e6:.1f}M parameters, {tokens / 1e6:.1f}M tokens ({epochs:.2f} epochs of "
        f"{config.data.path}), {accelerator.num_processes} x {accelerator.device.type}, "
        f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}"
        + (f", resuming after step {start}" if start else "")
    )
