"""One number, the depth, from which the other sizes of a GLA model and of its training follow.

configs/experiment/gla_dial.yaml reads them as ${dial:NAME,depth,vocabulary}, where NAME is an attribute of `Dial`.
"""

import math

from glalm.config.strict import require

CHANNELS_PER_LAYER = 64  # width / depth, at least: that of nanochat's models; the GLA paper's 340M model has 43
CHANNELS_PER_HEAD = 256  # values, and half as many keys: as in the GLA paper's 340M model
TOKENS_PER_PARAMETER = 20  # Hoffmann et al., arXiv 2203.15556
WARMUP_SHARE = 1 / 30  # of the tokens: that of the GLA paper
# The batch and tokens of the GLA paper's 340M model.
PAPER_BATCH = 524_288
PAPER_TOKENS = 15e9


class Dial:
    """The sizes of a model of `depth` blocks and of its training, with a vocabulary of `vocab_size` tokens.

    Attributes:
        num_heads: The smallest number for which the width is at least CHANNELS_PER_LAYER times the depth.
        hidden_size: The width.
        parameters: About how many parameters every token is multiplied with: those of the blocks and of the head.
        tokens: To train on.
        warmup_tokens: Those in which the learning rate rises.
        batch_tokens: The power of two next to a batch that grows by the root of the tokens (Li et al., arXiv
            2503.04715).

    Raises:
        ConfigError: One of the two is not a positive whole number.
    """

    def __init__(self, depth: int, vocab_size: int):
        require(
            all(isinstance(size, int) and size > 0 for size in (depth, vocab_size)),
            f"The sizes of experiment=gla_dial follow from model.num_hidden_layers={depth} and "
            f"model.vocab_size={vocab_size}, which must be positive whole numbers; set both",
        )
        self.num_heads = math.ceil(depth * CHANNELS_PER_LAYER / CHANNELS_PER_HEAD)
        self.hidden_size = self.num_heads * CHANNELS_PER_HEAD
        self.parameters = 12 * depth * self.hidden_size**2 + vocab_size * self.hidden_size
        self.tokens = TOKENS_PER_PARAMETER * self.parameters
        self.warmup_tokens = round(self.tokens * WARMUP_SHARE)
        self.batch_tokens = 2 ** round(math.log2(PAPER_BATCH * math.sqrt(self.tokens / PAPER_TOKENS)))
