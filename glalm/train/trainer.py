"""Train a model: one optimizer step, validation, and the loop around them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from shlex import quote
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._pytree import tree_map_only

from glalm import IGNORE_INDEX
from glalm.config.run import RunConfig
from glalm.config.strict import RunError
from glalm.data.checksums import DamagedData
from glalm.data.loader import (
    Batch,
    Windows,
    flatten_batch,
    sequential_batches,
    shard_batch,
    spaced_windows,
    training_batches,
)
from glalm.data.text_bytes import bits_per_byte, measure_bytes_per_target
from glalm.data.tokenizer import Tokenizer
from glalm.kernels.context_parallel import ContextShard
from glalm.kernels.graph_capture import GraphCapture
from glalm.model.cache import StateCache
from glalm.train import parallel, run_dir
from glalm.train.averaging import WeightAverage
from glalm.train.checkpoint import CheckpointSaver, CheckpointWriter, read_metadata
from glalm.train.collectives import max_over_processes
from glalm.train.compile import apply_training_forward, check_compile_limit
from glalm.train.estimate import dry_run, explain_out_of_memory
from glalm.train.float8 import check_float8_support, convert_to_float8
from glalm.train.guards import StopSignal, UpdateGuard
from glalm.train.init_weights import build_initial_model
from glalm.train.layer_statistics import gradient_norms, observe_layers, state_norms
from glalm.train.metrics import MetricsWriter
from glalm.train.optim import build_optimizers, learning_rate, set_learning_rate
from glalm.train.profile import Profiler
from glalm.train.state import BatchPlan, TrainState, plan_batches
from glalm.train.step_graph import StepGraph, check_graph_support, is_captured
from glalm.train.throughput import SourceTokenCounter, ThroughputMeter, collect_between_steps
from glalm.train.training_data import TrainingData
from glalm.train.watchdog import Watchdog

# evaluate(state, precision, heartbeat, log_text, shard) -> metrics. All ranks call it after every step and before the
# first one. It returns {} where it does not evaluate, calls `heartbeat` while it works and log_text(name, text, step)
# with summaries for the tracker, and leaves the state as it was. `shard` is `Trainer.context`.
LogText = Callable[[str, str, int], None]
Evaluate = Callable[[TrainState, str, Callable[[float], object], LogText, ContextShard | None], dict[str, float]]


def train(
    config: RunConfig, evaluate: Evaluate | None = None, checkpoint_writer: CheckpointWriter | None = None
) -> int:
    """Train the run `config.name` to its last step, or resume it.

    Args:
        config: The run's config.
        evaluate: Evaluates the model during training.
        checkpoint_writer: The disk operations of checkpoints. Tests inject faults here.

    Returns:
        0, or the number of the signal that stopped the run early.

    Raises:
        ConfigError: The config, the data and the run's folder do not fit together. Nothing has been trained.
        RunError: The run cannot continue: its data is damaged, the GPU is out of memory, too many consecutive updates
            were bad, or no checkpoint could be saved.
    """
    if config.train.dry_run:
        return dry_run(config)
    accelerator = parallel.start_processes(config)
    plans = check_devices_and_plan_batches(config, accelerator)
    training, validation = run_dir.open_data(config)
    with (
        StopSignal() as stop,
        run_dir.open_run_dir(config.folder) as lock,
        Watchdog(config.train.guard.hang_seconds, config.folder) as watchdog,
        _explain_errors(config, accelerator.num_processes),
    ):
        record = run_dir.prepare_run_record(config, training.tokens, accelerator.device)
        checkpoint = run_dir.find_resume_checkpoint(config, record)
        saved = read_metadata(checkpoint) if checkpoint else {}
        step = saved.get("step", 0)
        profiler = Profiler(config, accelerator.device, accelerator.process_index, step)  # It may refuse the config.
        run_metadata = {
            "run": record["id"],  # also the id of the tracker's run
            "identity": record["identity"],
            "resumed_from": run_dir.resolve_resume_path(config) or saved.get("resumed_from"),
            "versions": record["versions"],
        }
        trainer = Trainer(config, plans, accelerator, from_scratch=checkpoint is None)
        unwritten = run_dir.resume_run(checkpoint, trainer.state, config.seed, record["id"]) if checkpoint else []
        with (
            run_dir.recorded_run(config, record, training.tokens),
            MetricsWriter(config.folder, config, record["id"], step, accelerator.is_main_process, unwritten) as metrics,
            CheckpointSaver(
                config.folder / "checkpoints",
                config.train.checkpoint,
                metrics.log_message,
                watchdog.heartbeat,
                checkpoint_writer,
                on_saved=lambda step: run_dir.record_saved_step(config.folder, record, step),
                stage_ends=config.stage_ends,
            ) as saver,
            profiler,
        ):
            loop = TrainingLoop(
                trainer=trainer,
                training=training,
                validation=validation,
                sources=SourceTokenCounter(training, step, saved.get("source_tokens", {})),
                evaluate=evaluate,
                run_metadata=run_metadata,
                check_run_dir=partial(run_dir.check_run_dir, lock, config, record, training.tokens),
                metrics=metrics,
                saver=saver,
                profiler=profiler,
                watchdog=watchdog,
                stop=stop,
            )
            return loop.fit()


def check_devices_and_plan_batches(config: RunConfig, accelerator: Accelerator) -> list[BatchPlan]:
    """Return the plans of `plan_batches`. Raise ConfigError if the devices cannot train one of the run's phases."""
    plans = plan_batches(config, accelerator.num_processes)
    is_gpu = accelerator.device.type == "cuda"
    check_compile_limit(config, plans, is_gpu)
    check_graph_support(config, accelerator.num_processes, is_gpu)
    if config.train.float8:
        for plan in plans:
            check_float8_support(plan, accelerator.device)
    return plans


