"""Operators of recurrences, convolutions and the loss: pure functions on tensors, without modules or configs."""

from glalm.kernels.delta import chunk_delta_rule
from glalm.kernels.gated_norm import gated_rms_norm
from glalm.kernels.gla import chunk_gla, chunk_linear_attn, chunk_retention, chunk_simple_gla, chunk_value_gla
from glalm.kernels.long_convolution import long_convolution
from glalm.kernels.recurrent import (
    fused_recurrent_delta_rule,
    fused_recurrent_gla,
    fused_recurrent_linear_attn,
    fused_recurrent_retention,
    fused_recurrent_simple_gla,
)
from glalm.kernels.selective_scan import selective_scan
from glalm.kernels.short_conv import short_conv
from glalm.kernels.ssd import chunk_ssd, fused_recurrent_ssd

__all__ = [
    "chunk_delta_rule",
    "chunk_gla",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "chunk_ssd",
    "chunk_value_gla",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "fused_recurrent_ssd",
    "gated_rms_norm",
    "long_convolution",
    "selective_scan",
    "short_conv",
]
