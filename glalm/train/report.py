"""What the loop reports of its steps: loss, speed, memory, tokens of each source."""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from glalm.config.run import RunConfig
from glalm.data.loader import Windows
from glalm.data.order import Order
from glalm.model.flops import model_cost
from glalm.train.environment import peak_flops
from glalm.train.metrics import Metrics


class Meter:
    """Speed and memory since it was started or restarted, for the row of a step.

    mfu, model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311, appendix B), is

        tokens/s of one GPU * FLOPs a token, forward and backward (glalm.model.flops) / the GPU's bfloat16 peak

    where activation checkpointing's second forward does not count; None where the peak is not known.
    """

    def __init__(self, config: RunConfig, device: torch.device, world: int, step: int, tokens: int):
        """step, tokens: that the run has behind it."""
        self.tokens_per_step, self.device, self.world = config.tokens_per_step, device, world
        self.before = tokens - step * self.tokens_per_step  # not 0 where the batch was another
        peak = peak_flops(device)
        self.utilisation = peak and model_cost(config.model, config.data.seq_len).training / peak  # a token/s
        self.restart(step)

    def restart(self, step: int) -> None:
        self.step, self.time, self.waited = step, time.perf_counter(), 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

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

    def row(self, step: int) -> dict[str, float | None]:
        """Of the steps up to `step`, whose results must have come back from the device."""
        steps, seconds = step - self.step, time.perf_counter() - self.time
        each = steps * self.tokens_per_step / seconds / self.world
        row = {
            "tokens": self.before + step * self.tokens_per_step,
            "tokens_per_second": each * self.world,
            "tokens_per_second_per_gpu": each,
            "mfu": self.utilisation and each * self.utilisation,
            "data_wait_seconds": self.waited / steps,  # a step
        }
        if self.device.type == "cuda":  # this process's
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return row


def training_row(accelerator, loss: Tensor, grad_norm: Tensor, lr: float, step: int, meter: Meter) -> dict:
    """The metrics of a step: means over processes. A loss or gradient that is not `finite` is left out: the update was
    skipped, and the guard counts it."""
    value, norm = accelerator.reduce(torch.stack([loss, grad_norm]), "mean").tolist()
    row = {"loss": value, "perplexity": math.exp(min(value, 700.0)), "lr": lr, "grad_norm": norm}
    return finite(row) | meter.row(step)


def finite(row: dict[str, float]) -> dict[str, float]:
    """`row` without infinities and NaN: JSON has no such numbers."""
    return {name: number for name, number in row.items() if math.isfinite(number)}


def report_start(metrics: Metrics, config: RunConfig, model, windows: Windows, start: int, accelerator) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    tokens = config.steps * config.tokens_per_step
    epochs = config.steps * config.batch_size / len(windows)
    unfinished = "" if windows.tokens.is_complete else "; being prepared, and the run keeps to what is there now"
    metrics.say(
        f"{config.data.path}: {len(windows):,} windows of {windows.length} tokens, {windows.dropped_tokens:,} at "
        f"the ends of sources fill none{unfinished}"
    )
    metrics.say(
        f"{config.folder}: {parameters / 1e6:.1f}M parameters, {tokens / 1e6:.1f}M tokens ({epochs:.2f} epochs of "
        f"{config.data.path}), {accelerator.num_processes} x {accelerator.device.type}, "
        f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}"
        + (", large linear layers in float8" if config.train.float8 else "")
        + (f", resuming after step {start}" if start else "")
    )


class SourceTokens:
    """Tokens of each source that a run has read so far. It only goes forward."""

    def __init__(self, config: RunConfig, windows: Windows, start: int):
        self.order = Order(config.seed, config.batch_size, windows.source_windows, config.data.weights)
        self.length, self.step = windows.length, start
        self.counts = self.order.count_windows(0, start) if len(windows.source_windows) > 1 else {}

    def until(self, step: int) -> dict[str, int]:
        """{"tokens/SOURCE": read in the steps up to `step`}; empty where there is one source."""
        if self.counts:
            more = self.order.count_windows(self.step, step)
            self.step, self.counts = step, {name: n + more[name] for name, n in self.counts.items()}
        return {f"tokens/{name}": n * self.length for name, n in self.counts.items()}
