"""Pretraining of Gated Linear Attention language models, end to end.

Importing this package imports and registers nothing. `import glalm.hf` registers the models with transformers.
"""

__version__ = "0.1.0"
