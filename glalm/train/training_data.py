"""The training windows of a run: those of each of its phases, and their order."""

from dataclasses import dataclass, replace

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
    """The windows that a run trains on and their order: a pure function of the config, its milestones and the data.

    At each milestone the order of the newest milestone with the same window length continues, if both or neither have
    weights: the run reads the windows that come next. Windows of another length have an order of their own, from its
    start.

    Args:
        config: The run's config.
        tokens: The training split.

    Raises:
        ValueError: A phase has no window, or weights that do not fit the sources. The message names its stage.
    """

    def __init__(self, config: RunConfig, tokens: TokenSet):
        self.config = config
        self.tokens = tokens
        # Only to raise: `phases` opens them again, because a resume may add a milestone.
        for number, phase in enumerate(config.phases):
            try:
                self._open_phase(number)
            except ValueError as error:
                raise ValueError(f"In train.stages.{phase.stage}: {error}" if phase.stage else str(error)) from error

    @property
    def phases(self) -> list[PhaseData]:
        """What each phase of the run reads. Without stages, a resume with another batch changes it."""
        return [self._open_phase(number) for number in range(len(self.config.phases))]

    def _open_phase(self, number: int) -> PhaseData:
        phases = self.config.phases
        phase = phases[number]
        data = phase.config.data
        windows = Windows(self.tokens, data.seq_len, data.document_boundaries == "reset_state")
        # A run without stages is one phase. Its newest milestone may be a resume.
        milestone = number + len(self.config.milestones) - len(phases)
        return PhaseData(phase, windows, self._find_order(milestone))

    def _find_order(self, number: int) -> Order:
        """Return the order from milestone `number` of the run on."""
        milestones = self.config.milestones
        start = milestones[number]
        weights = self._find_weights(number)
        for earlier in reversed(range(number)):
            has_weights = self._find_weights(earlier) is not None
            if milestones[earlier].seq_len == start.seq_len and has_weights == (weights is not None):
                end = milestones[earlier + 1].step
                order = self._find_order(earlier).continue_at(end, start.batch_size, weights)
                # Milestones of other lengths may lie between the two.
                return replace(order, start_step=start.step)
        windows = Windows(self.tokens, start.seq_len).source_windows
        return Order(self.config.seed, start.batch_size, windows, weights, start.step)

    def _find_weights(self, number: int) -> dict[str, float] | None:
        """Return data.weights from milestone `number` of the run on; without stages, what they are now."""
        phases = self.config.phases
        return phases[max(0, number + len(phases) - len(self.config.milestones))].config.data.weights

    def window_ids(self, step: int) -> np.ndarray:
        """Return the ids of the windows of a step of the run, counted from 0, among those of its length.

        The step may lie before a resume with another batch. Data and weights are taken to have been what they are now.
        """
        number = max(i for i, start in enumerate(self.config.milestones) if start.step <= step)
        return self._find_order(number).window_ids(step)
