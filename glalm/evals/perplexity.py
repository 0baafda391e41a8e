"""Perplexity of a token stream in windows of the training length, each read from a fresh state."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glalm.data.loader import Windows, sequential
from glalm.model import GLALMForCausalLM


def perplexity(
    model: GLALMForCausalLM, windows: Windows, batch_size: int, advance: Callable[[int], object] = int
) -> dict:
    """Of all windows: `nats_per_token`, `perplexity` = exp of it, `standard_error` of nats_per_token over windows,
    the perplexities one standard error down and up, `windows` and `tokens` scored.

    Windows are read `batch_size` at a time; `advance` is called with the number of tokens after each batch.
    """
    means = []
    for batch in sequential(windows, batch_size):
        input_ids, labels = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
        losses, _ = model.score(input_ids, labels)
        means.append(losses.double().mean(1).cpu())
        advance(labels.numel())
    return {**summarise(torch.cat(means)), "windows": len(windows), "tokens": len(windows) * windows.length}


def summarise(means: Tensor) -> dict:
    """Mean nats [n], of n stretches of text with as many tokens each, as a mean, its standard error and perplexity.

    One stretch has no standard error: None, and no band around the perplexity.
    """
    nats = means.mean().item()
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    return {
        "nats_per_token": nats,
        "standard_error": error,
        "perplexity": exp(nats),
        "perplexity_low": None if error is None else exp(nats - error),
        "perplexity_high": None if error is None else exp(nats + error),
    }


def exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a diverged model's perplexity still has to be a number
