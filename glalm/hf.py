"""The models as transformers classes: configs, generation, and the habits of Trainer and peft.

Importing this module registers them with transformers' Auto classes. glalm.pretrained loads their checkpoints.
"""

import copy
import dataclasses
import difflib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from glalm import IGNORE_INDEX
from glalm.config.strict import ConfigError, build_dataclass, require
from glalm.kernels.common import sequence_ids
from glalm.kernels.context_parallel import ContextShard
from glalm.model.cache import StateCache
from glalm.model.config import ModelConfig
from glalm.model.decoder import Block, CausalLM, Decoder, init_module, run_blocks
from glalm.model.fla_checkpoints import FORMATS, config_from_fla
from glalm.model.loss import head_cross_entropy, head_token_losses
from glalm.model.mixers import MIXERS, options_by_name
from glalm.model.written_weights import COMPILED, apply_umask, collect_weights, explain_misfit
from glalm.pretrained import load_pretrained, remove_stale_weights

MODEL_FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
# The model types of config.json that these classes read: ours, and those of published GLA, RetNet and Transformer++.
MODEL_TYPES = ("glalm", *FORMATS)
# That of a folder with the code of its mixers. It is not registered: transformers prefers a registered class to code.
MODEL_TYPE_WITH_CODE = "glalm_with_code"
# What configs of other architectures call the keys of ModelConfig. The spelling alone does not show it.
OTHER_NAMES = {
    **dict.fromkeys(("num_layers", "n_layers", "n_layer"), "num_hidden_layers"),
    **dict.fromkeys(("d_model", "n_embd", "hidden_dim"), "hidden_size"),
    **dict.fromkeys(("n_heads", "n_head"), "num_heads"),
}

# ----------------------------------------------------------------------------------------------------------- config


