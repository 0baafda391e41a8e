"""The loss on text that is never trained on."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator

from glalm.config.run import RunConfig
from glalm.data.loader import Windows, sequential_batches
from glalm.kernels.cross_entropy import IGNORE_INDEX
from glalm.train.parallel import free_gathered_weights
from glalm.train.state import BatchPlan
from glalm.train.step import model_inputs, on_device


@torch.no_grad()
def validate(
    accelerator: Accelerator, model, windows: Windows, config: RunConfig, alive: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Mean cross-entropy (nats a token) and perplexity over train.eval_sequences validation windows, evenly spaced.

    alive: called after every batch.
    """
    model.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    micro_batch = BatchPlan.from_config(config, world).micro_batch
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # nats, targets
    for batch in sequential_batches(
        windows, micro_batch, rank=rank, world_size=world, limit=config.train.eval_sequences
    ):
        batch = on_device(batch, accelerator)
        with accelerator.autocast():
            loss = model(**model_inputs(batch)).loss
        scored = (batch["labels"] != IGNORE_INDEX).sum()
        total += torch.stack([loss * scored, scored])
        alive()
    free_gathered_weights(model)
    loss, tokens = accelerator.reduce(total, "sum").tolist()
    return {"val_loss": loss / tokens, "val_perplexity": math.exp(min(loss / tokens, 700.0))}
