"""The decoder language model in plain PyTorch: embeddings, blocks, a final norm, a linear head, and what it costs.

glalm.hf wraps the same modules, with the same parameter names, for transformers.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from glalm.config.strict import ConfigError
from glalm.kernels.common import check_cu_seqlens, check_values, matmul_dtype
from glalm.kernels.context_parallel import ContextShard, check_context
from glalm.model.cache import StateCache
from glalm.model.config import ModelConfig
from glalm.model.layers import RMSNorm
from glalm.model.loss import head_cross_entropy
from glalm.model.mixers import MIXERS
from glalm.model.mixers.base import Mixer, check_outputs, mix_tokens


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down."""

    output_layer = "down_proj"

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """The pre-norm block: x += mixer(norm(x)), then x += swiglu(norm(x)) unless config.intermediate_size is 0."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = MIXERS[config.layer_mixers()[layer]].build(config, layer)
        self.mlp = None
        if config.intermediate_size:
            self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, *, padding: Tensor | None = None, state=None, **mixer_inputs) -> tuple[Tensor, object]:
        """Return the residual stream [B, T, d] after the block, and the mixer's state.

        The keyword arguments are those of Mixer.forward.
        """
        h = self.attn_norm(x)
        if padding is not None:
            h = h * padding  # The state of most mixers does not change where their input is 0.
        if padding is None or state is None or self.attn.state_grows:
            outputs = self.attn(h, padding=padding, state=state, **mixer_inputs)
            h, state = check_outputs(self.attn, h, outputs)
        else:
            h, state = mix_tokens(self.attn, h, padding, state=state, **mixer_inputs)
        x = x + h
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x)), state


class Decoder(nn.Module):
    """Embeddings, blocks and the final norm: token ids [B, T] to hidden states [B, T, d].

    `block` is the class of the blocks; glalm.hf passes a subclass.
    """

    def __init__(self, config: ModelConfig, block: type[Block] = Block):
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size is null; set it to the number of the tokenizer's tokens")
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: LongTensor, **inputs) -> tuple[Tensor, StateCache | None]:
        """Return the hidden states [B, T, d] and the cache or None. The keyword arguments are those of run_blocks."""
        x, cache = run_blocks(self.layers, self.embeddings(input_ids), **inputs)
        return self.norm(x), cache


class CausalLMOutput(NamedTuple):
    """What CausalLM.forward returns: `loss` if it was given labels, else `logits`; `cache` if it was asked for."""

    loss: Tensor | None
    logits: Tensor | None
    cache: StateCache | None


class CausalLM(nn.Module):
    """A decoder with a linear head that predicts the next token. Its parameters have the published GLA models' names.

    Building it draws random initial weights from torch's default generator.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # The weights that a seed gives depend on the order of these draws.
        init = partial(init_module, std=config.initializer_range)
        self.model = Decoder(config).apply(init)
        self.lm_head = nn.Linear(config.hidden_size, self.model.embeddings.num_embeddings, bias=False).apply(init)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the weight of the embeddings, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

    def forward(
        self,
        input_ids: LongTensor,
        shift_labels: LongTensor | None = None,
        *,
        cache: StateCache | None = None,
        return_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
        context: ContextShard | None = None,
        z_loss: float = 0.0,
    ) -> CausalLMOutput:
        """Compute the loss of the next tokens, or their logits.

        Args:
            input_ids: [B, T].
            shift_labels: [B, T], the token after each position, or IGNORE_INDEX. With them the output has the mean
                cross-entropy in nats and no logits, which are never all in memory.
            cache: what an earlier call returned for the text before input_ids.
            return_cache: whether to return the cache after input_ids.
            cu_seqlens: [N + 1], the bounds 0, ..., T of N sequences that are packed into a batch of one. A wrong bound
                raises a ValueError on the CPU only.
            padding: [B, T, 1], 0 at padded tokens and 1 elsewhere. Padding comes before the first token of a row, or
                after its last one if the cache that comes out is not used.
            context: this process's shard, if several processes share the sequences (see ContextShard). Then the loss is
                the mean over its tokens, and caches are those of the entire sequences.
            z_loss: a factor for the mean of logsumexp(logits)^2, which is added to the loss.
        """
        hidden, cache = self.model(
            input_ids, cache=cache, return_cache=return_cache, cu_seqlens=cu_seqlens, padding=padding, context=context
        )
        if shift_labels is None:
            return CausalLMOutput(None, self.lm_head(hidden), cache)
        return CausalLMOutput(head_cross_entropy(self.lm_head, hidden, shift_labels, z_loss), None, cache)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    *,
    cache: StateCache | None = None,
    return_cache: bool = False,
    cu_seqlens: Tensor | None = None,
    padding: Tensor | None = None,
    context: ContextShard | None = None,
    block_inputs: list[Tensor] | None = None,
) -> tuple[Tensor, StateCache | None]:
    """Run embedded tokens x [B, T, d] through all blocks. See CausalLM.forward for most arguments.

    The input of every block is appended to `block_inputs`, if that is given.

    Returns:
        The residual stream after the last block [B, T, d], before the final norm, and the cache or None.
    """
    check_block_inputs(x, cache, return_cache, cu_seqlens, padding, context)
    cache = StateCache() if cache is None else cache
    cache.check_fits(len(blocks), len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
    # Under autocast the residual stream has its dtype: in float32 it would take twice the memory and traffic.
    x = x.to(matmul_dtype(x))
    if padding is not None:
        padding = padding.to(x.dtype)
    # Mixers that serve no context have no such argument.
    shard = {} if context is None else {"context": context}
    seen = cache.seen + x.shape[1] * (1 if context is None else context.size)
    states = []
    for block, state in zip(blocks, cache.states or [None] * len(blocks), strict=True):
        if block_inputs is not None:
            block_inputs.append(x)
        x, state = block(x, padding=padding, state=state, return_state=return_cache, cu_seqlens=cu_seqlens, **shard)
        states.append(state)
    return x, StateCache(states, seen) if return_cache else None


def check_block_inputs(
    x: Tensor,
    cache: StateCache | None,
    return_cache: bool,
    cu_seqlens: Tensor | None,
    padding: Tensor | None,
    context: ContextShard | None,
) -> None:
    """Raise ValueError if arguments of run_blocks are of a wrong shape, or do not go together."""
    if x.dim() != 3:
        raise ValueError(f"expected input_ids [B, T] or inputs_embeds [B, T, d], got {list((x[..., 0]).shape)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, len(x))
        check_values(None, x, cu_seqlens)
    if context is not None:
        if padding is not None:
            raise ValueError("context: sequences that several processes share have no padding")
        check_context(context, cache, return_cache, cu_seqlens)


@torch.no_grad()
def init_module(module: nn.Module, std: float) -> None:
    """Initialise the parameters of `module` itself, but not those of its children."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
        nn.init.ones_(module.weight)
    init_parameters = getattr(module, "init_parameters", None)
    if init_parameters is not None:
        init_parameters()


@dataclass(frozen=True)
class Cost:
    """The cost of a model: its parameters, each counted once, and its floating-point operations per token."""

    parameters: int
    forward: int
    training: int  # forward and backward


def model_cost(config: ModelConfig, T: int) -> Cost:
    """Return the cost of a model with this config on sequences of T tokens, by formula, without running it.

    A multiplication and an addition are two operations. Only matrix products and convolutions count, as in torch's flop
    counter; the backward pass costs twice the forward pass.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    # For each token, a weight of a linear layer takes a multiplication and an addition.
    linear = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    forward = linear + sum(m.flops(T) for m in model.modules() if isinstance(m, Mixer))
    return Cost(sum(p.numel() for p in model.parameters()), forward, 3 * forward)
