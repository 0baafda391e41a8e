"""Pure functions on tensors, named as the field names them."""

from glalm.kernels.gla import chunk_gla, fused_recurrent_gla

__all__ = ["chunk_gla", "fused_recurrent_gla"]
