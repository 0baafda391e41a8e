"""A run's speed: measure it, count the tokens read of each source, and collect Python's garbage between two steps."""

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

from glalm.config.run import RunConfig
from glalm.model.decoder import model_cost
from glalm.train.environment import peak_flops
from glalm.train.state import BatchPlan
from glalm.train.training_data import TrainingData

Item = TypeVar("Item")
# A full collection would begin after so many collections of the middle generation, which no process reaches.
NO_FULL_COLLECTIONS = 2**31 - 1


class ThroughputMeter:
    """Measure speed and memory from the last `restart` on.

    MFU, model FLOPs utilization (Chowdhery et al., arXiv 2204.02311, appendix B), is

        tokens/s per GPU * FLOPs per token of forward and backward pass (glalm.model.decoder) / bfloat16 peak of the GPU

    Recomputation by activation checkpointing does not count. MFU is None where the GPU's peak is unknown.
    """

    def __init__(self, config: RunConfig, plan: BatchPlan, device: torch.device, step: int):
        self.config = config
        self.num_processes = plan.world_size
        self.device = device
        peak = peak_flops(device)
        lengths = {phase.config.data.seq_len for phase in config.phases}
        flops_per_token = {length: model_cost(config.model, length).training for length in lengths if peak}
        # {window length: MFU per token/s of one GPU}, or None
        self.mfu_per_speed = {length: flops / peak for length, flops in flops_per_token.items()} if peak else None
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measure from now on, after `step`."""
        self.step = step
        self.start_time = time.perf_counter()
        self.data_wait = 0.0  # seconds
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def time_waiting(self, stream: Iterable[Item]) -> Iterator[Item]:
        """Yield the items of `stream` and measure how long each one takes to arrive."""
        start = time.perf_counter()
        for item in stream:
            self.data_wait += time.perf_counter() - start
            yield item
            start = time.perf_counter()

    def metrics(self, step: int, graph_bytes: int = 0) -> dict[str, float | None]:
        """Return the metrics of the steps since the last restart. Call it after the device has finished `step`.

        The steps must be of one phase of the run. The peak of memory is at least `graph_bytes`, the allocated memory in
        replays of CUDA graphs, which torch does not count.
        """
        steps = step - self.step
        seconds = time.perf_counter() - self.start_time
        phase = self.config.phase_at(step).config
        speed_per_gpu = steps * phase.tokens_per_step / seconds / self.num_processes
        metrics = {
            "tokens_per_second": speed_per_gpu * self.num_processes,
            "tokens_per_second_per_gpu": speed_per_gpu,
            "mfu": speed_per_gpu * self.mfu_per_speed[phase.data.seq_len] if self.mfu_per_speed else None,
            "data_wait_seconds": self.data_wait / steps,  # per step
        }
        if self.device.type == "cuda":
            peak = max(torch.cuda.max_memory_allocated(self.device), graph_bytes)
            metrics["peak_memory_gib"] = peak / 2**30  # of this process
        return metrics


class SourceTokenCounter:
    """Count the tokens that a run has read in each stage, and of each source of its data.

    Args:
        data: What the run reads after `step`.
        step: The step up to which `tokens` counts.
        tokens: {stage: {source: tokens}}, as a checkpoint has it from `count_up_to`, because batches, weights and data
            may have been others. What was read without stages counts for the stage of `step`, if there are stages now.
    """

    def __init__(self, data: TrainingData, step: int, tokens: Mapping[str, Mapping[str, int]]):
        self.phases = data.phases
        self.step = step
        self.tokens: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for stage, counts in tokens.items():
            self.tokens[stage or data.config.phase_at(step).stage].update(counts)

    def count_up_to(self, step: int) -> Mapping[str, Mapping[str, int]]:
        """Return {stage: {source: tokens}} of the steps up to `step`, which must not decrease from call to call."""
        for reading in self.phases:
            start = max(self.step, reading.phase.start_step)
            stop = min(step, reading.phase.end_step)
            if start < stop:
                windows = reading.order.count_windows(start, stop)
                counts = {source: count * reading.windows.length for source, count in windows.items()}
                self.tokens[reading.phase.stage].update(counts)
        self.step = step
        return self.tokens

    def metrics(self, step: int) -> dict[str, int]:
        """Return the tokens that are read in the steps up to `step`, which must not decrease from call to call.

        Returns:
            "tokens/SOURCE" if there are several sources. In a run with stages also "stage_tokens/STAGE" and, if there
            are several sources, "stage_tokens/STAGE/SOURCE", of the stages that have begun.
        """
        by_source: Counter[str] = Counter()
        by_stage: dict[str, int] = {}
        for stage, counts in self.count_up_to(step).items():
            by_source.update({f"tokens/{source}": count for source, count in counts.items()})
            if stage:
                by_stage[f"stage_tokens/{stage}"] = sum(counts.values())
                by_stage |= {f"stage_tokens/{stage}/{source}": n for source, n in counts.items() if len(counts) > 1}
        has_sources = len(by_source) > 1
        return {**by_source, **by_stage} if has_sources else by_stage


@contextmanager
def collect_between_steps() -> Iterator[Callable[[], None]]:
    """Within this context, collect all garbage only when the function that it yields is called.

    A full collection visits every object of the process. After imports and compilation that takes some 0.4 s, in which
    the GPU runs out of work, and the other processes wait for this one. So all processes should call the function after
    the same steps. Its first call also exempts the objects that then exist from later collections, which so take
    milliseconds; call it when imports and compilation are done. Leaving the context ends the exemption. In a process
    that has exempted objects by itself before, no others are, because ending that would end its own exemption as well.

    Collections of young objects, which are short, go on by themselves.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], NO_FULL_COLLECTIONS)
    has_own_exemption = gc.get_freeze_count() > 0
    must_freeze = not has_own_exemption

    def collect() -> None:
        nonlocal must_freeze
        gc.collect()
        if must_freeze:
            gc.freeze()
            must_freeze = False

    try:
        yield collect
    finally:
        gc.set_threshold(*thresholds)
        if not has_own_exemption:
            gc.unfreeze()
