"""Sampled continuations of prompts."""

import dataclasses

import torch

from glalm.config.strict import ConfigError
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext, Evaluator
from glalm.evals.inputs import describe_data, open_split
from glalm.evals.options import EvalConfig, GenerateConfig
from glalm.train.random_states import seeded

PROMPT_TOKENS = 12  # with the BOS token, where documents have one


class GenerateEvaluator(Evaluator):
    """Continuations of `generate.prompts`, or of the beginnings of documents."""

    def __init__(self, model: EvalModel, config: EvalConfig):
        super().__init__(model, config)
        model.require_tokenizer("generate")
        prompts = config.generate.prompts
        self.options = dataclasses.replace(
            config.generate, prompts=find_prompts(config, model) if prompts is None else prompts
        )
        self.settings = {**dataclasses.asdict(self.options), "seed": config.seed}
        if prompts is None and config.text is not None:
            self.settings |= describe_data(open_split(config, model, "test"))
        self.total_units = len(self.options.prompts) * self.options.tokens

    def run(self, context: EvalContext) -> list[dict[str, str]]:
        return sample_continuations(self.model, self.options, self.config.seed, context)

    def summarize(self, results: list[dict[str, str]]) -> list[str]:
        return [f"--- {text['prompt']}{text['continuation']}" for text in results]


def find_prompts(config: EvalConfig, model: EvalModel) -> list[str]:
    """Return the first PROMPT_TOKENS tokens of the first and the middle document of text that was held out.

    Where there is none, as for a model without its data, the only prompt is empty.
    """
    for split in ("test", "validation"):
        try:
            tokens = open_split(config, model, split)
        except ConfigError:
            if config.text is not None or config.data_path is not None:
                raise
            continue
        indices = sorted({0, tokens.num_documents // 2} & set(range(tokens.num_documents)))
        prompts = [model.tokenizer.decode(tokens.read_document(i)[:PROMPT_TOKENS].tolist()) for i in indices]
        # The last tokens may be the first bytes of a character, which are decoded as U+FFFD.
        prompts = [prompt.rstrip("\ufffd") for prompt in prompts]
        if any(prompts):
            return [prompt for prompt in prompts if prompt]
    return [""]


def sample_continuations(
    model: EvalModel, options: GenerateConfig, seed: int, context: EvalContext
) -> list[dict[str, str]]:
    """Return [{"prompt", "continuation"}] of all prompts.

    A prompt starts as a document does. Its continuation has at most `options.tokens` tokens and ends at EOS. Prompt i
    is sampled with seed + i, so that a text does not depend on the number of processes. Random states are restored.
    """
    texts = []
    for i, prompt in context.share(enumerate(options.prompts)):
        with seeded(seed + i, model.device):
            texts.append({"prompt": prompt, "continuation": sample_continuation(model, options, prompt)})
        context.advance(options.tokens)
    return context.gather(texts)


def sample_continuation(model: EvalModel, options: GenerateConfig, prompt: str) -> str:
    """Return one continuation, sampled from torch's global random state."""
    tokenizer = model.tokenizer
    # An empty prompt without BOS starts from EOS, since a document follows the end of another.
    start = [*model.document_prefix, *tokenizer.encode(prompt)] or [tokenizer.eos_id]
    input_ids = torch.tensor([start], device=model.device)
    output = model.causal_lm.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=True,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=0,  # transformers would otherwise sample from the 50 likeliest tokens.
        max_new_tokens=options.tokens,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
        suppress_tokens=model.unused_ids or None,
    )
    # A tokenizer may drop the space that a text starts with, so the continuation is not decoded by itself.
    return tokenizer.decode(output[0].tolist())[len(tokenizer.decode(start)) :]
