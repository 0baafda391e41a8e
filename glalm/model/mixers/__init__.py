"""The token mixers, by the name that `model.mixer` or `model.layers` chooses (glalm.model.config.MIXERS).

A mixer is an nn.Module made from a GLALMConfig with

    forward(x, *, state=None, return_state=False, cu_seqlens=None, padding=None) -> (y, state)

x, y: [B, T, d]. `state` is what the mixer carries from one segment of a sequence to the next, returned when asked;
None is a fresh sequence. It is a tensor or a tuple of tensors, each with the sequences along its first axis: [N, ...].
A given state is never changed in place. cu_seqlens [N + 1] packs N sequences into a batch of one. padding [B, T, 1] is
0 at padded tokens, all on the left, where x is 0 too: a mixer whose fresh state such tokens leave alone may ignore it.

`flops(T)` gives its operations a token, in a sequence of T, but for those of linear layers (glalm.model.flops). A
module with parameters of its own that start neither normally distributed nor as a norm's ones has `initialise()`,
which sets them.
"""

from importlib import import_module

import torch
from torch import Tensor, nn

from glalm.model.config import MIXERS


def mixer(name: str, config) -> nn.Module:
    """The mixer of that name, with initial weights still to be set."""
    module, _, cls = MIXERS[name].rpartition(".")
    return getattr(import_module(module), cls)(config)


def decoding(x: Tensor) -> bool:
    """Whether x [B, T, d] is one token to decode: a recurrent operator's case, not a chunkwise one's."""
    return x.shape[1] == 1 and not torch.is_grad_enabled()
