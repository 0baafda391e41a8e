"""One optimiser step: micro-batches forward and backward, clip, update."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from glalm.config.run import RunConfig
from glalm.data.loader import Batch, pack_documents
from glalm.kernels.cross_entropy import IGNORE_INDEX
from glalm.model.cache import StateCache
from glalm.train.guards import UpdateGuard
from glalm.train.optim import set_learning_rate
from glalm.train.parallel import gradient_norm, no_sync_unless
from glalm.train.state import BatchPlan


def update(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: list[Optimizer],
    batch: Batch,
    config: RunConfig,
    lr: float,
    step: int,
    guard: UpdateGuard,
) -> tuple[Tensor, Tensor]:
    """Optimiser step number `step`, unless the guard skips it. Returns this process's part of the mean loss over all
    processes' scored tokens (their mean is that loss) and the gradient's norm before clipping, both on device: nothing
    here waits for the device."""
    loss = accumulate(accelerator, model, batch, config)
    grad_norm = gradient_norm(model.parameters())
    set_learning_rate(optimizers, lr)
    guard.step(optimizers, step, loss, grad_norm, config.optim.grad_clip)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def accumulate(accelerator: Accelerator, model: nn.Module, batch: Batch, config: RunConfig) -> Tensor:
    """Adds the batch's gradient to the parameters', micro-batch by micro-batch, and each of these segment by segment.

    Between segments (train.tbptt_length) the state is handed on and the gradient cut: truncated backpropagation
    through time, with the memory of one segment. Returns the loss as `update` does.
    """
    plan = BatchPlan.from_config(config, accelerator.num_processes)
    micros = cut(batch, plan.micro_batch, dim=0)
    parts = scored_parts(accelerator, micros)
    model.train()
    total = torch.zeros((), device=accelerator.device)
    for micro, part in zip(micros, parts, strict=True):
        segments, state = cut(micro, plan.segment_length, dim=1), None
        for segment in segments:
            # Gradients are summed over processes once a step.
            with no_sync_unless(micro is micros[-1] and segment is segments[-1], model):
                with accelerator.autocast():
                    out = model(
                        **model_inputs(segment),
                        cache=state,
                        return_cache=len(segments) > 1,
                        z_loss=config.train.z_loss,
                    )
                loss = out.loss * (part / len(segments))
                loss.backward()
            state = detached(out.cache)
            total += loss.detach()
    return total


def cut(batch: Batch, size: int, dim: int) -> list[Batch]:
    pieces = (x.split(size, dim) for x in batch.values())
    return [dict(zip(batch, piece, strict=True)) for piece in zip(*pieces, strict=True)]


def detached(cache: StateCache | None) -> StateCache | None:
    if cache is None:
        return None
    return StateCache(tree_map_only(Tensor, Tensor.detach, cache.states), cache.seen)


def on_device(batch: Batch, accelerator: Accelerator) -> Batch:
    """The batch on the process's device, but for `starts`, of which sizes are made."""
    return {k: x if k == "starts" else x.to(accelerator.device, non_blocking=True) for k, x in batch.items()}


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model is called with: rows, or where documents begin anew, one row of packed documents."""
    batch = pack_documents(batch) if "starts" in batch else batch
    names = {"labels": "shift_labels"}
    inputs = {names.get(name, name): x for name, x in batch.items()}
    if "cu_seqlens" in inputs:  # whose length is another every time: one compiled graph for all
        torch._dynamo.maybe_mark_dynamic(inputs["cu_seqlens"], 0)
    return inputs


def scored_parts(accelerator: Accelerator, micros: list[Batch]) -> list[float] | Tensor:
    """Each micro-batch's part of the tokens that all processes score in a step, times the number of processes."""
    if "starts" not in micros[0]:
        return [1 / len(micros)] * len(micros)
    scored = torch.stack([(micro["labels"] != IGNORE_INDEX).sum() for micro in micros]).float()
    return scored / accelerator.reduce(scored.sum(), "mean")
