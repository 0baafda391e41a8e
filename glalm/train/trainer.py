"""The training loop: from a RunConfig to a folder of checkpoints and metrics."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from glalm.config.run import RunConfig
from glalm.config.strict import RunError
from glalm.data.checksums import DamagedFile
from glalm.data.loader import Windows, training_batches
from glalm.model.decoder import CausalLM
from glalm.train import float8, optim, parallel
from glalm.train.checkpoint import CheckpointSaver, CheckpointWriter, read_metadata
from glalm.train.collectives import max_over_processes, rank_and_world_size
from glalm.train.compile import prepare_block_forwards
from glalm.train.estimate import dry_run, explain_out_of_memory
from glalm.train.guards import StopSignal, UpdateGuard
from glalm.train.init_weights import build_initial_model
from glalm.train.metrics import Metrics
from glalm.train.profile import Profiler
from glalm.train.report import Meter, SourceTokens, finite, report_start, training_row
from glalm.train.run_dir import (
    find_resume_checkpoint,
    open_data,
    open_run_dir,
    prepare_run_record,
    resolve_resume_path,
    resume_run,
    write_run_record,
)
from glalm.train.state import BatchPlan, TrainState
from glalm.train.step import on_device, update
from glalm.train.validate import validate
from glalm.train.watchdog import Watchdog

# evaluate(model, step, precision, heartbeat) -> metrics. All ranks call it after every step and before the first one.
# It returns {} where it does not evaluate, calls `heartbeat` while it works, and leaves the model as it was.
Evaluate = Callable[[CausalLM, int, str, Callable[[int], object]], dict[str, float]]


def train(
    config: RunConfig, evaluate: Evaluate | None = None, checkpoint_writer: CheckpointWriter | None = None
) -> int:
    """Trains, or resumes, the run `config.name` to its last step. Returns the signal that stopped it early, or 0.

    Raises ConfigError before any work when the config, the data and the run directory do not fit each other; RunError
    when the run cannot go on: damaged data, too little memory, BadSteps in a row, a CheckpointError.
    """
    if config.train.dry_run:
        return dry_run(config)
    accelerator = parallel.start_processes(config)
    BatchPlan.from_config(config, accelerator.num_processes)  # Raises if the batch cannot be divided.
    if config.train.float8:
        float8.check_float8_support(config, accelerator)
    data = open_data(config)
    with (
        StopSignal() as stop,
        open_run_dir(config.folder),
        Watchdog(config.train.guard.hang_seconds, *rank_and_world_size()) as watchdog,
    ):
        try:
            return fit(config, accelerator, *data, stop, watchdog, evaluate, checkpoint_writer)
        except torch.OutOfMemoryError as error:
            raise RunError(explain_out_of_memory(config, accelerator.num_processes)) from error
        except DamagedFile as error:
            raise RunError(f"data.path={config.data.path}: {error}; prepare the set again, then resume") from error


def fit(
    config: RunConfig,
    accelerator: Accelerator,
    training: Windows,
    validation: Windows,
    stop: StopSignal,
    watchdog: Watchdog,
    evaluate: Evaluate | None,
    checkpoint_writer: CheckpointWriter | None,
) -> int:
    """`train`, in a directory that is this run's alone."""
    record = prepare_run_record(config, training.tokens)
    origin = find_resume_checkpoint(config, record)
    resumed_from = resolve_resume_path(config) or (origin and read_metadata(origin).get("resumed_from"))
    metadata = partial(checkpoint_metadata, record, resumed_from)
    model, wrapped, optimizers = build(config, accelerator, anew=origin is None)
    guard = UpdateGuard(config.train.guard, accelerator.device)
    state = TrainState(model, optimizers, guard)
    unwritten = resume_run(origin, state, config.seed, record["id"]) if origin else []
    start = state.step
    write_run_record(config, record, training.tokens)
    examined = partial(examine, config, accelerator, model, wrapped, validation, evaluate, watchdog)

    with (
        Metrics(config.folder, config, record["id"], start, accelerator.is_main_process, unwritten) as metrics,
        CheckpointSaver(
            config.folder / "checkpoints", config.train.checkpoint, metrics.say, watchdog.alive, checkpoint_writer
        ) as saver,
        Profiler(config, accelerator.device, accelerator.process_index, start) as profiler,
    ):
        report_start(metrics, config, model, training, start, accelerator)
        if start == 0:
            metrics.log({"step": 0, **examined(0)})
        sources = SourceTokens(config, training, start)
        meter = Meter(config, accelerator.device, accelerator.num_processes, start, state.tokens)
        for step, batch in meter.waiting(steps(config, training, start, accelerator)):
            lr = optim.learning_rate(step, config)
            watchdog.beat(f"in step {step}")
            loss, grad_norm = update(accelerator, wrapped, optimizers, batch, config, lr, step, guard)
            watchdog.beat(f"after step {step}")
            profiler.advance(step)
            state.step = step
            state.tokens += config.tokens_per_step
            if step == start + 1:
                saver.warm_up(state)
            metrics.advance(step)
            last = step == config.steps
            stopping = max_over_processes(stop.received or 0)
            saving = last or stopping or step % config.train.checkpoint.every == 0
            row = {}
            if saving or step % config.train.log_every == 0:
                row |= training_row(accelerator, loss, grad_norm, lr, step, meter)
                row |= guard.check(sources.order, config.folder, accelerator.is_main_process)
                row |= sources.until(step) | saver.failure_metrics() | metrics.row()
            if stopping and not last:  # saved before it is examined, for which whoever stops it may not wait
                saver.save(state, metadata(row, [*metrics.unwritten, {"step": step, **row}]))
                metrics.say(f"stopped: {saver.finish()} is saved; the same command goes on from there")
                metrics.log({"step": step, **row, **examined(step)}, durable=True)
                return stopping
            row |= examined(step)
            if row:
                metrics.log({"step": step, **row}, durable=saving)
                if saving:  # after its row, which it keeps if the disk does not: resuming can drop rows, not make them
                    saver.save(state, metadata(row, metrics.unwritten))
                meter.restart(step)
            watchdog.beat(f"waiting for the data of step {step + 1}")
        metrics.say(f"trained to step {config.steps}: {saver.finish()}")
    return 0


