"""The decoder and its causal-LM head, as a transformers PreTrainedModel."""

import torch
from torch import LongTensor, Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from glalm.model.block import Block
from glalm.model.cache import StateCache
from glalm.model.config import GLALMConfig
from glalm.model.loss import IGNORE, linear_cross_entropy, token_losses
from glalm.model.norm import RMSNorm


class GLALMPreTrainedModel(PreTrainedModel):
    config_class = GLALMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers reads a plain list)
    _is_stateful = True  # a state cannot be cut back, so transformers refuses assisted decoding

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        if hasattr(module, "initialise"):  # a mixer's or a feature map's own parameters
            module.initialise()


class GLALMModel(GLALMPreTrainedModel):
    """Embeddings, blocks, final norm: token ids [B, T] to hidden states [B, T, d]."""

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
        input_ids [B, T] or inputs_embeds [B, T, d]; attention_mask [B, T], 0 at padding, which must be on the left;
        past_key_values continues a sequence; cu_seqlens [N + 1] packs N sequences into a batch of one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        padding = None if attention_mask is None else attention_mask[:, -x.shape[1] :, None].to(x.dtype)
        past = past_key_values or StateCache([None] * len(self.layers))
        states, hidden = [], []
        for layer, state in zip(self.layers, past.states, strict=True):
            hidden += [x] if output_hidden_states else []
            x, state = layer(x, padding=padding, state=state, return_state=use_cache, cu_seqlens=cu_seqlens)
            states.append(state)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=StateCache(states, past.seen + x.shape[1]) if use_cache else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )


class GLALMForCausalLM(GLALMPreTrainedModel, GenerationMixin):
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
        shift_labels: LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """
        labels [B, T]: as transformers has them, aligned with input_ids and shifted here; shift_labels [B, T]: already
        the next token of each position. With either, `loss` is the mean cross-entropy in nats over the labels that
        are not -100, and `logits` is None: they are never held. logits_to_keep: only the last so many logits (0: all).
        The other arguments are GLALMModel's.
        """
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
        if labels is not None:
            shift_labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1)
        if shift_labels is not None:
            loss = linear_cross_entropy(hidden, self.lm_head.weight, shift_labels)
        else:
            logits = self.lm_head(hidden[:, -logits_to_keep:])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )

    @torch.no_grad()
    def score(
        self, input_ids: LongTensor, targets: LongTensor, past_key_values: StateCache | None = None
    ) -> tuple[Tensor, StateCache]:
        """Cross-entropy in nats of each target [B, T] given the tokens up to it, and the state to go on from."""
        out = self.model(input_ids, past_key_values=past_key_values, use_cache=True)
        return token_losses(out.last_hidden_state, self.lm_head.weight, targets), out.past_key_values

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        """Of the tokens so far, those that the state has not seen."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is a StateCache, made by the first forward
