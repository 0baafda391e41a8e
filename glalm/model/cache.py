"""The cache that a decoder carries from one segment of a text to the next."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import LongTensor, Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node, tree_leaves, tree_map

from glalm.model.written_weights import apply_umask

FORMAT = "glalm state cache"


@dataclass
class StateCache:
    """The mixer state of every layer, and the number of tokens it has seen. See Mixer.state_grows.

    A forward pass never changes a cache but returns a new one, so a cache can be continued several times.

    StateCache(iter(cache)) has the same tensors. nn.DataParallel joins the caches of its replicas in this way.
    """

    states: list = field(default_factory=list)  # one per layer, or none before the first token
    seen: int = 0  # tokens

    # transformers asks whether it may compile the decoding steps, and whether tokens can be removed from the cache.
    is_compileable: ClassVar[bool] = False
    is_croppable: ClassVar[bool] = False

    def __post_init__(self):
        if isinstance(self.states, Iterator):
            seen, *self.states = self.states
            self.seen = int(seen[0])

    def __iter__(self) -> Iterator:
        """Yield the number of tokens as a tensor [N], and then the states. The first axis of all is the sequences."""
        leaves = tree_leaves(self.states)
        rows = leaves[0] if leaves else torch.empty(1)
        yield rows.new_full((len(rows),), self.seen, dtype=torch.int64)
        yield from self.states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: LongTensor) -> "StateCache":
        """Select the sequences beam_idx [B], in place, as transformers' beam search expects. Return the cache."""
        self.batch_select_indices(beam_idx)
        return self

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Select the sequences `indices` [B], or where `indices` [N] is True, in place, as transformers' caches do."""
        indices = torch.as_tensor(indices)
        self.states = [tree_map(lambda x: x[indices.to(x.device)], s) for s in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, in place, as transformers' caches do."""
        self.states = [tree_map(lambda x: x.repeat_interleave(repeats, 0), s) for s in self.states]

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "A state cannot be rolled back to an earlier token. Keep the cache of that token instead: a forward pass "
            "never changes the cache it is given."
        )

    def check_fits(self, layers: int, sequences: int) -> None:
        """Raise ValueError unless the cache is empty or has states of this number of layers and sequences."""
        if self.states and len(self.states) != layers:
            raise ValueError(
                f"past_key_values has states of {len(self.states)} layers, and the model {layers} layers: it is "
                "another model's"
            )
        for leaf in tree_leaves(self.states):
            if len(leaf) != sequences:
                message = f"past_key_values has states of {len(leaf)} sequences, and the input {sequences}."
                if 0 < len(leaf) < sequences and sequences % len(leaf) == 0:
                    repeats = sequences // len(leaf)
                    message += (
                        f" To continue each of them {repeats} times, as num_beams and num_return_sequences do, call "
                        f"past_key_values.batch_repeat_interleave({repeats}) first; it changes the cache in place."
                    )
                raise ValueError(message)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file. Layer i's state is the tensor "i", or the tensors "i.0", "i.1", ... of a tuple."""
        tensors: dict[str, Tensor] = {}
        for i, state in enumerate(self.states):
            if isinstance(state, tuple):
                tensors |= {f"{i}.{j}": leaf for j, leaf in enumerate(state)}
            else:
                tensors[f"{i}"] = state
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, {"format": FORMAT, "seen": str(self.seen)})
        apply_umask(path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "StateCache":
        """Read the cache that `save` wrote. Raise ValueError if the file is damaged or is not such a cache."""
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: not a state that StateCache.save wrote")
        leaves: dict[int, list[Tensor]] = {}
        for name in sorted(tensors, key=lambda name: [int(part) for part in name.split(".")]):
            leaves.setdefault(int(name.partition(".")[0]), []).append(tensors[name])
        states = [tuple(leaves[i]) if f"{i}.0" in tensors else leaves[i][0] for i in sorted(leaves)]
        return cls(states, int(metadata["seen"]))


# torch.export and FSDP take the outputs of a model apart by this registration. The number of tokens is a leaf, too,
# because it is an output of a program that is exported for any length.
register_pytree_node(
    StateCache,
    lambda cache: ([cache.states, cache.seen], None),
    lambda children, _: StateCache(*children),
    serialized_type_name="glalm.model.cache.StateCache",
    flatten_with_keys_fn=lambda cache: (
        [(GetAttrKey("states"), cache.states), (GetAttrKey("seen"), cache.seen)],
        None,
    ),
)
