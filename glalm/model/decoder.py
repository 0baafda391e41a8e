"""The decoder and its causal-LM head, as a transformers PreTrainedModel."""

from typing import TypedDict, Unpack

import torch
from torch import LongTensor, Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from glalm.kernels.common import check_cu_seqlens, check_values
from glalm.kernels.cross_entropy import IGNORE_INDEX
from glalm.model.block import Block
from glalm.model.cache import StateCache
from glalm.model.hf_config import GLALMConfig
from glalm.model.layers import RMSNorm
from glalm.model.loading import load
from glalm.model.loss import head_cross_entropy, head_losses
from glalm.model.packing import boundaries
from glalm.model.precision import matmul_dtype


class GLALMPreTrainedModel(PreTrainedModel):
    config_class = GLALMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers reads a plain list)
    _is_stateful = True  # a state cannot be cut back, so transformers refuses assisted decoding

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As transformers has it, also for flash-linear-attention's checkpoints, and strictly: see loading.load."""
        return load(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint did not bring: from_pretrained marks each parameter that it has loaded."""
        own = list(module.parameters(recurse=False))
        loaded = {p: p.clone() for p in own if getattr(p, "_is_hf_initialized", False)}
        if own and len(loaded) == len(own):
            return
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        if hasattr(module, "init_parameters"):  # a mixer's or a feature map's own parameters
            module.init_parameters()
        for p, value in loaded.items():
            p.copy_(value)


class GLALMModel(GLALMPreTrainedModel):
    """Embeddings, blocks, final norm: token ids [B, T] to hidden states [B, T, d]."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]  # noqa: RUF012

    def __init__(self, config: GLALMConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.embeddings = embeddings

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
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """
        input_ids [B, T] or inputs_embeds [B, T, d]; attention_mask [B, T], 0 at padding: before a sequence's first
        token, or on the right where the state that comes out is not used; past_key_values continues a sequence;
        cu_seqlens [N + 1] packs N sequences into a batch of one: the bounds 0, ..., T, a ValueError on the CPU if not.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.to(matmul_dtype(x))  # in float32 the residual stream would be twice the traffic and memory
        if x.dim() != 3:
            raise ValueError(f"expected input_ids [B, T] or inputs_embeds [B, T, d], got {list((x[..., 0]).shape)}")
        if attention_mask is not None and (
            attention_mask.dim() != 2 or len(attention_mask) != len(x) or attention_mask.shape[1] < x.shape[1]
        ):
            raise ValueError(
                f"attention_mask: expected [B, T] with B = {len(x)} and T >= {x.shape[1]}, as the input is, got "
                f"{list(attention_mask.shape)}"
            )
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, len(x))
            check_values(None, x, cu_seqlens)
        padding = None if attention_mask is None else (attention_mask[:, -x.shape[1] :, None] != 0).to(x.dtype)
        past = StateCache() if past_key_values is None else past_key_values
        if not isinstance(past, StateCache):
            raise ValueError(
                f"past_key_values is a {type(past).__name__}, not a StateCache; peft's prefix tuning learns keys and "
                "values, which this model has no place for: take LoRA or prompt tuning"
            )
        past.check(len(self.layers), len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
        states, hidden = [], []
        for layer, state in zip(self.layers, past.states or [None] * len(self.layers), strict=True):
            hidden += [x] if output_hidden_states else []
            x, state = layer(x, padding=padding, state=state, return_state=use_cache, cu_seqlens=cu_seqlens)
            states.append(state)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=StateCache(states, past.seen + x.shape[1]) if use_cache else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )


class MoreArguments(TypedDict, total=False):
    """Those of GLALMForCausalLM.forward that transformers must not see in its signature, or takes it to offer."""

    shift_labels: LongTensor  # its Trainer scores only batches that have every argument with "label" in its name
    output_attentions: bool  # peft always gives it; True is an error: most mixers have no such weights
    position_ids: LongTensor  # generation would make and give them


class GLALMForCausalLM(GLALMPreTrainedModel, GenerationMixin):
    accepts_loss_kwargs = True  # transformers' Trainer then gives num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GLALMConfig):
        super().__init__(config)
        self.model = GLALMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        **more: Unpack[MoreArguments],
    ) -> CausalLMOutputWithPast:
        """
        labels [B, T]: as transformers has them, aligned with input_ids and shifted here, within each packed sequence;
        shift_labels [B, T]: already the next token of each position. With either, `loss` is the mean cross-entropy in
        nats over the labels that are not -100; z_loss times the mean of logsumexp(logits)^2 is added to it. `logits` is
        then None, as they are never held, but in eval mode beside `labels`, where transformers' Trainer scores them.
        num_items_in_batch: both are sums over this instead of means, so that those of several batches add up.
        logits_to_keep: only the last so many logits (0: all), or those at these positions. position_ids: where
        those of a batch of one restart, another packed sequence begins, as with cu_seqlens; else, and at padding, they
        change nothing. The other arguments are GLALMModel's.
        """
        shift_labels, position_ids = more.pop("shift_labels", None), more.pop("position_ids", None)
        if more.pop("output_attentions", None) or more:
            what = f"takes no {', '.join(more)}" if more else "gives no attention weights"
            raise TypeError(f"{type(self).__name__} {what}")
        if position_ids is not None:
            given = input_ids if inputs_embeds is None else inputs_embeds
            if not isinstance(position_ids, Tensor) or position_ids.shape[-1] != given.shape[1]:
                shape = list(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
                raise ValueError(f"position_ids: expected a tensor of {given.shape[1]} positions a row, got {shape}")
            packed = boundaries(position_ids, attention_mask, past_key_values, cu_seqlens)
            cu_seqlens = cu_seqlens if packed is None else packed
        out = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_hidden_states,
            cu_seqlens,
        )
        hidden, loss, logits = out.last_hidden_state, None, None
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and given.shape != hidden.shape[:2]:
                raise ValueError(f"{name}: expected {list(hidden.shape[:2])}, as the input is, got {list(given.shape)}")
        if labels is not None and shift_labels is None:
            shift_labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], 1)
            if cu_seqlens is not None:  # the first token of a sequence is not the next one of another
                shift_labels[:, cu_seqlens[1:] - 1] = IGNORE_INDEX
        if shift_labels is not None:
            loss = head_cross_entropy(self.lm_head, hidden, shift_labels, z_loss)
            if num_items_in_batch is not None:
                items = torch.as_tensor(num_items_in_batch).clamp(
                    min=1
                )  # 0 where the batch's labels are all IGNORE_INDEX
                loss = loss * (shift_labels != IGNORE_INDEX).sum() / items
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep: expected the number of last logits, 0 for all, got {logits_to_keep}")
        if shift_labels is None or (labels is not None and not self.training):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )

    @torch.no_grad()
    def score(
        self, input_ids: LongTensor, targets: LongTensor, past_key_values: StateCache | None = None
    ) -> tuple[Tensor, StateCache]:
        """Cross-entropy in nats of each target [B, T] given the tokens up to it, and the state to go on from."""
        out = self.model(input_ids, past_key_values=past_key_values, use_cache=True)
        return head_losses(self.lm_head, out.last_hidden_state, targets), out.past_key_values

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,  # transformers looks for the name here before it takes any
        **kwargs,
    ):
        """next_sequence_length: how many of the tokens so far the state has not seen; None: all."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if next_sequence_length is not None and next_sequence_length <= 0:
            raise ValueError(
                f"past_key_values has seen {seen} tokens and input_ids, which begins with these, has "
                f"{seen + next_sequence_length}: nothing is left to predict from; give it one token less"
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, **kwargs
        )
        whole = next_sequence_length is None and inputs["input_ids"] is not None
        # transformers 5.17 cuts all of the prompt into chunks, and the mask with them, whatever the state has seen.
        if whole and attention_mask is not None and attention_mask.shape[1] < seen + input_ids.shape[1]:
            raise ValueError(
                f"prefill_chunk_size: this transformers would read again the {seen} tokens of past_key_values; "
                "update it, or leave prefill_chunk_size out"
            )
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is a StateCache, made by the first forward
