"""The model that evaluators see: one interface to our models and to any causal language model of transformers."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import DynamicCache, PreTrainedModel

from glalm import IGNORE_INDEX
from glalm.config.run import RunConfig, Weights
from glalm.config.strict import ConfigError, describe_divisors, require
from glalm.data.loader import flatten_batch, pad_batch, shard_batch
from glalm.data.tokenizer import Tokenizer
from glalm.hf import GLALMForCausalLM
from glalm.kernels.context_parallel import ContextShard, gather_tokens
from glalm.model.cache import StateCache
from glalm.model.loss import token_losses
from glalm.model.mixers import MIXERS
from glalm.model.plain import is_plain_linear

MAX_LOGITS = 2**25  # float32 logits computed at once: 128 MiB


@dataclass
class EvalModel:
    """A causal language model on its device, in evaluation mode, and what evaluators need to know of it.

    Attributes:
        causal_lm: One of ours (`is_ours`) or any of transformers.
        is_recurrent: Whether the state has one size, however many tokens were read.
        accepts_state: Whether the model can continue a text from a state.
        document_prefix: Token ids that documents began with in training: (bos,) or (). None: the ids that data
            preparation with `tokenizer` inserts.
        train_length: Training length in tokens, if known.
        document_boundaries: `data.document_boundaries` of training. None: the run's, or else "ignore".
        max_length: Longest input in tokens of a model with learned positions; None for all others.
        weights: Which weights of the checkpoint these are.
        checksum: SHA-256 of the weights.
        model_id: What the results in one folder have in common: the id of a run, or else the checksum.
        run_config: Config of the training run, if the model is a checkpoint of one.
        step: The checkpoint's step.
        output_folder: Where eval/ and plots/ are written.
        data_fingerprint, data_manifest: Those of the run's training data, as it was when the run began.
        tokenizer_fingerprint: That of the tokenizer of training, if it was recorded.
    """

    causal_lm: PreTrainedModel
    name: str = "model"
    tokenizer: Tokenizer | None = None
    document_prefix: tuple[int, ...] | None = None
    train_length: int | None = None
    document_boundaries: str | None = None
    max_length: int | None = None
    weights: Weights = "current"
    checksum: str = ""
    model_id: str = ""
    precision: str = "fp32"
    run_config: RunConfig | None = None
    step: int = 0
    output_folder: Path = Path()
    data_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    data_manifest: dict | None = None

    def __post_init__(self):
        causal_lm = self.causal_lm
        if self.document_prefix is None:
            self.document_prefix = tuple(self.tokenizer.bos_ids) if self.tokenizer else ()
        if self.document_boundaries is None:
            self.document_boundaries = self.run_config.data.document_boundaries if self.run_config else "ignore"
        self.model_id = self.model_id or self.checksum
        self.device: torch.device = causal_lm.device
        self.parameters: int = sum(p.numel() for p in causal_lm.parameters())
        self.vocab_size: int = causal_lm.config.get_text_config().vocab_size
        self.is_ours = isinstance(causal_lm, GLALMForCausalLM)
        # Where _head is None, features are the logits themselves, for example in models that scale or cap their logits.
        self._head = causal_lm.get_output_embeddings() if _head_gives_logits(causal_lm) else None
        self._forward_arguments = inspect.signature(causal_lm.forward).parameters.keys()
        if self.is_ours:
            self.is_recurrent = not any(MIXERS[name].state_grows for name in causal_lm.config.layer_mixers())
        else:
            self.is_recurrent = causal_lm._is_stateful
        # Recurrent models of transformers cannot read several tokens from a state, only one.
        self._uses_cache = not self.is_ours and not self.is_recurrent and "past_key_values" in self._forward_arguments
        self.accepts_state = self.is_ours or self._uses_cache

    @property
    def unused_ids(self) -> list[int]:
        """The ids of the model that its tokenizer, whose vocabulary may be smaller, cannot decode."""
        return [] if self.tokenizer is None else list(range(self.tokenizer.vocab_size, self.vocab_size))

    @cached_property
    def bytes_per_state(self) -> int:
        """Bytes of one sequence's state after one token, which a model that is not recurrent needs for every token.

        0 where the model does not accept a state.
        """
        if not self.accepts_state:
            return 0
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        return count_state_bytes(self.forward_features(token, return_state=True)[1])

    def autocast(self) -> AbstractContextManager:
        """Return the context to run the model in: our weights are float32, those of other models have its precision."""
        mixed = self.is_ours and self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    # ------------------------------------------------------------------------------------------------- forward passes

    @torch.no_grad()
    def score_tokens(
        self,
        input_ids: LongTensor,
        targets: LongTensor,
        state: Any = None,
        return_state: bool = False,
        starts: Tensor | None = None,
        shard: ContextShard | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the cross-entropy of each target after the tokens up to it, and the state after the last token.

        Args:
            input_ids: [B, T]
            targets: [B, T]
            state: The state to continue from, as an earlier call returned it.
            return_state: Whether to return the state; else it is None.
            starts: bool [B, T], on the CPU: where documents begin, each of which is read from an empty state. The first
                token of every row must be one. Only for our models, and without states.
            shard: The part of the sequences that this process reads, if those of a group share them. All of the group
                call this with the same arguments, and get the losses and the state of the whole sequences.

        Returns:
            losses: Nats, float32 [B, T]; 0 where the target is IGNORE_INDEX.
            state: It has one size where the model is recurrent; else it holds all keys and values.

        Raises:
            ConfigError: A state is given or needed, and the model does not accept one.
            ValueError: A state is needed, and the processes of the group cannot have equal shares of the T tokens.
        """
        B, T = targets.shape
        batch = {"input_ids": input_ids, "labels": targets}
        if starts is not None:
            batch["starts"] = starts
        if shard is not None:
            if return_state and T % shard.size:
                raise ValueError(f"{shard.size} processes cannot share {T} tokens equally, and so give no state")
            # Nothing that is scored sees the padding, which comes last.
            batch = pad_batch(batch, shard.size)
            batch = shard_batch(batch, batch["labels"].shape[1], shard.rank, shard.size)
        if starts is not None:
            batch = flatten_batch(batch)
        batch = {name: x.to(self.device) for name, x in batch.items()}
        features, state = self.forward_features(
            batch["input_ids"],
            state=state,
            return_state=return_state,
            cu_seqlens=batch.get("cu_seqlens"),
            context=replace(shard, rows=batch.get("rows")) if shard is not None else None,
        )
        losses = self._score_features(features, batch["labels"]).view(B, -1)
        if shard is not None:
            losses = gather_tokens(losses, shard)[:, :T]
        return losses, state

    def _score_features(self, features: Tensor, targets: LongTensor) -> Tensor:
        """Return the cross-entropy of targets [B, T] in nats, float32 [B, T]; 0 where the target is IGNORE_INDEX."""
        if self._head is not None and is_plain_linear(self._head):
            return token_losses(features, self._head.weight, targets)
        parts = [
            F.cross_entropy(logits, part, reduction="none", ignore_index=IGNORE_INDEX)
            for logits, part in self.iterate_logits(features.flatten(0, 1), targets.flatten())
        ]
        return torch.cat(parts).view(targets.shape)

    @torch.no_grad()
    def forward_features(
        self,
        input_ids: LongTensor,
        mask: Tensor | None = None,
        state: Any = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        context: ContextShard | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the features of every position, for `compute_logits`, and the state after the last token.

        Args:
            input_ids: [B, T]
            mask: [B, tokens behind the state + T]; 0 at padding, which must be on the left. None: no padding.
            state: The state to continue from, as an earlier call returned it.
            return_state: Whether to return a state; else it is None.
            cu_seqlens: [N + 1], the bounds of N sequences that are packed into a batch of one. Only for our models.
            context: This process's shard, if input_ids are its part of sequences that processes share (see
                ContextShard). Only for our models.

        Returns:
            features: [B, T, ...]
            state: As of `score_tokens`.

        Raises:
            ConfigError: A state is given or needed, and the model does not accept one.
        """
        if (state is not None or return_state) and not self.accepts_state:
            raise ConfigError(
                f"{self.name}: transformers' {type(self.causal_lm).__name__} cannot read a text in several parts, "
                "because it does not continue from a state"
            )
        options = {}
        if mask is not None:
            options["attention_mask"] = mask
            if not self.is_ours and "position_ids" in self._forward_arguments:
                options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if cu_seqlens is not None:
            options["cu_seqlens"] = cu_seqlens
        if context is not None:
            options["context"] = context
        if state is not None:
            options["past_key_values"] = state
        elif self._uses_cache and return_state:
            options["past_key_values"] = DynamicCache(config=self.causal_lm.config)
        body = self.causal_lm if self._head is None else self.causal_lm.base_model
        output = body(input_ids=input_ids, use_cache=return_state, **options)
        features = output.logits if self._head is None else output.last_hidden_state
        return features, output.past_key_values if return_state else None

    def compute_logits(self, features: Tensor) -> Tensor:
        """Return float32 logits [..., vocabulary] of features [..., d] of any positions."""
        return (features if self._head is None else self._head(features)).float()

    def iterate_logits(self, features: Tensor, targets: LongTensor) -> Iterator[tuple[Tensor, LongTensor]]:
        """Yield the logits [n, vocabulary] and targets [n] of features [N, ...], at most MAX_LOGITS numbers at once."""
        size = max(1, MAX_LOGITS // self.vocab_size)
        for part, part_targets in zip(features.split(size), targets.split(size), strict=True):
            yield self.compute_logits(part), part_targets

    def select_states(self, state: Any, rows: LongTensor) -> Any:
        """Return the states of the sequences `rows` [B'], in which a sequence may appear several times."""
        if isinstance(state, StateCache):
            return StateCache(tree_map(lambda x: x.index_select(0, rows), state.states), state.seen)
        state.batch_select_indices(rows)
        return state

    # -------------------------------------------------------------------------------------------------- requirements

    def require_length(self, length: int, key: str) -> None:
        """Raise ConfigError, naming the config's `key`, where the model cannot read `length` tokens."""
        require(
            self.max_length is None or length <= self.max_length,
            f"{key}: {self.name} has learned positions for {self.max_length} tokens and cannot read {length}; "
            f"write {self.max_length} or less",
        )

    def require_context_support(self, processes: int) -> None:
        """Raise ConfigError where `processes` of them cannot share the texts that the model reads."""
        if processes == 1:
            return
        key = f"parallel.context={processes}"
        require(
            self.is_ours,
            f"{key}: transformers' {type(self.causal_lm).__name__} cannot share a text between processes; remove it",
        )
        for name in dict.fromkeys(self.causal_lm.config.layer_mixers()):
            require(
                MIXERS[name].supports_context,
                f"{key}: {self.name} has the mixer {name}, which cannot share a text between processes; remove it",
            )
        length = self.train_length
        require(
            length is None or length % processes == 0,
            f"{key} does not divide the training length {length}; {describe_divisors(length or 1)}",
        )

    def require_tokenizer(self, evaluator: str) -> Tokenizer:
        """Return the tokenizer. Raise ConfigError where there is none, or not the one of training."""
        require(
            self.tokenizer is not None,
            f"evals=[{evaluator}]: {self.name} has no readable tokenizer; put its tokenizer.json (or tokenizer.model) "
            "beside the model, or write data_path=... with data that was prepared with it",
        )
        require(
            self.tokenizer_fingerprint in (None, self.tokenizer.fingerprint),
            f"evals=[{evaluator}]: {self.name} was trained with another tokenizer than the data has now; prepare the "
            "data with the old one, or write data_path=... with data that was",
        )
        return self.tokenizer

    def require_train_length(self, evaluator: str) -> int:
        """Return the training length. Raise ConfigError where it is not known."""
        require(
            self.train_length is not None,
            f"evals=[{evaluator}]: the training length of {self.name} is not known; write train_length=...",
        )
        return self.train_length


def count_state_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a StateCache or in a cache of transformers, each counted once."""
    layers = state.states if isinstance(state, StateCache) else [vars(layer) for layer in getattr(state, "layers", ())]
    tensors = {x.untyped_storage().data_ptr(): x for x in tree_leaves(layers) if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


@torch.no_grad()
def _head_gives_logits(causal_lm: PreTrainedModel) -> bool:
    """Return whether the logits are the head's output on the last hidden state, without a change afterwards.

    They must be equal to the last bit, because a cap on logits hardly changes the small ones of these few tokens.
    """
    head = causal_lm.get_output_embeddings()
    ids = torch.arange(4, device=causal_lm.device)[None]
    hidden = getattr(causal_lm.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if head is None or hidden is None or hidden.shape[-1] != getattr(head, "in_features", None):
        return False
    logits = causal_lm(input_ids=ids, use_cache=False).logits
    return torch.equal(head(hidden).float(), logits.float())
