"""Packed sequences [1, T, ...]: where they begin, and as a batch padded on the left, and back."""

import torch.nn.functional as F
from torch import Tensor


def boundaries(position_ids: Tensor, attention_mask: Tensor | None, *others: object) -> Tensor | None:
    """cu_seqlens [N + 1] of position_ids [1, T]: a sequence begins where a position is not the one before it plus 1, as
    transformers has it. None where none does, whatever the batch. What stands at padding, where attention_mask [B, S]
    is 0, says nothing. Reads position_ids on the host.

    Raises ValueError where one does in a batch of several rows, or beside attention_mask or one of the `others`.
    """
    begins = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:
        live = attention_mask[:, -position_ids.shape[-1] :] != 0
        begins = begins & live[:, 1:] & live[:, :-1]
    if not begins.any():
        return None
    if len(begins) != 1 or any(other is not None for other in (attention_mask, *others)):
        raise ValueError(
            "position_ids restart, as those of packed sequences do, which come in a batch of one and without "
            "attention_mask, past_key_values or cu_seqlens; for anything else leave position_ids out"
        )
    return F.pad(F.pad(begins[0].nonzero().flatten() + 1, (1, 0)), (0, 1), value=position_ids.shape[-1])
