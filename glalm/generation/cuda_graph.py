"""Fast generation: decode one token of every sequence by one CUDA graph, with states that are updated in place.

A decoding step of a recurrent model uses the same buffers whatever the length of the text. It is therefore captured
once for a batch size and then replayed, without Python in the loop. transformers' logits processors, sampling and
stopping criteria run as usual after each step.
"""

from itertools import chain

import torch
from torch import LongTensor, Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from glalm.generation import fused_decode
from glalm.generation.captured import fixed_in_graph, shapes_and_dtypes
from glalm.hf import GLALMForCausalLM
from glalm.kernels.graph_capture import GraphCapture
from glalm.kernels.recurrent import states_in_place
from glalm.model.cache import StateCache
from glalm.model.plain import is_called_plainly

# Tokens between two checks of whether all sequences have ended. Each check waits for the GPU.
STOP_CHECK_INTERVAL = 16

UNSUPPORTED_INPUTS = ("inputs_embeds", "cu_seqlens", "position_ids")
REQUIRED_SETTINGS = {"num_beams": 1, "return_dict_in_generate": False, "use_cache": True}


class CudaGraphGenerator:
    """Greedy and sampled generation by CUDA graphs: model.generate(ids, custom_generate=CudaGraphGenerator(model)).

    The graph and the states of the last batch size are reused. The model may change between calls in any way: weights,
    adapters, modules, autocast. The graph is captured again where it would not follow.

    Steps run without a graph on the CPU, for a model on several devices, for one with hooks or replaced forward methods
    (accelerate offloads weights by them), and if the state of a layer grows with the text, as that of softmax attention
    does. transformers passes no streamer to a custom_generate.

    Prompts are read in chunks of `prefill_chunk` tokens of the whole batch, so long prompts need no more memory.
    """

    def __init__(self, model: GLALMForCausalLM, prefill_chunk: int = 2**15):
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk: expected a positive number of tokens, got {prefill_chunk}")
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.step: DecodeStep | None = None

    @torch.inference_mode(False)  # Buffers created in inference mode could never be written outside of it.
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
        """Continue prompts [B, T], padded on the left where attention_mask is 0, to [B, T + new tokens].

        transformers calls this with its own arguments.
        """
        self._check_arguments(model, generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        past = model_kwargs.get("past_key_values")
        logits, cache = prefill_prompt(model, input_ids, mask, past, self.prefill_chunk)
        step = self.start_step(cache)
        B, start = input_ids.shape
        pad = generation_config._pad_token_tensor
        ids = torch.cat([input_ids, input_ids.new_empty(B, stopping_criteria.max_length - start)], 1)
        running = ids.new_ones(B, dtype=torch.bool)
        lengths = ids.new_full((B,), start)
        for t in range(start, ids.shape[1]):
            if t > start:
                logits = step(ids[:, t - 1 : t])
            scores = logits_processor(ids[:, :t], logits.to(ids.device, torch.float32))
            chosen = scores.softmax(-1).multinomial(1)[:, 0] if generation_config.do_sample else scores.argmax(-1)
            ids[:, t] = chosen if pad is None else torch.where(running, chosen, pad)
            lengths += running
            running &= ~stopping_criteria(ids[:, : t + 1], None)
            check_now = not ids.is_cuda or (t - start) % STOP_CHECK_INTERVAL == STOP_CHECK_INTERVAL - 1
            if check_now and not running.any():
                break
        return ids[:, : int(lengths.max())]

    def _check_arguments(self, model: GLALMForCausalLM, config: GenerationConfig, model_kwargs: dict) -> None:
        if model is not self.model:
            raise ValueError(
                "custom_generate: this CudaGraphGenerator was made for another model; use CudaGraphGenerator(model)"
            )
        for name, supported in REQUIRED_SETTINGS.items():
            value = getattr(config, name)
            if value not in (supported, None):
                raise ValueError(
                    f"{name}={value}: CudaGraphGenerator supports only {name}={supported}; leave custom_generate out"
                )
        for name in UNSUPPORTED_INPUTS:
            if model_kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: CudaGraphGenerator reads whole sequences of input_ids; leave custom_generate out"
                )

    def start_step(self, cache: StateCache) -> "DecodeStep":
        """Return a step that continues the cache. The last one is reused if everything in its graph is still valid."""
        fixed = fixed_in_graph(self.model, cache.states)
        if self.step is None or self.step.state_grows or self.step.fixed != fixed:
            self.step = None  # Free its buffers before the new ones are allocated.
            self.step = DecodeStep(self.model, cache, fixed)
        if self.step.state_grows:
            self.step.states = tree_map(torch.clone, cache.states)
        else:
            copy_states(cache.states, self.step.states)
        return self.step


