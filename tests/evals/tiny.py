"""Small models and a tokenizer as transformers saves them. Imported by tests and by what they start."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 260


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """Weights large enough that the likeliest token is plain and that what came long ago matters."""
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


def tokenizer(folder: Path, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A token a byte, and <s>, </s>; saved into the folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    fast = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    if adds_bos:
        fast.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    whole = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    whole.save_pretrained(folder)
    return whole


def saved(folder: Path, model: PreTrainedModel, adds_bos: bool = False) -> Path:
    model.save_pretrained(folder)
    tokenizer(folder, adds_bos)
    return folder
