"""Pure functions on tensors, named as the field names them."""

from glalm.kernels.delta import chunk_delta_rule
from glalm.kernels.family import (
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_recurrent_linear_attn,
    fused_recurrent_retention,
    fused_recurrent_simple_gla,
)
from glalm.kernels.gla import chunk_gla, fused_recurrent_gla
from glalm.kernels.selective_scan import selective_scan
from glalm.kernels.value_gate import chunk_value_gla

__all__ = [
    "chunk_delta_rule",
    "chunk_gla",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "chunk_value_gla",
    "fused_recurrent_gla",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "selective_scan",
]
