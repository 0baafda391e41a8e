"""Decoding speed, one token at a time, and the size of the state, by the number of tokens already read.

Both are the same at every length for a recurrent model; softmax attention reads all keys and values for every token.
"""

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from glalm.config.strict import require
from glalm.evals.eval_model import EvalModel, count_state_bytes
from glalm.evals.evaluator import EvalContext, Evaluator
from glalm.evals.options import EvalConfig
from glalm.evals.plot import format_bytes, plot_decoding
from glalm.generation.cuda_graph import CudaGraphGenerator
from glalm.train import environment

LENGTHS = (1, 2, 4, 8, 16)  # training lengths
SEGMENT = 2048  # tokens read at once before decoding
WARM_UP_STEPS = 3  # tokens decoded before the first timing


class DecodeSpeedEvaluator(Evaluator):
    """Tokens a second after each of `decode_speed.lengths`."""

    def __init__(self, model: EvalModel, config: EvalConfig):
        super().__init__(model, config)
        options = config.decode_speed
        lengths = sorted(options.lengths or [n * model.require_train_length("decode_speed") for n in LENGTHS])
        require(
            model.accepts_state,
            f"evals=[decode_speed]: {model.name} does not continue a text from a cache by several tokens, which this "
            "evaluator needs",
        )
        model.require_length(lengths[-1] + WARM_UP_STEPS + options.steps * options.repeats, "decode_speed.lengths")
        self.lengths = lengths
        self.total_units = config.batch_size * sum(lengths)
        self.settings = {
            **dataclasses.asdict(options),
            "lengths": lengths,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "device": environment.device_name(model.device.type == "cuda"),
        }

    def run(self, context: EvalContext) -> dict:
        model = self.model
        unused_bytes = 0
        if model.is_ours and model.precision == "bf16":
            # Autocast would cast all float32 weights again for every token.
            model = dataclasses.replace(model, causal_lm=copy.deepcopy(model.causal_lm).bfloat16())
            unused_bytes = sum(p.nbytes for p in self.model.causal_lm.parameters())
        # Only rank 0 works, and what it reports is taken for what each group of processes does.
        measure = partial(
            measure_decoding,
            model,
            config=self.config,
            advance=lambda tokens: context.advance(tokens / context.groups),
        )
        with torch.autocast(model.device.type, enabled=False):
            rows = [context.run_on_rank_0(partial(measure, length, unused_bytes)) for length in self.lengths]
        return {"lengths": rows}

    def summarize(self, results: dict) -> list[str]:
        return [
            f"decoding after {row['length']} tokens: {row['tokens_per_second']:,.0f} tokens/s in {row['batch_size']} "
            f"sequences, state of each {format_bytes(row['state_bytes'] / row['batch_size'])}"
            for row in results["lengths"]
        ]

    def plot_results(self, record: dict, folder: Path) -> list[Path]:
        return plot_decoding([record], folder / "decode_speed.png")


@torch.no_grad()
def measure_decoding(
    model: EvalModel, length: int, unused_bytes: int, config: EvalConfig, advance: Callable[[int], object]
) -> dict:
    """Time decoding after `length` random tokens.

    Args:
        unused_bytes: GPU memory of weights that this model does not use, which is not counted in `peak_bytes`.

    Returns:
        `tokens_per_second` of the batch, the median over timings, with the `slowest` and the `fastest`; `state_bytes`
        of the batch; `peak_bytes` of GPU memory while decoding, weights included, or None on a CPU.
    """
    options = config.decode_speed
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(model.vocab_size, (config.batch_size, length), generator=generator).to(model.device)
    state = None
    for segment in tokens.split(SEGMENT, dim=1):
        features, state = model.forward_features(segment, state=state, return_state=True)
        advance(segment.numel())
    state_bytes = count_state_bytes(state)
    token = model.compute_logits(features[:, -1:]).argmax(-1)
    decode_next = make_greedy_step(model, state)
    # Free what decoding does not need, so that it is not counted in the peak.
    del features, state
    token = decode_tokens(decode_next, token, WARM_UP_STEPS)
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    speeds = []
    for _ in range(options.repeats):
        start_time = time.perf_counter()
        token = decode_tokens(decode_next, token, options.steps)
        speeds.append(config.batch_size * options.steps / (time.perf_counter() - start_time))
    return {
        "length": length,
        "batch_size": config.batch_size,
        "tokens_per_second": median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "state_bytes": state_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(model.device) - unused_bytes if is_cuda else None,
    }


def make_greedy_step(model: EvalModel, state: Any) -> Callable[[Tensor], Tensor]:
    """Return a function of a token [B, 1] that returns the likeliest next one and moves the state on.

    Our models step as generation does, by glalm/generation/cuda_graph.py.
    """
    if model.is_ours:
        step = CudaGraphGenerator(model.causal_lm).start_step(state)
        return lambda token: step(token).argmax(-1, keepdim=True)

    def read_token(token: Tensor) -> Tensor:
        nonlocal state
        features, state = model.forward_features(token, state=state, return_state=True)
        return model.compute_logits(features).argmax(-1)

    return read_token


def decode_tokens(decode_next: Callable[[Tensor], Tensor], token: Tensor, count: int) -> Tensor:
    """Return the last of `count` tokens after `token`, copied to the host and back, which waits for the GPU's work."""
    for _ in range(count):
        token = decode_next(token)
    return token.cpu().to(token.device)
