"""Pretraining of Gated Linear Attention language models, end to end."""

__version__ = "0.1.0"
