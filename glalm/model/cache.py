"""What a decoder carries from one segment of a sequence to the next."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import LongTensor
from torch.utils._pytree import tree_map


@dataclass
class StateCache:
    """One mixer state a layer and the number of tokens behind it. Only softmax attention's grows with that number.

    `forward` never changes a cache: it returns a new one. So a cache may be kept and continued from many times.
    """

    states: list = field(default_factory=list)  # one a layer
    seen: int = 0  # tokens

    is_compileable: ClassVar[bool] = False  # transformers asks before it compiles a decoding step by itself

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: LongTensor) -> "StateCache":
        """The cache of the chosen beams, beam_idx: [B]. In place, as transformers' beam search expects."""
        self.states = [tree_map(lambda x: x.index_select(0, beam_idx.to(x.device)), s) for s in self.states]
        return self
