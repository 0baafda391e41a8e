"""What a decoder carries from one segment of a sequence to the next."""

import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import LongTensor
from torch.utils._pytree import tree_leaves, tree_map

FORMAT = "glalm state cache"


@dataclass
class StateCache:
    """One mixer state a layer and the number of tokens behind it. Only softmax attention's grows with that number.

    `forward` never changes a cache: it returns a new one. So a cache may be kept and continued from many times.
    """

    states: list = field(default_factory=list)  # one a layer
    seen: int = 0  # tokens

    is_compileable: ClassVar[bool] = False  # transformers asks before it compiles a decoding step by itself

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: LongTensor) -> "StateCache":
        """The cache of the chosen beams, beam_idx: [B]. In place, as transformers' beam search expects."""
        self.states = [tree_map(lambda x: x.index_select(0, beam_idx.to(x.device)), s) for s in self.states]
        return self

    def check(self, layers: int, sequences: int) -> None:
        """ValueError unless it is empty, or of as many layers and sequences."""
        if self.states and len(self.states) != layers:
            raise ValueError(
                f"past_key_values has states of {len(self.states)} layers, and the model {layers} layers: it is "
                "another model's"
            )
        for leaf in tree_leaves(self.states):
            if len(leaf) != sequences:
                raise ValueError(
                    f"past_key_values has states of {len(leaf)} sequences, and the input {sequences}; to continue one "
                    f"several times, past_key_values.reorder_cache(torch.zeros({sequences}, dtype=torch.long))"
                )

    def save(self, path: str | os.PathLike) -> None:
        """One safetensors file: tensor "i" or, of a tuple, "i.0", "i.1", ... is layer i's state."""
        tensors = {}
        for i, state in enumerate(self.states):
            leaves = {f"{i}.{j}": leaf for j, leaf in enumerate(state)} if isinstance(state, tuple) else {f"{i}": state}
            tensors |= {name: leaf.detach().contiguous() for name, leaf in leaves.items()}
        save_file(tensors, path, {"format": FORMAT, "seen": str(self.seen)})

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "StateCache":
        """The cache that `save` wrote. Raises ValueError when path is not one, or damaged."""
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: not a state that StateCache.save wrote")
        states: dict[int, list] = {}
        for name in sorted(tensors, key=lambda n: [int(part) for part in n.split(".")]):
            states.setdefault(int(name.split(".")[0]), []).append(tensors[name])
        whole = [tuple(leaves) if f"{i}.0" in tensors else leaves[0] for i, leaves in sorted(states.items())]
        return cls(whole, int(metadata["seen"]))