def prefill_prompt(
    model: GLALMForCausalLM, ids: LongTensor, mask: Tensor | None, past: StateCache | None, chunk: int
) -> tuple[Tensor, StateCache]:
    """Read the tokens of ids [B, T] that `past` has not seen, `chunk` tokens of the batch at a time.

    Returns:
        The logits of the last position [B, vocabulary], and the cache after it.
    """
    cache = past or StateCache()
    if cache.seen >= ids.shape[1]:
        raise ValueError(
            f"past_key_values has seen {cache.seen} tokens and input_ids has {ids.shape[1]}, so no token is left to "
            "predict from. Pass a cache of fewer tokens."
        )
    T = max(1, chunk // len(ids))
    for start in range(cache.seen, ids.shape[1], T):
        end = min(start + T, ids.shape[1])
        mask_so_far = None if mask is None else mask[:, :end]
        out = model(
            ids[:, start:end],
            attention_mask=mask_so_far,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
    return out.logits[:, -1], cache


class DecodeStep:
    """A decoding step, tokens [B, 1] to logits [B, vocabulary], over its own copy of a cache's states.

    Each call advances the states by one token. The logits of a captured step are overwritten by the next call.
    """

    def __init__(self, model: GLALMForCausalLM, cache: StateCache, fixed: list):
        self.model = model
        self.fixed = fixed
        self.states = tree_map(torch.clone, cache.states)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.state_grows = False
        first_state = tree_leaves(self.states)[0]
        B = len(first_state)
        # The weights of an offloaded model are on the meta device between its calls, but its states are not.
        self.tokens = torch.zeros(B, 1, dtype=torch.int64, device=first_state.device)
        can_capture = self.tokens.is_cuda and is_capturable(model, self.tokens.device)
        self.fused = can_capture and B == 1 and fused_decode.is_supported(model)
        shapes = shapes_and_dtypes(self.states)
        self.logits = self._forward()
        self.state_grows = shapes_and_dtypes(self.states) != shapes
        if can_capture and not self.state_grows:
            with torch.cuda.device(self.tokens.device):
                capture = GraphCapture(self.tokens.device)
                capture.warm_up(self._forward)
                self.graph, self.logits = capture.capture(self._forward)

    def __call__(self, tokens: LongTensor) -> Tensor:
        self.tokens.copy_(tokens)
        if self.graph is None:
            return self._forward()
        self.graph.replay()
        return self.logits

    def _forward(self) -> Tensor:
        device = self.tokens.device.type
        # A graph would read autocast's cached casts of weights after they were freed.
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        with states_in_place(), autocast:
            if self.fused:
                return fused_decode.decode_token(self.model, self.tokens, self.states)
            out = self.model(self.tokens, past_key_values=StateCache(self.states), use_cache=True, logits_to_keep=1)
        states = out.past_key_values.states
        if self.state_grows or shapes_and_dtypes(states) != shapes_and_dtypes(self.states):
            self.states = states
        else:
            copy_states(states, self.states)
        return out.logits[:, -1]


def is_capturable(model: nn.Module, device: torch.device) -> bool:
    """Return whether the model's call can be a graph on this GPU. A hook may do something else in every call."""
    on_device = all(x.device == device for x in chain(model.parameters(), model.buffers()))
    return on_device and all(is_called_plainly(module) for module in model.modules())


def copy_states(source: list, target: list) -> None:
    """Copy the tensors of `source` into those of `target`, except for tensors that are the same object."""
    for a, b in zip(tree_leaves(source), tree_leaves(target), strict=True):
        if a is not b:
            b.copy_(a)