class GLALMConfig(ModelConfig, PreTrainedConfig):
    """A `ModelConfig` that is also a transformers config, saved as config.json and loaded by AutoConfig.

    A published config.json (see glalm.model.fla_checkpoints) is translated. A key that neither ModelConfig nor
    transformers knows is kept, as everywhere in transformers, unless it looks like a misspelt key of ModelConfig, or is
    what other architectures call one.

    Raises ConfigError (a ValueError) for a misspelt key or a shape that ModelConfig refuses.
    """

    model_type = "glalm"
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012 (transformers reads a plain dict)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    base_model_fsdp_plan: ClassVar = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }
    auto_map: ClassVar = {}  # trl reads it of every config. None of our classes is loaded from a checkpoint's code.

    vocab_size: int = 32000
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        for key in kwargs:
            near = difflib.get_close_matches(OTHER_NAMES.get(key, key), MODEL_FIELDS, n=1, cutoff=0.85)
            require(not near or hasattr(PreTrainedConfig, key), f"unknown key {key}; did you mean {near and near[0]}?")
        try:
            ModelConfig.__post_init__(self)
        except ConfigError as error:
            raise ConfigError(f"{error}{explain_missing_mixers(**kwargs)}") from error
        PreTrainedConfig.__post_init__(self, **kwargs)

    def __setattr__(self, name, value):
        # `update` and plain assignments may bring mappings, too, in place of a mixer's options.
        options = options_by_name().get(name)
        if options is not None and isinstance(value, dict):
            value = build_dataclass(options, value, f"model.{name}")
        super().__setattr__(name, value)

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> "GLALMConfig":
        return config if isinstance(config, cls) else cls(**dataclasses.asdict(config))

    def to_model_config(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in MODEL_FIELDS})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        tree, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return config_from_fla(tree), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # A config.json may name an attention kernel, which would be fetched from the hub and run, and a pickle to load.
        tree = config_from_fla(config_dict)
        safe = {k: v for k, v in tree.items() if "_implementation" not in k and k != "transformers_weights"}
        # transformers would set these after all checks, and leave a mapping of options a mapping.
        for name in kwargs.keys() & set(MODEL_FIELDS):
            value = kwargs.pop(name)
            if isinstance(value, dict) and isinstance(safe.get(name), dict):
                value = safe[name] | value
            safe[name] = value
        return super().from_dict(safe, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return transformers' tree, with the options of every mixer as a mapping."""
        tree = super().to_dict()
        return {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in tree.items()}


def explain_missing_mixers(mixer_packages: dict | None = None, auto_map: dict | None = None, **others) -> str:
    """Return what to do for the mixers that a config.json of `glalm export` has from outside of glalm, or nothing."""
    missing = {name: package for name, package in (mixer_packages or {}).items() if name not in MIXERS}
    steps = [f". Install the Python package {package}, which has the mixer {name}" for name, package in missing.items()]
    if auto_map:
        steps.append(
            ". Its folder may have the code of its mixer: if you trust that code, load the folder by "
            "AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)"
        )
    return "".join(steps)


# ----------------------------------------------------------------------------------------------------------- models


class CheckpointedBlock(GradientCheckpointingLayer, Block):
    """A block that gradient_checkpointing_enable can recompute in the backward pass."""


class GLALMPreTrainedModel(PreTrainedModel):
    config_class = GLALMConfig
    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CheckpointedBlock"]  # noqa: RUF012 (transformers reads a plain list)
    _is_stateful = True  # transformers then refuses assisted decoding, which would have to rewind the state

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a checkpoint as transformers does, but refuse one that does not fit: see load_pretrained."""
        return load_pretrained(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """Save weights and config as transformers does, and warn if they do not describe the same model.

        Adapters, models that transformers has quantised, and sharded models are saved by transformers' own rules.

        Raises:
            ValueError: A weight is quantised, and not by transformers.
        """
        is_quantised = getattr(self, "hf_quantizer", None) is not None
        is_sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters())
        has_adapters = getattr(self, "_hf_peft_config_loaded", False)
        if not (is_quantised or is_sharded or has_adapters):
            state_dict = collect_weights(self) if state_dict is None else state_dict
            with torch.device("meta"):
                expected = type(self)(copy.deepcopy(self.config))
            if misfit := explain_misfit(state_dict, expected):
                warnings.warn(f"{save_directory} is saved, but does not fit its config.json. {misfit}", stacklevel=2)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process:
            if not (has_adapters or kwargs.get("variant")):  # These are saved in files of other names.
                remove_stale_weights(Path(save_directory), bool(kwargs.get("distributed_checkpoint")))
            for path in Path(save_directory).glob("*.safetensors"):
                apply_umask(path)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # from_pretrained calls this for every module after loading, and has marked the parameters that it loaded.
        parameters = list(module.parameters(recurse=False))
        loaded = {p: p.clone() for p in parameters if getattr(p, "_is_hf_initialized", False)}
        if parameters and len(loaded) == len(parameters):
            return
        init_module(module, self.config.initializer_range)
        for p, value in loaded.items():
            p.copy_(value)


class PackingArguments(TypedDict, total=False):
    """Arguments by which transformers describes packed sequences to attention kernels, beside position_ids."""

    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    seq_idx: Tensor


class GLALMModel(GLALMPreTrainedModel):
    """glalm.model.decoder.Decoder with transformers' arguments: token ids [B, T] to hidden states [B, T, d]."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]  # noqa: RUF012

    def __init__(self, config: GLALMConfig):
        super().__init__(config)
        config.to_model_config()  # It raises ConfigError if the config was changed to a shape that does not fit.
        decoder = Decoder(config, CheckpointedBlock)
        self.embeddings = decoder.embeddings
        self.layers = decoder.layers
        self.norm = decoder.norm
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: LongTensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: LongTensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        context: ContextShard | None = None,
        **packing: Unpack[PackingArguments],
    ) -> BaseModelOutputWithPast:
        """Compute hidden states.

        Args:
            input_ids: [B, T], or instead inputs_embeds [B, T, d].
            attention_mask: [B, T or more], 0 at padding. Padding comes before the first token of a row, or after its
                last one if the state that comes out is not used.
            past_key_values: the cache that an earlier call returned for the text before the input.
            use_cache: whether to return the cache after the input. None: config.use_cache, except in training.
            cu_seqlens: [N + 1], the bounds 0, ..., T of N sequences that are packed into a batch of one. A wrong bound
                raises a ValueError on the CPU only.
            position_ids: [1 or B, T]. In a batch of one, another packed sequence begins where they restart, as with
                cu_seqlens. They have no other effect.
            output_attentions: wrappers always give it. True is an error: most mixers have no attention weights.
            context: as of CausalLM.forward.
            packing: other descriptions of packed sequences, which collators add. cu_seq_lens_q is cu_seqlens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise TypeError(f"{type(self).__name__} gives no attention weights (output_attentions)")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not isinstance(past_key_values, StateCache | None):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, not a StateCache. Leave it out, or pass the "
                "past_key_values that an earlier call of this model returned. (peft's prefix tuning learns keys and "
                "values, which this model does not have; use LoRA or prompt tuning.)"
            )
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cu_seqlens = find_bounds(cu_seqlens, position_ids, packing, x, attention_mask, past_key_values)
        block_inputs = [] if output_hidden_states else None
        x, cache = run_blocks(
            self.layers,
            x,
            cache=past_key_values,
            return_cache=use_cache,
            cu_seqlens=cu_seqlens,
            padding=padding_mask(attention_mask, x),
            context=context,
            block_inputs=block_inputs,
        )
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*block_inputs, x) if output_hidden_states else None,
        )


class ExtraArguments(PackingArguments, total=False):
    """Arguments of GLALMForCausalLM.forward that must not be in its signature, which transformers and peft inspect."""

    shift_labels: LongTensor  # Trainer would score only batches with every argument whose name contains "label".
    output_attentions: bool
    position_ids: LongTensor  # generate would compute them and pass them on.


class OutputWithLazyLogits(CausalLMOutputWithPast):
    """An output whose logits are no item of it, and are computed when the attribute is read."""

    compute_logits: Callable[[], Tensor] | None = None
    computed_logits: Tensor | None = None

    @property
    def logits(self) -> Tensor | None:
        if self.computed_logits is None and self.compute_logits is not None:
            object.__setattr__(self, "computed_logits", self.compute_logits())
        return self.computed_logits

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        object.__setattr__(self, "computed_logits", value)


class GLALMForCausalLM(GLALMPreTrainedModel, GenerationMixin):
    """glalm.model.decoder.CausalLM with transformers' arguments, and with the same parameter names."""

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch.
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012
    _fsdp_plan: ClassVar = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GLALMConfig):
        super().__init__(config)
        self.model = GLALMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._keys_to_ignore_on_load_unexpected = set()  # post_init copies GLALMModel's, by which it has no head.

    def to_core(self) -> CausalLM:
        """Return a CausalLM that shares the parameters of this model.

        Raises:
            ConfigError: The model is not what its config describes.
        """
        with torch.device("meta"):
            core = CausalLM(self.config.to_model_config())
        weights = collect_weights(self)
        misfit = explain_misfit(weights, core)
        require(not misfit, misfit)
        core.load_state_dict(weights, assign=True)
        for name, buffer in self.named_buffers():  # Constants, which are in no state dict.
            module, _, leaf = name.replace(COMPILED, "").rpartition(".")
            setattr(core.get_submodule(module), leaf, buffer)
        core.tie_weights()
        return core

    @can_return_tuple
    def forward(
        self,
        input_ids: LongTensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        z_loss: float = 0.0,
        return_dict: bool | None = None,
        **extra: Unpack[ExtraArguments],
    ) -> CausalLMOutputWithPast:
        """Compute the loss of the next tokens, or their logits. The arguments not listed are GLALMModel's.

        Args:
            labels: [B, T], aligned with input_ids as everywhere in transformers, and shifted here within each packed
                sequence; or instead shift_labels [B, T], the next token of each position. With either, `loss` is the
                mean cross-entropy in nats over the labels that are not -100. `logits` are then None, because they are
                never all in memory, except beside `labels` in eval mode, where Trainer evaluates them, and beside
                inputs_embeds: wrappers that give these may take a loss of their own from the logits, which are
                computed when the output's attribute is read.
            logits_to_keep: compute only the last so many logits (0: all), or those at these positions.
            num_items_in_batch: the loss is a sum divided by this instead of a mean, so that those of several batches
                add up.
            z_loss: a factor for the mean of logsumexp(logits)^2, which is added to the loss.
        """
        shift_labels = extra.pop("shift_labels", None)
        position_ids = extra.pop("position_ids", None)
        output_attentions = extra.pop("output_attentions", None)
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep: expected the number of last logits, 0 for all, got {logits_to_keep}")
        x = input_ids if inputs_embeds is None else inputs_embeds
        cu_seqlens = find_bounds(cu_seqlens, position_ids, extra, x, attention_mask, past_key_values)
        out = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_hidden_states,
            cu_seqlens,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden = out.last_hidden_state
        for name, value in (("labels", labels), ("shift_labels", shift_labels)):
            if value is not None and value.shape != hidden.shape[:2]:
                raise ValueError(f"{name}: expected {list(hidden.shape[:2])}, as the input is, got {list(value.shape)}")
        if shift_labels is None and labels is not None:
            shift_labels = shift_within_sequences(labels, cu_seqlens)
        loss, logits = None, None
        if shift_labels is not None:
            loss = head_cross_entropy(self.lm_head, hidden, shift_labels, z_loss)
            if num_items_in_batch is not None:
                items = torch.as_tensor(num_items_in_batch).clamp(min=1)  # It is 0 if all labels are ignored.
                loss = loss * (shift_labels != IGNORE_INDEX).sum() / items
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if shift_labels is None or (labels is not None and not self.training):
            logits = self.lm_head(hidden[:, positions])
        is_lazy = logits is None and inputs_embeds is not None and not torch.compiler.is_compiling()
        output = (OutputWithLazyLogits if is_lazy else CausalLMOutputWithPast)(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        if is_lazy:
            object.__setattr__(output, "compute_logits", lambda: self.lm_head(hidden[:, positions]))
        return output

    @torch.no_grad()
    def score(
        self, input_ids: LongTensor, targets: LongTensor, past_key_values: StateCache | None = None
    ) -> tuple[Tensor, StateCache]:
        """Return the cross-entropy in nats of each target [B, T] given the tokens up to it, and the cache after it."""
        out = self.model(input_ids, past_key_values=past_key_values, use_cache=True)
        return head_token_losses(self.lm_head, out.last_hidden_state, targets), out.past_key_values

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,  # transformers looks for this name in the signature before it accepts embeddings.
        **kwargs,
    ):
        """Return the inputs of the next forward pass.

        next_sequence_length is the number of tokens that the cache has not seen yet; None: all of input_ids.
        """
        # generate hands a tokenizer, by which it finds stop_strings, on to the model.
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if next_sequence_length is not None and next_sequence_length <= 0:
            raise ValueError(
                f"past_key_values has seen {seen} tokens and input_ids, which begins with these, has "
                f"{seen + next_sequence_length}, so no token is left to predict from. Pass a cache of fewer tokens."
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, **kwargs
        )
        if next_sequence_length == 1 and seen:
            # The logits of the one token are asked for, so it is no padding; without a mask, decoding is faster.
            inputs["attention_mask"] = None
        reads_all = next_sequence_length is None and inputs["input_ids"] is not None
        # transformers 5.17 cuts the entire prompt and its mask into chunks, even if the cache has seen a part of it.
        if reads_all and attention_mask is not None and attention_mask.shape[1] < seen + input_ids.shape[1]:
            raise ValueError(
                f"prefill_chunk_size: this version of transformers would read the {seen} tokens of past_key_values "
                "again. Update transformers, or leave prefill_chunk_size out."
            )
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # The first forward pass returns a StateCache.

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # transformers refuses to read a prompt in chunks without a cache to begin with.
        if generation_config.prefill_chunk_size is not None and generation_config.use_cache is not False:
            model_kwargs.setdefault("past_key_values", StateCache())

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(
            "generate_batch and continuous batching page keys and values, and a state has none. Call generate with "
            "the prompts padded on the left, or once for each prompt."
        )


