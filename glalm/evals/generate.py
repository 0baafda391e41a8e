"""Sampled continuations of prompts."""

import dataclasses

import torch

from glalm.evals.eval_model import Subject
from glalm.evals.evaluator import Job, Work
from glalm.evals.options import EvalConfig, GenerateConfig
from glalm.train.random_states import seeded


def job(subject: Subject, config: EvalConfig) -> Job:
    c = config.generate
    subject.need_tokenizer("generate")
    return Job(
        settings={**dataclasses.asdict(c), "seed": config.seed},
        run=lambda work: samples(subject, c, config.seed, work),
        total=len(c.prompts) * c.tokens,
        summary=lambda texts: [f"--- {t['prompt']}{t['continuation']}" for t in texts],
    )


def samples(subject: Subject, config: GenerateConfig, seed: int, work: Work) -> list[dict[str, str]]:
    """[{"prompt", "continuation"}] for config.prompts, at most config.tokens tokens each, ended early by eos.

    Every prompt starts as a document does. Each is drawn by a seed of its own, seed + its number, so that the same seed
    gives the same text on the same device however many processes there are; the global random state is left as it was.
    """
    texts = []
    for i, prompt in work.mine(enumerate(config.prompts)):
        with seeded(seed + i, subject.device):
            texts.append({"prompt": prompt, "continuation": continuation(subject, config, prompt)})
        work.advance(config.tokens)
    return work.gather(texts)


def continuation(subject: Subject, config: GenerateConfig, prompt: str) -> str:
    """One continuation, drawn from torch's global random state."""
    tokenizer = subject.tokenizer
    unspellable = list(range(tokenizer.vocab_size, subject.vocab_size))  # a model may have room for more tokens
    start = [*subject.start, *tokenizer.encode(prompt)] or [tokenizer.eos_id]  # a document follows another's end
    input_ids = torch.tensor([start], device=subject.device)
    output = subject.model.generate(
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
