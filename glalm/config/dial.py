"""One number, the depth, from which the other sizes of a GLA model and of its training follow.

configs/experiment/gla_dial.yaml reads them as ${dial:NAME,depth,vocabulary}, where NAME is a property of `Dial`.
"""

import math
from dataclasses import dataclass

from glalm.config.strict import require

CHANNELS_PER_LAYER = 64  # width / depth, at least: that of nanochat's models; the GLA paper's 340M model has 43
CHANNELS_PER_HEAD = 256  # values, and half as many keys: as in the GLA paper's 340M model
TOKENS_PER_PARAMETER = 20  # Hoffmann et al., arXiv 2203.15556
WARMUP_SHARE = 1 / 30  # of the tokens: that of the GLA paper
# The batch and tokens of the GLA paper's 340M model.
PAPER_BATCH = 524_288
PAPER_TOKENS = 15e9


@dataclass(frozen=True)
class Dial:
    """The sizes of a model of `depth` blocks and of its training, with a vocabulary of `vocab_size` tokens.

    Raises:
        ConfigError: One of the two is not a positive whole number.
    """

    depth: int
    vocab_size: int

    def __post_init__(self):
        require(
            all(isinstance(size, int) and size > 0 for size in (self.depth, self.vocab_size)),
            f"The sizes of experiment=gla_dial follow from model.num_hidden_layers={self.depth} and "
            f"model.vocab_size={self.vocab_size}, which must be positive whole numbers; set both",
        )

    @property
    def num_heads(self) -> int:
        """The smallest number for which the width is at least CHANNELS_PER_LAYER times the depth."""
        return math.ceil(self.depth * CHANNELS_PER_LAYER / CHANNELS_PER_HEAD)

    @property
    def hidden_size(self) -> int:
        return self.num_heads * CHANNELS_PER_HEAD

    @property
    def parameters(self) -> int:
        """About how many parameters every token is multiplied with: those of the blocks and of the head."""
        return 12 * self.depth * self.hidden_size**2 + self.vocab_size * self.hidden_size

    @property
    def tokens(self) -> int:
        return TOKENS_PER_PARAMETER * self.parameters

    @property
    def warmup_tokens(self) -> int:
        return round(self.tokens * WARMUP_SHARE)

    @property
    def batch_tokens(self) -> int:
        """The power of two next to a batch that grows by the root of the tokens (Li et al., arXiv 2503.04715)."""
        return 2 ** round(math.log2(PAPER_BATCH * math.sqrt(self.tokens / PAPER_TOKENS)))
