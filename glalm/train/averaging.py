"""An exponential moving average of the weights, which is often a better model than the last weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Hold an exponential moving average of a model's weights, in float32 and sharded like them.

    After step n, the weights w(1), ..., w(n) that the steps left have the average

        sum over i of decay^(n - i) w(i) / sum over i of decay^(n - i)

    Dividing by this sum leaves no share to the initial weights (as in Adam, arXiv 1412.6980, section 3), which would
    otherwise dominate the average for 1 / (1 - decay) steps. A step whose update was skipped counts, with unchanged
    weights.

    Args:
        model: Its parameters may be DTensors. Shard it before.
        decay: Between 0 and 1.

    Attributes:
        tensors: {parameter name: its average}, float32, DTensors for parameters that are.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        parameters = dict(model.named_parameters())
        self._parameters: list[Tensor] = list(parameters.values())
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone().float() for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after optimizer step `step`, counted from 1. The host does not wait for the device."""
        # At step 1 this is 1, so that nothing remains of the initial weights.
        newest_share = (1 - self.decay) / (1 - self.decay**step)
        torch._foreach_lerp_(list(self.tensors.values()), self._parameters, newest_share)

    def restart(self) -> None:
        """Set the average to the current weights, for a run that resumes from a checkpoint without an average.

        It is as if all weights until then had been these. They keep half of the average for as many steps as the run
        had then taken, at most for 0.7 / (1 - decay).
        """
        for average, parameter in zip(self.tensors.values(), self._parameters, strict=True):
            average.copy_(parameter.detach())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange the model's weights with the average within the block.

        The weights return bit for bit. Where the model is sharded, its gathered weights must be freed before the block
        ends (`free_gathered_weights`).
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, parameter in zip(self.tensors.values(), self._parameters, strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)
