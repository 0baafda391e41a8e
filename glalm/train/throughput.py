"""Measure a run's speed: tokens per second, model FLOPs utilization, peak memory, and tokens read of each source."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from glalm.config.run import RunConfig
from glalm.data.loader import Windows
from glalm.data.order import Order
from glalm.model.flops import model_cost
from glalm.train.environment import peak_flops
from glalm.train.state import BatchPlan

Item = TypeVar("Item")


class ThroughputMeter:
    """Measure speed and memory from the last `restart` on.

    MFU, model FLOPs utilization (Chowdhery et al., arXiv 2204.02311, appendix B), is

        tokens/s per GPU * FLOPs per token of forward and backward pass (glalm.model.flops) / bfloat16 peak of the GPU

    Recomputation by activation checkpointing does not count. MFU is None where the GPU's peak is unknown.
    """

    def __init__(self, config: RunConfig, plan: BatchPlan, device: torch.device, step: int):
        self.tokens_per_step = plan.tokens_per_step
        self.num_processes = plan.data_parallel * plan.context_parallel
        self.device = device
        peak = peak_flops(device)
        flops_per_token = model_cost(config.model, config.data.seq_len).training
        self.mfu_per_speed = peak and flops_per_token / peak  # MFU per token/s of one GPU
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

    def metrics(self, step: int) -> dict[str, float | None]:
        """Return the metrics of the steps since the last restart. Call it after the device has finished `step`."""
        steps = step - self.step
        seconds = time.perf_counter() - self.start_time
        speed_per_gpu = steps * self.tokens_per_step / seconds / self.num_processes
        metrics = {
            "tokens_per_second": speed_per_gpu * self.num_processes,
            "tokens_per_second_per_gpu": speed_per_gpu,
            "mfu": self.mfu_per_speed and speed_per_gpu * self.mfu_per_speed,
            "data_wait_seconds": self.data_wait / steps,  # per step
        }
        if self.device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30  # of this process
        return metrics


class SourceTokenCounter:
    """Count the tokens that a run has read of each source of its data."""

    def __init__(self, config: RunConfig, windows: Windows, step: int):
        self.order = Order(config.seed, config.batch_size, windows.source_windows, config.data.weights)
        self.window_length = windows.length
        self.step = step
        has_sources = len(windows.source_windows) > 1
        self.windows_read = self.order.count_windows(0, step) if has_sources else {}

    def metrics(self, step: int) -> dict[str, int]:
        """Return {"tokens/SOURCE": tokens read in the steps up to `step`}, or nothing if there is only one source.

        `step` must not decrease from call to call.
        """
        if self.windows_read:
            for source, count in self.order.count_windows(self.step, step).items():
                self.windows_read[source] += count
            self.step = step
        return {f"tokens/{source}": count * self.window_length for source, count in self.windows_read.items()}
