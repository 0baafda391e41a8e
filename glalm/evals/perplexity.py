"""Perplexity of a validation split in windows of the training length, each read from an empty state.

A model that was trained with data.document_boundaries=reset_state reads the windows as in training: its state is also
emptied where a document starts, and the token before a start has no target.
"""

import math
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.config.strict import RunError
from glalm.data.loader import Windows
from glalm.data.text_bytes import bits_per_byte, count_target_bytes
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext, Evaluator
from glalm.evals.identity import TEXT_FILE
from glalm.evals.inputs import describe_data, open_split, open_windows
from glalm.evals.options import EvalConfig
from glalm.evals.result_files import format_number


class PerplexityEvaluator(Evaluator):
    """Perplexity of all whole windows of the validation split, or of the file that `text` names."""

    shares_texts = True

    def __init__(self, model: EvalModel, config: EvalConfig):
        super().__init__(model, config)
        length = model.require_train_length("perplexity")
        model.require_length(length, "train_length")
        tokens = open_split(config, model, "validation")
        self.windows = open_windows(tokens, length, "perplexity", model.document_boundaries == "reset_state")
        self.total_units = len(self.windows) * length
        boundaries = {"document_boundaries": model.document_boundaries}
        self.settings = {**describe_data(tokens), "seq_len": length, **boundaries}

    def run(self, context: EvalContext) -> dict:
        return compute_perplexity(self.model, self.windows, self.config.batch_size, context)

    def summarize(self, results: dict) -> list[str]:
        settings = self.settings
        text = Path(settings["data_path"]).name if settings["split"] == TEXT_FILE else settings["split"]
        bits = results["bits_per_byte"]
        per_byte = f", {bits:.4f} bits per byte" if bits is not None else ""
        perplexity = format_number(results["perplexity"], 3)
        # Of a split, that is less than a window of each source; of a file, it may be half.
        tail = f"; its last {self.windows.dropped_tokens:,} tokens fill no window of {settings['seq_len']:,}"
        is_cut = settings["split"] == TEXT_FILE and self.windows.dropped_tokens > 0
        return [f"{text} perplexity {perplexity} over {results['tokens']:,} tokens{per_byte}{tail if is_cut else ''}"]

    def metrics(self, results: dict) -> dict[str, float | None]:
        return {"perplexity": results["perplexity"], "bits_per_byte": results["bits_per_byte"]}


def compute_perplexity(model: EvalModel, windows: Windows, batch_size: int, context: EvalContext) -> dict:
    """Return `summarize_losses` over all windows, and the number of `windows` and of scored `tokens`.

    Returns:
        Also `bytes`, of the text of the scored tokens, and the loss in `bits_per_byte` of that text with its
        `bits_per_byte_error`, one standard error. They are None if the model has no tokenizer.

    Raises:
        RunError: Some losses are not finite.
    """

    def read_batch(start: int) -> list[list[float]]:
        """Return the mean nats of each window, and the numbers of its scored tokens and of their bytes."""
        ids = np.arange(start, min(start + batch_size, len(windows)))
        batch = windows.load_batch(ids)
        counts = (batch["labels"] != IGNORE_INDEX).sum(1)
        losses, _ = model.score_tokens(
            batch["input_ids"], batch["labels"], starts=batch.get("starts"), shard=context.shard
        )
        nats = losses.double().sum(1).cpu()
        context.advance(batch["labels"].numel())
        text_bytes = torch.zeros_like(counts)
        if model.tokenizer is not None:
            text_bytes = torch.from_numpy(count_target_bytes(windows, ids, model.tokenizer))
        return torch.stack([nats / counts.clamp(min=1), counts, text_bytes], 1).tolist()

    rows = list(chain.from_iterable(context.map(read_batch, range(0, len(windows), batch_size))))
    means, weights, text_bytes = torch.tensor(rows, dtype=torch.float64).T
    if count := int((~means.isfinite()).sum()):
        raise RunError(f"the losses of {count} of {len(windows)} windows are not finite: the model's logits overflow")
    counts = {"windows": len(windows), "tokens": int(weights.sum())}
    return {**summarize_losses(means, weights), **counts, **summarize_bytes(means * weights, text_bytes)}


def summarize_bytes(nats: Tensor, text_bytes: Tensor) -> dict:
    """Return `bytes`, `bits_per_byte` and `bits_per_byte_error` of stretches of text; see `compute_perplexity`.

    Args:
        nats: Sum over each stretch, [n].
        text_bytes: Bytes of each stretch, [n]. All 0: they are not known.
    """
    if not text_bytes.any():
        return dict.fromkeys(("bytes", "bits_per_byte", "bits_per_byte_error"))
    total = int(text_bytes.sum())
    value = nats.sum().item() / total
    error = None
    if (n := len(nats)) > 1:  # That of a ratio, as in `summarize_losses`.
        error = bits_per_byte((nats - value * text_bytes).norm().item() / total * math.sqrt(n / (n - 1)), 1)
    return {"bytes": total, "bits_per_byte": bits_per_byte(value, 1), "bits_per_byte_error": error}


def summarize_losses(means: Tensor, weights: Tensor | None = None) -> dict:
    """Return the weighted mean of losses, its standard error, and perplexities.

    Args:
        means: Mean nats of each of n stretches of text, [n].
        weights: Tokens of each stretch, [n]. None: as many in each.

    Returns:
        `nats_per_token`; `standard_error` of it, that of a ratio (Cochran, Sampling Techniques, 6.3); `perplexity`,
        and `perplexity_low` and `perplexity_high` one standard error away. What cannot be computed is None: the errors
        of one stretch, everything of none.
    """
    n = len(means)
    nats, error = None, None
    weights = torch.ones_like(means) if weights is None else weights.to(means.dtype)
    if n > 0:
        nats = ((weights * means).sum() / weights.sum()).item()
    if n > 1:
        error = ((weights * (means - nats)).norm() / weights.sum() * math.sqrt(n / (n - 1))).item()
    return {
        "nats_per_token": nats,
        "standard_error": error,
        "perplexity": None if nats is None else finite_exp(nats),
        "perplexity_low": None if error is None else finite_exp(nats - error),
        "perplexity_high": None if error is None else finite_exp(nats + error),
    }


def finite_exp(nats: float) -> float:
    """Return exp(nats), capped at e^700: the perplexity of a diverged model must be a number that JSON can hold."""
    return math.exp(min(nats, 700.0))