@contextmanager
def _explain_errors(config: RunConfig, world_size: int) -> Iterator[None]:
    """Turn errors of the device and of the data into RunErrors that say what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(explain_out_of_memory(config, world_size)) from error
    except DamagedData as error:
        raise RunError(
            f"data.path={config.data.path}: {error}. Prepare the data again, then run the same command to resume."
        ) from error


@dataclass(frozen=True)
class StepResult:
    """Scalars of one optimizer step. The tensors are on the device: reading them waits for the step to finish."""

    loss: Tensor  # this process's part: the mean over processes is the mean loss over all tokens with a target
    grad_norm: Tensor  # over all processes, before clipping
    lr: float
    statistics: dict[str, Tensor]  # of layers and gradients, on the steps of train.statistics_every


class Trainer:
    """A model in training. `step` takes one optimizer step, and `validate` computes the loss on validation data.

    Args:
        config: The run's config.
        plans: How the batch of each phase of the run is divided, by `plan_batches`.
        accelerator: The process's device, autocast and reductions.
        from_scratch: Whether training starts from the initial weights. If not, a checkpoint is loaded into `state`, and
            train.init_from is not read.

    Attributes:
        state: What steps change and checkpoints hold.
        plan: How the batch of the newest step is divided. Before the first step, that of the first phase.
        module: `state.model`, wrapped or sharded for training.
        context: Which shard of its sequences this process has, if several share them (parallel.context), else None.
        graph: Runs micro-batches as CUDA graphs, or None (train.cuda_graph).
    """

    def __init__(self, config: RunConfig, plans: list[BatchPlan], accelerator: Accelerator, from_scratch: bool = True):
        self.config = config
        self.plans = plans
        self.plan = plans[0]
        self.accelerator = accelerator
        self.context = parallel.find_context_shard(config.parallel.context, accelerator.device)
        model = build_initial_model(config, from_scratch).to(accelerator.device)
        if config.train.float8:
            convert_to_float8(model)
        apply_training_forward(model, config.train, accelerator.device)
        self.module = parallel.parallelize_model(model, config, accelerator)
        self.graph: StepGraph | None = None
        if is_captured(config, accelerator.num_processes, accelerator.device.type == "cuda"):
            capture = GraphCapture(accelerator.device)
            self.graph = StepGraph(model.parameters(), capture, is_required=config.train.cuda_graph is True)
        self.guard = UpdateGuard(config.train.guard, accelerator.device)
        average = WeightAverage(model, config.train.ema_decay) if config.train.ema_decay is not None else None
        self.state = TrainState(model, build_optimizers(model, config.optim), self.guard, average)

    def step(self, batch: Batch) -> StepResult:
        """Take one optimizer step, unless the guard skips it. The host waits for the device only with optim.name=muon.

        Args:
            batch: This process's share of the global batch, from `iterate_batches`.
        """
        state = self.state
        step = state.step + 1
        self.plan = self.plans[self.config.phase_index(step)]
        loss = self.accumulate_gradients(batch)
        grad_norm = parallel.gradient_norm(self.module.parameters())
        every = self.config.train.statistics_every
        statistics = self.measure_layers(batch) if every and step % every == 0 else {}
        lr = learning_rate(step, self.config)
        set_learning_rate(state.optimizers, lr)
        self.guard.step(state.optimizers, step, loss, grad_norm, self.config.optim.grad_clip)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if state.average is not None:
            state.average.update(step)
        state.step = step
        state.tokens += self.plan.tokens_per_step
        return StepResult(loss, grad_norm, lr, statistics)

    def accumulate_gradients(self, batch: Batch) -> Tensor:
        """Add the gradient of `batch` to the parameters' gradients, and return the loss as in StepResult.

        Micro-batches run one after the other.
        """
        micro_batches = split_batch(batch, self.plan.micro_batch, dim=0)
        # Each micro-batch counts by its share of the targets of all processes, times the number of processes.
        weights: list[float] | Tensor = [1 / len(micro_batches)] * len(micro_batches)
        if "starts" in batch:
            # Documents have different numbers of targets where the state is reset between them.
            targets = torch.stack([(part["labels"] != IGNORE_INDEX).sum() for part in micro_batches]).float()
            weights = targets / self.accelerator.reduce(targets.sum(), "mean")
        forward_backward = self.forward_backward
        if self.graph is not None:
            forward_backward = partial(self.graph.run, forward_backward)
        self.module.train()
        total_loss = torch.zeros((), device=self.accelerator.device)
        for micro_batch, weight in zip(micro_batches, weights, strict=True):
            is_last = micro_batch is micro_batches[-1]
            for loss in forward_backward(micro_batch, self.plan.shard_length, weight, is_last):
                total_loss += loss
        return total_loss

    def forward_backward(
        self, micro_batch: Batch, segment_length: int, weight: float | Tensor, is_last: bool
    ) -> list[Tensor]:
        """Add the gradient of a micro-batch, times `weight`, to the parameters' gradients. Return the segments' losses.

        With train.tbptt_length, the segments of a micro-batch run one after the other: the state is carried from
        segment to segment, the gradient is not (truncated backpropagation through time), so that memory holds the
        activations of one segment only.

        Gradients are averaged over processes once per step, with the last backward pass of the micro-batch `is_last`.
        """
        segments = split_batch(micro_batch, segment_length, dim=1)
        cache = None
        losses = []
        for segment in segments:
            with parallel.no_sync_unless(is_last and segment is segments[-1], self.module):
                with self.accelerator.autocast():
                    output = self.module(
                        **model_inputs(segment, self.context),
                        cache=cache,
                        return_cache=len(segments) > 1,
                        z_loss=self.config.train.z_loss,
                    )
                loss = output.loss * (weight / len(segments))
                loss.backward()
            cache = detach_cache(output.cache)
            losses.append(loss.detach())
        return losses

    @torch.no_grad()
    def measure_layers(self, batch: Batch) -> dict[str, Tensor]:
        """Return the gradient norms of groups of parameters, and statistics of each layer.

        Those of layers are over one sequence of `batch`, with train.tbptt_length over its first segment. They are
        scalars on the device. Gradients must have been accumulated. If processes share sequences, each has the
        statistics of its shard; those of packed documents then lack the states, which no process has all of.
        """
        segment = split_batch(batch, self.plan.shard_length, dim=1)[0]
        has_states = self.context is None or "starts" not in batch
        sequence = {name: x[:1] for name, x in segment.items()}
        model = self.state.model
        # Hooks do not reach into compiled blocks.
        with torch.compiler.set_stance("force_eager"), observe_layers(model) as layers, self.accelerator.autocast():
            output = self.module(**model_inputs(sequence, self.context), return_cache=has_states)
        parallel.free_gathered_weights(self.module)
        return gradient_norms(model) | layers | (state_norms(output.cache) if has_states else {})

    @torch.no_grad()
    def validate(self, windows: Windows, heartbeat: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Compute the loss on train.eval_sequences validation windows, evenly spaced.

        Args:
            windows: The validation data.
            heartbeat: Called after every batch.

        Returns:
            "val_loss", the mean cross-entropy in nats per token, and "val_perplexity", its exponential.
        """
        self.module.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)  # nats, targets
        for batch in self.iterate_validation_batches(windows):
            with self.accelerator.autocast():
                loss = self.module(**model_inputs(batch, self.context)).loss
            targets = (batch["labels"] != IGNORE_INDEX).sum()
            total += torch.stack([loss * targets, targets])
            heartbeat()
        parallel.free_gathered_weights(self.module)
        nats, targets = self.accelerator.reduce(total, "sum").tolist()
        return {"val_loss": nats / targets, "val_perplexity": perplexity(nats / targets)}

    def iterate_batches(self, data: TrainingData) -> Iterator[Batch]:
        """Yield this process's batches, from the step after `state.step` to the last."""
        for reading, plan in zip(data.phases, self.plans, strict=True):
            start_step = max(self.state.step, reading.phase.start_step)
            if start_step >= reading.phase.end_step:
                continue
            stream = training_batches(
                reading.windows,
                reading.order,
                start_step=start_step,
                stop_step=reading.phase.end_step,
                rank=self.accelerator.process_index // plan.context_parallel,
                world_size=plan.data_parallel,
                workers=self.config.data.workers,
                pin=self.accelerator.device.type == "cuda",
            )
            for _, batch in stream:
                yield self._take_share(batch, plan.segment_length)

    def iterate_validation_batches(self, windows: Windows) -> Iterator[Batch]:
        """Yield this process's share of the validation windows, with at most the tokens of a micro-batch at once."""
        most_tokens = max(plan.micro_batch * plan.seq_len for plan in self.plans)
        stream = sequential_batches(
            windows,
            max(1, most_tokens // windows.length),
            rank=self.accelerator.process_index // self.plan.context_parallel,
            world_size=self.plan.data_parallel,
            limit=self.config.train.eval_sequences,
        )
        for batch in stream:
            yield self._take_share(batch, windows.length)

    def _take_share(self, batch: Batch, segment_length: int) -> Batch:
        """Return this process's part of a batch on its device.

        Args:
            segment_length: The tokens of a segment of a sequence, over all processes that share it.
        """
        if self.context is not None:
            batch = shard_batch(batch, segment_length, self.context.rank, self.context.size)
        # `starts` stays on the host, where `model_inputs` computes shapes from it.
        device = self.accelerator.device
        on_host = ("starts", "offsets")
        return {name: x if name in on_host else x.to(device, non_blocking=True) for name, x in batch.items()}


def split_batch(batch: Batch, size: int, dim: int) -> list[Batch]:
    """Split every tensor of a batch into pieces of `size` along `dim`."""
    pieces = zip(*(x.split(size, dim) for x in batch.values()), strict=True)
    return [dict(zip(batch, piece, strict=True)) for piece in pieces]


def model_inputs(batch: Batch, context: ContextShard | None = None) -> dict[str, Any]:
    """Return the model's arguments for a batch: its rows, or one row of packed documents if it has `starts`.

    Args:
        batch: Tensors of `Windows.load_batch`, or with a context, of `shard_batch`.
        context: The place of this process in the group that shares the sequences, if it does.
    """
    batch = flatten_batch(batch) if "starts" in batch else batch
    inputs: dict[str, Any] = {"shift_labels" if name == "labels" else name: x for name, x in batch.items()}
    if context is not None:
        inputs["context"] = replace(context, rows=inputs.pop("rows", None))
    if "cu_seqlens" in inputs:
        # Its length differs from batch to batch. One compiled graph serves all lengths.
        torch._dynamo.maybe_mark_dynamic(inputs["cu_seqlens"], 0)
    return inputs


def detach_cache(cache: StateCache | None) -> StateCache | None:
    """Return the cache without its history of gradients."""
    if cache is None:
        return None
    return StateCache(tree_map_only(Tensor, Tensor.detach, cache.states), cache.seen)


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def drop_non_finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return `metrics` without infinities and NaN, which JSON does not have."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


@dataclass
class TrainingLoop:
    """The loop of a run: step, stop at signals, evaluate, log and save.

    All processes run it alike. Every checkpoint records `run_metadata`. `check_run_dir` is called before anything is
    written to the run's folder. It raises if the folder is no longer this run's, and returns whether it was removed.
    """

    trainer: Trainer
    training: TrainingData
    validation: Windows
    sources: SourceTokenCounter
    evaluate: Evaluate | None
    run_metadata: dict
    check_run_dir: Callable[[], bool]
    metrics: MetricsWriter
    saver: CheckpointSaver
    profiler: Profiler
    watchdog: Watchdog
    stop: StopSignal

    def __post_init__(self):
        self.config = self.trainer.config
        self.state = self.trainer.state
        self.stage_ends = self.config.stage_ends
        device = self.trainer.accelerator.device
        self.meter = ThroughputMeter(self.config, self.trainer.plan, device, self.state.step)
        # Measured now, because the data's folder may be gone when the run validates.
        validated = spaced_windows(self.validation, self.config.train.eval_sequences)
        tokenizer = Tokenizer(self.validation.tokens.tokenizer_path)
        self.bytes_per_token = measure_bytes_per_target(self.validation, validated, tokenizer)

    def fit(self) -> int:
        """Train to the last step. Return 0, or the number of the signal that stopped the run."""
        self._log_start()
        if self.state.step == 0:
            self.metrics.write_row({"step": 0, **drop_non_finite(self._run_evaluations())})
        with collect_between_steps() as collect_garbage:
            return self._fit_steps(collect_garbage)

    def _fit_steps(self, collect_garbage: Callable[[], None]) -> int:
        first_step = self.state.step + 1
        self.meter.restart(self.state.step)
        for batch in self.meter.time_waiting(self.trainer.iterate_batches(self.training)):
            result = self._step(batch)
            step = self.state.step
            if step == first_step:
                self.saver.warm_up(self.state)
                collect_garbage()
            is_last = step == self.config.steps
            phase = self.config.phase_at(step)
            # All processes must stop at the same step, whichever of them received the signal.
            stop_signal = max_over_processes(self.stop.received or 0)
            is_stage_end = step in self.stage_ends
            is_saving = is_stage_end or bool(stop_signal) or step % self.config.train.checkpoint.every == 0
            row: dict[str, float | None] = {"step": step}
            # A phase ends with a row, so that no row has the speed of two phases.
            if is_saving or step == phase.end_step or step % self.config.train.log_every == 0:
                row |= self._training_metrics(result)
            if stop_signal and not is_last:
                self.check_run_dir()
                self._stop_early(row)
                return stop_signal
            evaluated = self._run_evaluations()
            if len(row) > 1 or evaluated:
                row |= drop_non_finite(evaluated)
                is_saving |= self.check_run_dir()
                self.metrics.write_row(row, durable=is_saving)
                if is_saving:
                    # The row is written first. A checkpoint also saves rows that could not be written, because a
                    # resumed run can drop surplus rows but cannot recreate missing ones.
                    self._save_checkpoint(row, [*self.metrics.unwritten])
                    collect_garbage()
                self.meter.restart(step)
            self.watchdog.begin_phase(f"waiting for the data of step {step + 1}")
        self.metrics.log_message(f"Trained to step {self.config.steps}. The last checkpoint is {self.saver.finish()}.")
        return 0

    def _step(self, batch: Batch) -> StepResult:
        step = self.state.step + 1
        self.watchdog.begin_phase(f"in step {step}")
        result = self.trainer.step(batch)
        self.watchdog.begin_phase(f"after step {step}")
        self.profiler.advance(step)
        self.metrics.advance(step)
        return result

    def _stop_early(self, row: dict) -> None:
        # Save before evaluating: the scheduler that sent the signal may kill this process before the evaluations end.
        self._save_checkpoint(row, [*self.metrics.unwritten, row])
        saved = self.saver.finish()
        self.metrics.log_message(
            f"Stopped at step {self.state.step}; saved {saved}. To resume, run the same command again. "
            f"Shorter: glalm train {quote(f'resume={self.config.folder}')}"
        )
        self.metrics.write_row(row | drop_non_finite(self._run_evaluations()), durable=True)

    def _training_metrics(self, result: StepResult) -> dict[str, float | None]:
        """Return the metrics of the last step, and of the speed since the previous call. This waits for the device.

        A loss or gradient norm that is not finite is left out: its update was skipped, which the guard counts.
        """
        accelerator = self.trainer.accelerator
        scalars = torch.stack([result.loss, result.grad_norm])
        loss, grad_norm = accelerator.reduce(scalars, "mean").tolist()
        metrics: dict[str, float | None] = {}
        metrics |= drop_non_finite(
            {"loss": loss, "perplexity": perplexity(loss), "lr": result.lr, "grad_norm": grad_norm}
        )
        step = self.state.step
        graph_bytes = self.trainer.graph.peak_bytes if self.trainer.graph is not None else 0
        metrics |= {"tokens": self.state.tokens, **self.meter.metrics(step, graph_bytes)}
        is_main_process = accelerator.is_main_process
        metrics |= self.trainer.guard.check(self.training.window_ids, self.config.folder, is_main_process)
        metrics |= self.sources.metrics(step)
        if result.statistics:
            values = torch.stack(list(result.statistics.values())).tolist()
            metrics |= drop_non_finite(dict(zip(result.statistics, values, strict=True)))
        failures = {"failed_saves": self.saver.failures, "failed_writes": self.metrics.failures}
        return metrics | {name: count for name, count in failures.items() if count}

    def _run_evaluations(self) -> dict[str, float]:
        """Run validation and evaluators where they are due, and return their metrics, finite or not."""
        step = self.state.step
        metrics: dict[str, float] = {}
        if step in self.stage_ends or step % self.config.train.eval_every == 0:
            self.watchdog.begin_phase("validating")
            metrics |= self._validate()
            if self.state.average is not None:
                with self.state.average.swapped():
                    of_average = self._validate()
                metrics |= {f"average/{name}": value for name, value in of_average.items()}
        if self.evaluate is not None:
            self.watchdog.begin_phase("evaluating")
            precision = "bf16" if self.trainer.accelerator.mixed_precision == "bf16" else "fp32"
            log_text = self.metrics.tracker.log_text
            heartbeat = self.watchdog.heartbeat
            metrics |= self.evaluate(self.state, precision, heartbeat, log_text, self.trainer.context)
        if lost := ", ".join(name for name, value in metrics.items() if not math.isfinite(value)):
            self.metrics.log_message(f"warning: not finite at step {step:,}, and left out of metrics.jsonl: {lost}.")
        return metrics

    def _validate(self) -> dict[str, float]:
        metrics = self.trainer.validate(self.validation, self.watchdog.heartbeat)
        return metrics | {"val_bits_per_byte": bits_per_byte(metrics["val_loss"], self.bytes_per_token)}

    def _save_checkpoint(self, row: dict, unwritten: list[dict]) -> None:
        metadata = self.run_metadata | {"val_loss": row.get("val_loss"), "unwritten": unwritten}
        # The order of the data is a function of the seed, the step and the batches before it.
        metadata["milestones"] = [start for start in self.config.milestones if start.step < self.state.step]
        metadata["source_tokens"] = self.sources.count_up_to(self.state.step)
        self.saver.save(self.state, metadata)

    def _log_start(self) -> None:
        """Print what the run is about to do."""
        config, accelerator = self.config, self.trainer.accelerator
        is_growing = not self.training.tokens.is_complete
        growing = "; it is incomplete, and the run ignores later additions" if is_growing else ""
        epochs = 0.0
        for reading in self.training.phases:
            phase = reading.phase
            windows = reading.windows
            steps = f", steps {phase.start_step + 1:,} to {phase.end_step:,} ({phase.stage})" if phase.stage else ""
            self.metrics.log_message(
                f"{config.data.path}{steps}: {len(windows):,} windows of {windows.length} tokens, and "
                f"{windows.dropped_tokens:,} tokens at the ends of sources that do not fill one{growing}"
            )
            read = config.tokens_at(phase.end_step) - config.tokens_at(phase.start_step)
            epochs += read / windows.length / len(windows)
        parameters = sum(parameter.numel() for parameter in self.state.model.parameters())
        tokens = config.tokens_at(config.steps)
        precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
        if config.train.float8:
            precision += ", large linear layers in float8"
        sharing = f", {self.trainer.plan.context_parallel} to a sequence" if self.trainer.context else ""
        resuming = f", resuming after step {self.state.step}" if self.state.step else ""
        self.metrics.log_message(
            f"{config.folder}: {parameters / 1e6:.1f}M parameters, {tokens:,} tokens ({epochs:.2f} epochs of "
            f"{config.data.path}), {accelerator.num_processes} x {accelerator.device.type}{sharing}, "
            f"{precision}{resuming}"
        )