def examine(
    config: RunConfig,
    accelerator: Accelerator,
    model: CausalLM,
    wrapped: nn.Module,
    validation: Windows,
    evaluate: Evaluate | None,
    watchdog: Watchdog,
    step: int,
) -> dict[str, float]:
    """What the model after `step` does on text that it is not trained on: of validation and `evaluate`, what is due,
    and `finite`."""
    row, last = {}, step == config.steps
    if last or step % config.train.eval_every == 0:
        watchdog.beat("validating")
        row |= validate(accelerator, wrapped, validation, config, watchdog.alive)
    if evaluate is not None:
        watchdog.beat("evaluating")
        precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        row |= evaluate(model, step, precision, watchdog.alive)
    return finite(row)


def build(
    config: RunConfig, accelerator: Accelerator, anew: bool = True
) -> tuple[CausalLM, nn.Module, list[Optimizer]]:
    """The model with its initial weights, the same on every process; the module to train it by; its optimisers.

    anew: whether these weights will be trained; else a checkpoint's take their place.
    """
    model = build_initial_model(config, anew).to(accelerator.device)
    if config.train.float8:
        float8.convert_to_float8(model)
    prepare_block_forwards(model, config.train, accelerator.device)
    wrapped = parallel.parallelize_model(model, config, accelerator)
    return model, wrapped, optim.build_optimizers(model, config.optim)


def steps(config: RunConfig, windows: Windows, start: int, accelerator: Accelerator) -> Iterator[tuple[int, dict]]:
    """(step, this process's share of its batch) from the step after `start` to the last."""
    stream = training_batches(
        windows,
        seed=config.seed,
        batch_size=config.batch_size,
        start_step=start,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        weights=config.data.weights,
        workers=config.data.workers,
        pin=accelerator.device.type == "cuda",
    )
    for index, batch in islice(stream, config.steps - start):  # no batch beyond the last step's is read
        yield index + 1, on_device(batch, accelerator)


def checkpoint_metadata(record: dict, resumed_from: str | None, row: dict, unwritten: Iterable[dict]) -> dict:
    """Return what a checkpoint records of its run. The order of the data is a function of seed and step."""
    return {
        "run": record["id"],  # also the id of the tracker's run
        "identity": record["identity"],
        "resumed_from": resumed_from,
        "versions": record["versions"],
        "val_loss": row.get("val_loss"),
        "unwritten": list(unwritten),
    }
