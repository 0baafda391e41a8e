"""Perplexity of a token stream in windows of the training length, each read from a fresh state.

A model that was trained with data.document_boundaries=reset_state reads them as in training: from a fresh state at
every document's start too, the token before it without a target.
"""

import math
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.config.strict import ConfigError, RunError
from glalm.data.loader import Batch, Windows, flatten_batch
from glalm.evals.eval_model import Subject, open_split
from glalm.evals.evaluator import Job, Work
from glalm.evals.options import EvalConfig
from glalm.model.loss import token_losses


def job(subject: Subject, config: EvalConfig) -> Job:
    """The whole validation split."""
    length = subject.need_train_length("perplexity")
    subject.need_length(length, "train_length")
    tokens = open_split(config, subject, "validation")
    try:
        windows = Windows(tokens, length, reset_state=subject.document_boundaries == "reset_state")
    except ValueError as error:
        raise ConfigError(f"evals=[perplexity]: {error}") from error
    return Job(
        settings={
            "data": str(tokens.folder),
            "data_fingerprint": tokens.fingerprint,
            "split": tokens.split,
            "seq_len": length,
            "document_boundaries": subject.document_boundaries,
        },
        run=lambda work: perplexity(subject, windows, config.batch_size, work),
        total=len(windows) * length,
        metrics=lambda r: {"perplexity": r["perplexity"]},
        summary=lambda r: [f"validation perplexity {r['perplexity']:.3f} over {r['tokens']:,} tokens"],
    )


def perplexity(subject: Subject, windows: Windows, batch_size: int, work: Work) -> dict:
    """Of all windows: `nats_per_token`, `perplexity` = exp of it, `standard_error` of nats_per_token over windows,
    the perplexities one standard error down and up, `windows` and `tokens` scored.

    Windows are read `batch_size` at a time. Raises RunError where losses are not finite.
    """
    found = []
    for start in work.mine(range(0, len(windows), batch_size)):
        batch = windows.load_batch(np.arange(start, min(start + batch_size, len(windows))))
        scored = (batch["labels"] != IGNORE_INDEX).sum(1)
        nats = window_losses(subject, batch).double().view(len(scored), -1).sum(1).cpu()
        found.append(torch.stack([nats / scored.clamp(min=1), scored], 1).tolist())
        work.advance(batch["labels"].numel())
    means, weights = torch.tensor(list(chain.from_iterable(work.gather(found))), dtype=torch.float64).T
    if broken := int((~means.isfinite()).sum()):
        raise RunError(f"the losses of {broken} of {len(windows)} windows are not finite: the model's logits overflow")
    return {**summarise(means, weights), "windows": len(windows), "tokens": int(weights.sum())}


def window_losses(subject: Subject, batch: Batch) -> Tensor:
    """Nats of every token; where the batch says where documents start, of its rows end to end, in one row."""
    if "starts" not in batch:
        return subject.score(batch["input_ids"].to(subject.device), batch["labels"].to(subject.device))[0]
    row = {name: x.to(subject.device) for name, x in flatten_batch(batch).items()}
    with torch.no_grad():
        features = subject.model.model(row["input_ids"], cu_seqlens=row["cu_seqlens"], use_cache=False)
    return token_losses(features.last_hidden_state, subject.model.lm_head.weight, row["labels"])


def summarise(means: Tensor, weights: Tensor | None = None) -> dict:
    """Mean nats [n], of n stretches of text with weights [n] of tokens each (as many in each, if not given), as a
    weighted mean, its standard error (of the ratio that it is: Cochran, Sampling Techniques, 6.3) and perplexity.

    One stretch has no standard error: None, and no band around the perplexity. None has nothing: None throughout.
    """
    n, nats, error = len(means), None, None
    weights = torch.ones_like(means) if weights is None else weights.to(means.dtype)
    if n > 0:
        nats = ((weights * means).sum() / weights.sum()).item()
    if n > 1:
        error = ((weights * (means - nats)).norm() / weights.sum() * math.sqrt(n / (n - 1))).item()
    return {
        "nats_per_token": nats,
        "standard_error": error,
        "perplexity": None if nats is None else exp(nats),
        "perplexity_low": None if error is None else exp(nats - error),
        "perplexity_high": None if error is None else exp(nats + error),
    }


def exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a diverged model's perplexity still has to be a number
