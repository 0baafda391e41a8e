"""Pretraining of Gated Linear Attention language models, end to end.

Importing this package imports and registers nothing. `import glalm.hf` registers the models with transformers.
"""

__version__ = "0.2.0"

# The label of a position that the loss ignores. This is the default of torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100
