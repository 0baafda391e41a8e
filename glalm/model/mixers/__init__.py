"""The token mixers, by the name that `model.mixer` chooses.

A mixer is an nn.Module built from a GLALMConfig with
`forward(x, *, state=None, return_state=False, cu_seqlens=None) -> (y, state)`; x and y are [B, T, d]. `state` is
whatever the mixer carries from one segment of a sequence to the next (None: a fresh sequence), returned when asked.
Tokens whose x is zero must leave a fresh state untouched: so padding on the left is never seen.
"""

from glalm.model.mixers.gla import GatedLinearAttention

MIXERS = {"gla": GatedLinearAttention}