def padding_mask(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the last T columns of attention_mask as the blocks take them, [B, T, 1], for x [B, T, d]."""
    if attention_mask is None:
        return None
    B, T = x.shape[:2]
    if attention_mask.dim() != 2 or len(attention_mask) != B or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask: expected [B, T] with B = {B} and T >= {T}, as the input is, got "
            f"{list(attention_mask.shape)}"
        )
    return attention_mask[:, -T:, None] != 0


def shift_within_sequences(labels: LongTensor, cu_seqlens: Tensor | None) -> LongTensor:
    """Return the label of the next position [B, T], and IGNORE_INDEX at the last position of every sequence."""
    following = labels[:, 1:]
    if cu_seqlens is not None:
        sequence = sequence_ids(cu_seqlens, labels.shape[1])
        following = following.where(sequence[1:] == sequence[:-1], IGNORE_INDEX)
    return torch.cat([following, torch.full_like(labels[:, :1], IGNORE_INDEX)], 1)


def find_bounds(
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    packing: Mapping[str, Any],
    x: Tensor,
    attention_mask: Tensor | None,
    past_key_values: StateCache | None,
) -> Tensor | None:
    """Return the bounds [N + 1] of packed sequences, in whichever way they are described, or None.

    Raises:
        TypeError: `packing` has another argument than PackingArguments, or nothing but seq_idx.
        ValueError: As of cu_seqlens_of_positions.
    """
    if unknown := [name for name in packing if name not in PackingArguments.__annotations__]:
        raise TypeError(f"the model takes no {', '.join(unknown)}")
    if packing.get("cu_seq_lens_q") is not None:
        return packing["cu_seq_lens_q"]
    if position_ids is not None:
        return cu_seqlens_of_positions(position_ids, x, attention_mask, past_key_values, cu_seqlens)
    if cu_seqlens is None and packing.get("seq_idx") is not None:
        raise TypeError(
            "seq_idx alone does not describe packed sequences here: pass position_ids or cu_seq_lens_q, too"
        )
    return cu_seqlens


RESTARTS = (
    "position_ids restart, as those of packed sequences do. Packed sequences come in a batch of one, without "
    "attention_mask, past_key_values or cu_seqlens; for anything else leave position_ids out."
)


def cu_seqlens_of_positions(
    position_ids: Tensor,
    x: Tensor,
    attention_mask: Tensor | None,
    past_key_values: StateCache | None,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """Return the bounds [N + 1] of the packed sequences that position_ids describe, or `cu_seqlens` if they do not.

    As in transformers, a sequence begins wherever a position is not the one before it plus 1. Positions at padding,
    where attention_mask is 0, are ignored.

    Args:
        position_ids: [1 or B, T].
        x: [B, T, ...], the model's input.
        attention_mask, past_key_values, cu_seqlens: the model's other arguments, with which it cannot be packed.

    Raises ValueError if positions restart where they cannot mean packed sequences. In compiled code, which cannot
    branch on values, this is torch._assert_async's error.
    """
    B, T = x.shape[:2]
    if not isinstance(position_ids, Tensor) or position_ids.shape[-1] != T:
        shape = list(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise ValueError(f"position_ids: expected a tensor of {T} positions a row, got {shape}")
    restarts = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:
        is_token = attention_mask[:, -T:] != 0
        restarts = restarts & is_token[:, 1:] & is_token[:, :-1]
    if B == 1 and attention_mask is None and past_key_values is None and cu_seqlens is None:
        return read_bounds(restarts.flatten(), T)
    if torch.compiler.is_compiling():
        torch._assert_async(~restarts.any(), RESTARTS)
    elif restarts.any():
        raise ValueError(RESTARTS)
    return cu_seqlens


def read_bounds(restarts: Tensor, T: int) -> Tensor | None:
    """Return [0, ..., T] with a bound after each restart [T - 1], or None if there are none. This waits for a GPU."""
    if not restarts.any():
        return None
    return F.pad(F.pad(restarts.nonzero().flatten() + 1, (1, 0)), (0, 1), value=T)


# torch.compile breaks the graph here. With fullgraph=True it fails instead, and shows this reason.
read_bounds._torchdynamo_disable = True
read_bounds._torchdynamo_disable_msg = "the number of packed sequences is a value; pass cu_seqlens, not position_ids"


# ----------------------------------------------------------------------------------------------------- registration


def register() -> None:
    """Register the classes with transformers' Auto classes."""
    AutoConfig.register(GLALMConfig.model_type, GLALMConfig, exist_ok=True)
    for model_type in MODEL_TYPES:
        if model_type not in CONFIG_MAPPING:  # flash-linear-attention, if it is imported too, has registered its own.
            CONFIG_MAPPING.register(model_type, GLALMConfig)
    AutoModel.register(GLALMConfig, GLALMModel, exist_ok=True)
    AutoModelForCausalLM.register(GLALMConfig, GLALMForCausalLM, exist_ok=True)
    # Trainer's label smoothing shifts the labels only of model classes that this table names.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GLALMConfig.model_type] = GLALMForCausalLM.__name__


register()
