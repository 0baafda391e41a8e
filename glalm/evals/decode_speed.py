"""Tokens a second when decoding one at a time, and the bytes of the state, by the number of tokens behind.

A recurrent model's are the same at every length; softmax attention reads all its keys and values for every token.
"""

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from glalm.config.strict import require
from glalm.evals.eval_model import Subject, state_bytes
from glalm.evals.evaluator import Job, Work
from glalm.evals.options import EvalConfig
from glalm.evals.plot import bytes_of, plot_decoding
from glalm.generation.cuda_graph import CudaGraphGenerator

LENGTHS = (1, 2, 4, 8, 16)  # training lengths
SEGMENT = 2048  # tokens read at once on the way to a length
WARM_UP = 3  # tokens decoded before the first timing


def job(subject: Subject, config: EvalConfig) -> Job:
    c = config.decode_speed
    lengths = sorted(c.lengths or [n * subject.need_train_length("decode_speed") for n in LENGTHS])
    new = WARM_UP + c.steps * c.repeats
    require(
        subject.can_resume,
        f"evals=[decode_speed]: transformers' {type(subject.model).__name__} is not timed, since it cannot read a text "
        "in segments",
    )
    subject.need_length(lengths[-1] + new, "decode_speed.lengths")
    return Job(
        settings={
            **dataclasses.asdict(c),
            "lengths": lengths,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "device": subject.device_name,
        },
        run=partial(run, subject, lengths, config),
        total=config.batch_size * sum(lengths),
        summary=summary,
        plots=lambda record, folder: plot_decoding([record], folder / "decode_speed.png"),
    )


def run(subject: Subject, lengths: list[int], config: EvalConfig, work: Work) -> dict:
    """Ours in bf16 decode with weights of bf16: autocast would cast all of the float32 ones again for every token."""
    decoding, idle = subject, 0
    if subject.ours and subject.precision == "bf16":
        decoding = dataclasses.replace(subject, model=copy.deepcopy(subject.model).bfloat16())
        idle = sum(p.nbytes for p in subject.model.parameters())
    with torch.autocast(subject.device.type, enabled=False):
        return {"lengths": [work.first(partial(decode, decoding, n, config, work, idle)) for n in lengths]}


def summary(results: dict) -> list[str]:
    return [
        f"decoding after {r['length']} tokens: {r['tokens_per_second']:,.0f} tokens/s in {r['batch_size']} sequences, "
        f"state of each {bytes_of(r['state_bytes'] / r['batch_size'])}"
        for r in results["lengths"]
    ]


@torch.no_grad()
def decode(subject: Subject, length: int, config: EvalConfig, work: Work, idle: int) -> dict:
    """After `length` random tokens: `tokens_per_second` of the batch, the median over timings, with the `slowest` and
    the `fastest`; `state_bytes` of the batch; `peak_bytes` that a GPU held while decoding, weights included, but for
    `idle` bytes of others; None on a CPU."""
    c, batch_size = config.decode_speed, config.batch_size
    generator = torch.Generator().manual_seed(config.seed)
    text = torch.randint(subject.vocab_size, (batch_size, length), generator=generator).to(subject.device)
    state = None
    for segment in text.split(SEGMENT, dim=1):
        features, state = subject.read(segment, state=state, keep_state=True)
        work.advance(segment.numel())
    held, token = state_bytes(state), subject.logits(features[:, -1:]).argmax(-1)
    del features
    step = stepping(subject, state)
    del state
    token = decoded(step, token, WARM_UP)
    cuda = subject.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(subject.device)
    speeds = []
    for _ in range(c.repeats):
        begun = time.perf_counter()
        token = decoded(step, token, c.steps)
        speeds.append(batch_size * c.steps / (time.perf_counter() - begun))
    return {
        "length": length,
        "batch_size": batch_size,
        "tokens_per_second": median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "state_bytes": held,
        "peak_bytes": torch.cuda.max_memory_allocated(subject.device) - idle if cuda else None,
    }


def stepping(subject: Subject, state) -> Callable[[Tensor], Tensor]:
    """From a token [B, 1] to the likeliest next one, and on. Ours step as generation by model/decode.py does."""
    if subject.ours:
        step = CudaGraphGenerator(subject.model).start_step(state)
        return lambda token: step(token).argmax(-1, keepdim=True)

    def read(token: Tensor) -> Tensor:
        nonlocal state
        features, state = subject.read(token, state=state, keep_state=True)
        return subject.logits(features).argmax(-1)

    return read


def decoded(step: Callable[[Tensor], Tensor], token: Tensor, count: int) -> Tensor:
    """The last of `count` tokens after `token`, computed: a GPU's work is done when its result is on the host."""
    for _ in range(count):
        token = step(token)
    return token.cpu().to(token.device)
