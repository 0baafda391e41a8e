"""Fast decoding: one token for every sequence as one CUDA graph, over states that are updated in place.

A step of a recurrent model reads the same buffers whatever the length behind it, so it is captured once for a batch
size and replayed: nothing of it is left to Python. What comes after the logits (transformers' processors, sampling,
stopping) runs as usual, but the host looks only now and then whether all sequences have ended.
"""

import torch
from torch import LongTensor, Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from glalm.generation import fused_decode
from glalm.hf import GLALMForCausalLM
from glalm.kernels.recurrent import states_in_place
from glalm.model.cache import StateCache

CHECK = 16  # tokens between two looks at whether all sequences have ended: each waits for the GPU


class Decoder:
    """`model.generate(ids, custom_generate=Decoder(model), ...)`: greedy and sampled generation, faster.

    The prompts are read in chunks of prefill_chunk tokens in all, so that their length costs no memory. The graph and
    the states of the last batch size are kept. Steps run without a graph on the CPU, over several devices, and where a
    layer's state grows with the length, as softmax attention's. Weights may change between calls, and autocast may.
    transformers hands no streamer to a custom_generate: to stream, leave it out.
    """

    def __init__(self, model: GLALMForCausalLM, prefill_chunk: int = 2**15):
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk: expected a positive number of tokens, got {prefill_chunk}")
        self.model, self.prefill_chunk = model, prefill_chunk
        self.step: Step | None = None

    @torch.inference_mode(False)  # buffers made inside it could never be written again outside
    @torch.no_grad()
    def __call__(
        self,
        model: GLALMForCausalLM,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> LongTensor:
        """As transformers calls it: [B, T] prompts, left-padded where attention_mask is 0, to [B, T + new] tokens."""
        self.check(model, generation_config)
        for name in ("inputs_embeds", "cu_seqlens", "position_ids"):
            if model_kwargs.get(name) is not None:
                raise ValueError(f"{name}: a Decoder reads whole sequences of input_ids; leave custom_generate out")
        mask, past = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        logits, cache = prefill(model, input_ids, mask, past, self.prefill_chunk)
        step = self.step_from(cache)
        (B, start), pad = input_ids.shape, generation_config._pad_token_tensor
        ids = torch.cat([input_ids, input_ids.new_empty(B, stopping_criteria.max_length - start)], 1)
        going, lengths = ids.new_ones(B, dtype=torch.bool), ids.new_full((B,), start)
        for t in range(start, ids.shape[1]):
            logits = logits if t == start else step(ids[:, t - 1 : t])
            scores = logits_processor(ids[:, :t], logits.float())
            chosen = scores.softmax(-1).multinomial(1)[:, 0] if generation_config.do_sample else scores.argmax(-1)
            ids[:, t] = chosen if pad is None else torch.where(going, chosen, pad)
            lengths += going
            going &= ~stopping_criteria(ids[:, : t + 1], None)
            if (not ids.is_cuda or (t - start) % CHECK == CHECK - 1) and not going.any():
                break
        return ids[:, : int(lengths.max())]

    def check(self, model: GLALMForCausalLM, config: GenerationConfig) -> None:
        if model is not self.model:
            raise ValueError("custom_generate: this Decoder was made for another model; make one with Decoder(model)")
        for name, served in (("num_beams", 1), ("return_dict_in_generate", False), ("use_cache", True)):
            if getattr(config, name) not in (served, None):
                raise ValueError(
                    f"{name}={getattr(config, name)}: a Decoder serves {name}={served} alone; leave custom_generate out"
                )

    def step_from(self, cache: StateCache) -> "Step":
        """A step that continues the cache: the last one's, where all that a graph has fixed is the same."""
        if self.step is None or self.step.growing or self.step.made_for != setting(self.model, cache.states):
            self.step = None  # frees its buffers before there are new ones
            self.step = Step(self.model, cache)
        self.step.load(cache)
        return self.step


def prefill(
    model: GLALMForCausalLM, ids: LongTensor, mask: Tensor | None, past: StateCache | None, chunk: int
) -> tuple[Tensor, StateCache]:
    """Reads what past has not seen of ids [B, T], chunk tokens of the batch at a time.

    Returns the last token's logits [B, vocabulary], and the state behind it.
    """
    cache = past or StateCache()
    if cache.seen >= ids.shape[1]:
        raise ValueError(
            f"past_key_values has seen {cache.seen} tokens and input_ids has {ids.shape[1]}: nothing is left to "
            "predict from"
        )
    each = max(1, chunk // len(ids))
    for start in range(cache.seen, ids.shape[1], each):
        end = min(start + each, ids.shape[1])
        seen = None if mask is None else mask[:, :end]
        out = model(
            ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True, logits_to_keep=1
        )  # fmt: skip
        cache = out.past_key_values
    return out.logits[:, -1], cache


class Step:
    """step(tokens [B, 1]) -> logits [B, vocabulary], over states of its own that each call moves on by a token."""

    def __init__(self, model: GLALMForCausalLM, cache: StateCache):
        self.model, self.graph = model, None
        self.made_for = setting(model, cache.states)
        self.states = tree_map(torch.clone, cache.states)
        first = tree_leaves(self.states)[0]
        self.tokens = torch.zeros(len(first), 1, dtype=torch.int64, device=model.model.embeddings.weight.device)
        one_gpu = self.tokens.is_cuda and {p.device for p in model.parameters()} == {self.tokens.device}
        self.lean = one_gpu and len(first) == 1 and fused_decode.serves(model)
        self.growing = False
        before = shapes(self.states)
        self.logits = self.forward()
        self.growing = shapes(self.states) != before
        if one_gpu and not self.growing:
            self.capture()

    def forward(self) -> Tensor:
        with states_in_place(), without_autocast_cache(self.tokens.device.type):
            if self.lean:
                return fused_decode.next_logits(self.model, self.tokens, self.states)
            past = StateCache(self.states)
            out = self.model(self.tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        states = out.past_key_values.states
        if self.growing or shapes(states) != shapes(self.states):
            self.states = states
        else:
            copy(states, self.states)
        return out.logits[:, -1]

    def capture(self) -> None:
        with torch.cuda.device(self.tokens.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up on their first calls, which a capture forbids
                self.forward()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # torch's own stream for this is one of the GPU that the process captured on first.
            with torch.cuda.graph(self.graph, stream=side):
                self.logits = self.forward()

    def load(self, cache: StateCache) -> None:
        if self.growing:
            self.states = tree_map(torch.clone, cache.states)
        else:
            copy(cache.states, self.states)

    def __call__(self, tokens: LongTensor) -> Tensor:
        self.tokens.copy_(tokens)
        if self.graph is None:
            return self.forward()
        self.graph.replay()
        return self.logits


def without_autocast_cache(device: str) -> torch.autocast:
    """Autocast as it is, but for its cache, whose copies of the weights a graph would go on reading once freed."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def setting(model: GLALMForCausalLM, states: list) -> list:
    """What a captured step has fixed: the states' shapes and dtypes, where the weights lie, and autocast."""
    device = model.model.embeddings.weight.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return [autocast, *shapes(states), *((p.data_ptr(), p.dtype) for p in model.parameters())]


def shapes(states: list) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in tree_leaves(states)]


def copy(source: list, target: list) -> None:
    for a, b in zip(tree_leaves(source), tree_leaves(target), strict=True):
        if a is not b:
            b.copy_(a)
