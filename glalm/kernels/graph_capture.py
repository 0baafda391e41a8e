"""Capture the kernels that a function launches as a CUDA graph, which launches all of them at once."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class GraphCapture:
    """Captures functions as CUDA graphs on a stream of one GPU.

    Call `warm_up` at least once before `capture`: libraries initialise themselves in their first calls, which is not
    possible during a capture.
    """

    def __init__(self, device: torch.device):
        # torch.cuda.graph's own default stream belongs to the GPU that the process captured on first.
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Run `function` on the stream, in order with the work of the current stream, and return its result."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def rehearse(self, function: Callable[[], Result]) -> Result:
        """Run `function` as `warm_up` does. Raise RuntimeError where the host waits for the GPU.

        Such a function cannot be captured, and torch's allocator does not recover from the attempt.
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype.
            torch.cuda.set_sync_debug_mode("error")
        try:
            return self.warm_up(function)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def capture(self, function: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Record `function` without running it. Return the graph, and the result, whose tensors every replay fills.

        Args:
            function: What to record.
            pool: `graph.pool()` of an earlier graph to share memory with. Only live tensors of it are preserved, so
                the results of one graph must have been read before another one is replayed.
        """
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        try:
            # torch.cuda.graph itself does not restore the current stream if the capture fails. Other threads may call
            # CUDA meanwhile: they page-lock the memory of batches and wait for the copies of checkpoints.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"),
            ):
                result = function()
        except BaseException:
            # If CUDA has refused to end the capture, torch's allocator would keep its memory and fail later, as if it
            # still went on, and so would the random generator, of which a copy with the same state would not.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, pool)
                torch._C._cuda_releasePool(self.stream.device_index, pool)
                generator = torch.cuda.default_generators[self.stream.device_index]
                generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph, result

    def free_share(self) -> float:
        """Return which share of the GPU's memory is free."""
        free, total = torch.cuda.mem_get_info(self.stream.device)
        return free / total

    def peak_bytes(self) -> int:
        """Return the most memory that was allocated on the GPU since its statistics were reset, in captures, too."""
        return torch.cuda.max_memory_allocated(self.stream.device)
