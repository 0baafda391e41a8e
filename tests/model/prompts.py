"""Prompts and settings that the tests of generation share."""

import torch
import torch.nn.functional as F

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": -1}
SAMPLED = GREEDY | {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.95}


def left_padded(*rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return prompts of any length as a batch that is padded on the left, with its mask."""
    longest = max(map(len, rows))
    ids = torch.stack([F.pad(row, (longest - len(row), 0), value=3) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
