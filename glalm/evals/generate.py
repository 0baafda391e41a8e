"""Sampled continuations of prompts."""

from collections.abc import Callable

import torch

from glalm.config import SampleConfig
from glalm.data.tokenizer import Tokenizer
from glalm.model import GLALMForCausalLM


def samples(
    model: GLALMForCausalLM,
    tokenizer: Tokenizer,
    config: SampleConfig,
    seed: int,
    advance: Callable[[int], object] = int,
) -> list[dict[str, str]]:
    """[{"prompt", "continuation"}] for config.prompts, at most config.tokens tokens each, ended early by eos.

    Every prompt starts as a document does, by bos. The same seed gives the same text on the same device; the global
    random state is left as it was. `advance` is called with config.tokens after each continuation.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        texts = []
        for prompt in config.prompts:
            texts.append({"prompt": prompt, "continuation": continuation(model, tokenizer, config, prompt)})
            advance(config.tokens)
    return texts


def continuation(model: GLALMForCausalLM, tokenizer: Tokenizer, config: SampleConfig, prompt: str) -> str:
    """One continuation, drawn from torch's global random state."""
    unspellable = list(range(tokenizer.vocab_size, model.config.vocab_size))  # a model may have room for more tokens
    start = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    input_ids = torch.tensor([start], device=model.device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,  # transformers cuts to the 50 likeliest unless told not to
        max_new_tokens=config.tokens,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
        suppress_tokens=unspellable or None,
    )
    # A tokenizer may drop the space that a text starts with, so the continuation is not decoded by itself.
    return tokenizer.decode(output[0].tolist())[len(tokenizer.decode(start)) :]
