"""The training windows of a run: those of each of its phases, and their order."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from glalm.config.run import RunConfig
from glalm.config.stages import Phase
from glalm.data.loader import Windows
from glalm.data.order import Order
from glalm.data.shards import TokenSet


@dataclass(frozen=True)
class PhaseData:
    """What a phase of a run reads."""

    phase: Phase
    windows: Windows
    order: Order


class TrainingData:
    """The windows that a run trains on and their order: a pure function of the config and the data.

    A phase continues the order of the newest phase before it with the same window length, if both or neither have
    weights: it reads the windows that come next. Windows of another length have an order of their own, from its start.
    A run without stages likewise reads on at the next window after a resume with another batch.

    Args:
        config: The run's config.
        tokens: The training split.

    Raises:
        ValueError: A phase has no window, or weights that do not fit the sources. The message names its stage.
    """

    def __init__(self, config: RunConfig, tokens: TokenSet):
        self.config = config
        self.tokens = tokens
        self._opened: list[PhaseData] = []
        for phase in config.phases:
            try:
                self._opened.append(self._open_phase(phase))
            except ValueError as error:
                raise ValueError(f"In train.stages.{phase.stage}: {error}" if phase.stage else str(error)) from error

    @property
    def phases(self) -> list[PhaseData]:
        """What each phase of the run reads."""
        if self.config.train.stages is not None:
            return self._opened
        # A resume with another batch changes how many steps there are, and how many windows were read before.
        [data] = self._opened
        return [PhaseData(self.config.phases[0], data.windows, self._find_order(self.config.steps))]

    def _find_order(self, step: int) -> Order:
        """Return the order that a run without stages follows at `step`, counted from 0, perhaps before a resume."""
        [data] = self._opened
        milestones = [start for start in self.config.milestones if start.step <= step]
        newest = milestones[-1]
        windows = data.windows
        if newest.seq_len != windows.length:
            windows = Windows(self.tokens, newest.seq_len)
        read = 0
        for start, end in pairwise(milestones):
            if start.seq_len == newest.seq_len:
                read += (end.step - start.step) * start.batch_size
        return replace(
            data.order,
            batch_size=newest.batch_size,
            windows=windows.source_windows,
            start_step=newest.step,
            start_position=read,
        )

    def _open_phase(self, phase: Phase) -> PhaseData:
        data = phase.config.data
        windows = Windows(self.tokens, data.seq_len, data.document_boundaries == "reset_state")
        batch_size = phase.config.batch_size
        for earlier in reversed(self._opened):
            order = earlier.order
            if earlier.windows.length == data.seq_len and (order.weights is None) == (data.weights is None):
                end = earlier.phase.end_step
                read = order.continue_at(end, batch_size, data.weights)
                # Phases of other lengths may lie between the two.
                return PhaseData(phase, windows, replace(read, start_step=phase.start_step))
        order = Order(phase.config.seed, batch_size, windows.source_windows, data.weights, phase.start_step)
        return PhaseData(phase, windows, order)

    def window_ids(self, step: int) -> np.ndarray:
        """Return the ids of the windows of a step of the run, counted from 0, among those of its length.

        The step may lie before a resume with another batch. Data and weights are taken to have been what they are now.
        """
        if self.config.train.stages is None:
            return self._find_order(step).window_ids(step)
        return next(data for data in self.phases if step < data.phase.end_step).order.window_ids(step)
