"""Run the forward and backward pass of a micro-batch as one CUDA graph, so that training does not wait for the host.

Eagerly, Python launches thousands of kernels for each micro-batch. A graph launches them by one call.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from operator import is_

import torch
from torch import Tensor, nn

from glalm.config.run import RunConfig
from glalm.config.strict import require
from glalm.data.loader import Batch
from glalm.kernels.graph_capture import GraphCapture

logger = logging.getLogger(__name__)

# How many steps run eagerly for each shape of micro-batches. They compile the blocks and initialise libraries.
WARM_UP_STEPS = 2
# With train.cuda_graph=auto, a graph leaves at least this share of the GPU's memory free for what runs between two
# steps, such as validation, because that cannot use the memory of a graph.
MIN_FREE_SHARE = 0.15

# forward_backward(micro_batch, segment_length, weight, is_last) -> the loss of each segment.
ForwardBackward = Callable[[Batch, int, float | Tensor, bool], list[Tensor]]


def find_graph_obstacle(config: RunConfig, world_size: int, is_gpu: bool) -> str | None:
    """Return why a run cannot run micro-batches as CUDA graphs, or None if its config allows it."""
    if not is_gpu:
        return "it needs a GPU"
    if world_size > 1 or config.parallel.mode != "ddp":
        return "a graph contains no communication, so it needs one process and parallel=ddp"
    if any(phase.config.data.document_boundaries == "reset_state" for phase in config.phases):
        return "with data.document_boundaries=reset_state the number of documents varies between batches"
    return None


def check_graph_support(config: RunConfig, world_size: int, is_gpu: bool) -> None:
    """Raise ConfigError if train.cuda_graph is true, which the run does not support."""
    obstacle = find_graph_obstacle(config, world_size, is_gpu)
    require(
        config.train.cuda_graph is not True or obstacle is None,
        f"train.cuda_graph=true: {obstacle}. Set train.cuda_graph=auto.",
    )


def is_captured(config: RunConfig, world_size: int, is_gpu: bool) -> bool:
    """Return whether to run micro-batches as CUDA graphs. With "auto", the memory or a mixer can still prevent it."""
    return config.train.cuda_graph is not False and find_graph_obstacle(config, world_size, is_gpu) is None


class StepGraph:
    """Run forward_backward by CUDA graphs, from the third step of a shape on.

    There are two graphs of a shape, which share memory: one for the first micro-batch of a step, which creates the
    gradients, and one for the others, which add to them. The results are those of eager calls, bit for bit.

    Gradients are tensors in the graphs' memory. The optimizer may change them and set `grad` to None; the next step's
    first replay overwrites them. A step needs as much memory as without graphs, but it stays reserved between steps.

    If a step cannot be captured, a warning is logged and all later calls are eager. With `is_required` the error is
    raised instead. A new shape drops the graphs of the last one, because the stages of a run do not alternate.

    Args:
        parameters: All parameters of the model. Only this object and the optimizers may change them, and in place.
        capture: Captures on the GPU of the parameters.
        is_required: Raise if a step cannot be captured, and keep the graphs however little memory they leave free.

    Attributes:
        graphs: {is_first: graph} of the newest shape, where is_first means the first micro-batch of a step.
        peak_bytes: The peak of allocated memory during the captures. Replays have the same peak.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], capture: GraphCapture, is_required: bool):
        self.parameters = list(parameters)
        self.capture = capture
        self.is_required = is_required
        self.has_failed = False
        self._reset(None)

    def _reset(self, shape: tuple | None) -> None:
        """Drop the graphs and their memory, and expect micro-batches of `shape`."""
        self.shape = shape
        self.steps = 0
        self.peak_bytes = 0
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self.losses: dict[bool, list[Tensor]] = {}
        self.inputs: Batch = {}
        self.gradients: list[Tensor | None] = []

    def run(
        self, function: ForwardBackward, micro_batch: Batch, segment_length: int, weight: float, is_last: bool
    ) -> list[Tensor]:
        """Return function(micro_batch, segment_length, weight, is_last). Read the losses before the next call.

        A graph is replayed whatever `is_last` is, because that only concerns communication between processes.
        """
        call = partial(function, micro_batch, segment_length, weight, is_last)
        if self.has_failed:
            return call()
        shape = tuple((name, x.shape, x.dtype) for name, x in micro_batch.items()), segment_length, weight
        if shape != self.shape:
            self._reset(shape)
        gradients = [parameter.grad for parameter in self.parameters]
        is_first = all(gradient is None for gradient in gradients)
        is_continued = bool(self.gradients) and all(map(is_, gradients, self.gradients))
        self.steps += is_first
        if self.steps < WARM_UP_STEPS or not (is_first or is_continued):
            return self.capture.warm_up(call)
        try:
            if self.steps == WARM_UP_STEPS:
                return self.capture.rehearse(call)
            if is_first not in self.graphs:
                self._capture(is_first, partial(function, self._allocate_inputs(micro_batch), *call.args[1:]))
        except RuntimeError as error:
            if self.is_required:
                raise
            self._set_gradients(gradients)
            self._give_up(error)
        # Outside of the except block, because an exception keeps the activations of its frames alive.
        return call() if self.has_failed else self._replay(is_first, micro_batch)

    def _allocate_inputs(self, micro_batch: Batch) -> Batch:
        """Return the tensors that the graphs read."""
        self.inputs = self.inputs or {name: x.clone() for name, x in micro_batch.items()}
        return self.inputs

    def _capture(self, is_first: bool, call: Callable[[], list[Tensor]]) -> None:
        pool = None if is_first else self.graphs[True].pool()
        self.graphs[is_first], self.losses[is_first] = self.capture.capture(call, pool)
        self.peak_bytes = max(self.peak_bytes, self.capture.peak_bytes())
        if is_first:
            self.gradients = [parameter.grad for parameter in self.parameters]
        free_share = self.capture.free_share()
        if not self.is_required and free_share < MIN_FREE_SHARE:
            raise RuntimeError(f"they would leave only {free_share:.0%} of the GPU's memory to validation")

    def _replay(self, is_first: bool, micro_batch: Batch) -> list[Tensor]:
        for name, x in micro_batch.items():
            self.inputs[name].copy_(x)
        self.graphs[is_first].replay()
        if is_first:
            self._set_gradients(self.gradients)
        return self.losses[is_first]

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def _give_up(self, error: RuntimeError) -> None:
        self.has_failed = True
        self._reset(None)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning(
            "train.cuda_graph=auto: the run trains on without CUDA graphs: %s. "
            "train.cuda_graph=true stops at an error and uses graphs however little memory they leave; "
            "train.cuda_graph=false makes no attempt.",
            reason,
        )
