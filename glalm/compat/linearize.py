"""From softmax attention to a linear mixer: a LLaMA-style checkpoint becomes one of ours that was not trained yet.

Embeddings, norms, q, k, v, o, MLPs and head stay what they were. New are the forget gates and the norm on each head's
output, which start as in a new model. The rotary positions go: the gates order the tokens. GLA gets a ReLU as its
feature map and no output gate (the recipe of flash-linear-attention's authors for Mistral-7B); ReGLA has its own map.
`distil` then fits each new mixer to the attention that it replaces (as in LoLCATs, arXiv 2410.10254), layer by layer;
what remains is a continuation of the pretraining.
"""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import LongTensor, Tensor, nn
from transformers import LlamaForCausalLM

from glalm.config.strict import require
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.mixers.attention import attention_heads

MIXERS = ("gla", "regla")
BLOCK = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm", "self_attn": "attn"}
OUTSIDE = {"model.embed_tokens.weight": "model.embeddings.weight"}


def linearize(llama: LlamaForCausalLM, mixer: str = "gla", softmax_layers: Iterable[int] = ()) -> GLALMForCausalLM:
    """A model of ours with llama's weights, float32, whose layers but softmax_layers have `mixer`: gla or regla.

    Grouped key-value heads stay grouped in GLA; ReGLA, which has no such heads, gets copies of them.
    Raises ConfigError when the checkpoint has something that our skeleton has not, or a layer is not there.
    """
    config = converted_config(llama.config, mixer, set(softmax_layers))
    model = GLALMForCausalLM(config)
    weights = dict(renamed(llama.state_dict()))
    if mixer == "regla":
        repeat_heads(weights, config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    new = [n for n in missing if not is_new(n) and not (config.tie_word_embeddings and n == "lm_head.weight")]
    require(not new and not unexpected, f"weights without a counterpart: {', '.join([*new, *unexpected])}")
    model.tie_weights()
    model.generation_config = copy.deepcopy(llama.generation_config)  # it may end at tokens that config.json lacks
    return model.eval()


def converted_config(llama, mixer: str, softmax_layers: set[int]) -> GLALMConfig:
    layers, heads = llama.num_hidden_layers, llama.num_attention_heads
    rope = llama.rope_parameters or {}
    width = getattr(llama, "head_dim", None) or llama.hidden_size // heads
    require(mixer in MIXERS, f"mixer={mixer!r} is none of: {', '.join(MIXERS)}")
    strange = sorted(softmax_layers - set(range(layers)))
    require(not strange, f"softmax_layers: there is no layer {strange} among 0 to {layers - 1}")
    for name, value, served in (
        ("model_type", llama.model_type, "llama"),
        ("hidden_act", llama.hidden_act, "silu"),
        ("attention_bias", llama.attention_bias, False),
        ("mlp_bias", llama.mlp_bias, False),
        ("head_dim", width * heads, llama.hidden_size),
        ("rope_type", rope.get("rope_type", "default") if softmax_layers else "default", "default"),
    ):
        require(value == served, f"the checkpoint's {name} is {value!r}; only {served!r} can be converted")
    kv_heads = llama.num_key_value_heads
    return GLALMConfig(
        layers=["attention" if i in softmax_layers else mixer for i in range(layers)],
        vocab_size=llama.vocab_size,
        hidden_size=llama.hidden_size,
        num_hidden_layers=layers,
        num_heads=heads,
        expand_k=1.0,
        expand_v=1.0,
        intermediate_size=llama.intermediate_size,
        norm_eps=llama.rms_norm_eps,
        initializer_range=llama.initializer_range,
        tie_word_embeddings=llama.tie_word_embeddings,
        gla={"output_gate": False, "num_kv_heads": kv_heads, "feature_map": "relu"},
        attention={"num_heads": heads, "num_kv_heads": kv_heads, "rope_theta": float(rope.get("rope_theta", 10000.0))},
        bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id,
        pad_token_id=llama.pad_token_id,
    )


def renamed(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, x in weights.items():
        for theirs, ours in BLOCK.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        yield OUTSIDE.get(name, name), x


def repeat_heads(weights: dict[str, Tensor], config: GLALMConfig) -> None:
    """A copy of its group's keys and values for every head of the linear layers, in place."""
    heads, kv_heads = attention_heads(config)
    for i, mixer in enumerate(config.layer_mixers()):
        for name in (f"model.layers.{i}.attn.{n}_proj.weight" for n in "kv"):
            if mixer != "attention":
                x = weights[name].unflatten(0, (kv_heads, -1))
                weights[name] = x.repeat_interleave(heads // kv_heads, 0).flatten(0, 1)


def is_new(name: str) -> bool:
    return any(part in name for part in (".gk_proj.", ".g_norm.", ".forget_proj.", ".refine_proj.", ".o_norm."))


def distil(
    student: GLALMForCausalLM, teacher: LlamaForCausalLM, batches: Iterable[LongTensor], lr: float = 1e-3
) -> Iterator[float]:
    """Fits every linear mixer, all its weights, to the outputs of the attention it replaces, given that one's inputs.

    batches: token ids [B, T], a step of Adam each. Layers do not see each other: no error adds up on the way through.
    Before the first step each head norm is scaled so that the outputs are of the attention's size: after a norm they
    are several times larger. Yields each step's loss: the squared error over the target's variance, a mean over the
    layers. Runs in the teacher's dtype by autocast, with the student's weights in float32. Raises ConfigError when
    every layer is softmax attention.
    """
    mixers = {i: b.attn for i, b in enumerate(student.model.layers) if student.config.layer_mixers()[i] != "attention"}
    require(len(mixers) > 0, "softmax_layers names every layer: there is none to distil; keep fewer, or do not distil")
    optimizer = torch.optim.AdamW([p for m in mixers.values() for p in m.parameters()], lr=lr, weight_decay=0.0)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = [watch(teacher.model.layers[i].self_attn, seen, i) for i in mixers]
    try:
        for step, ids in enumerate(batches):
            with torch.no_grad():
                teacher.model(ids, use_cache=False)
            losses = []
            for i, mixer in mixers.items():
                x, target = seen.pop(i)
                if step == 0:
                    match_size(mixer, x, target)
                losses.append((output(mixer, x) - target.float()).square().mean() / target.float().var())
                (losses[-1] / len(mixers)).backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield float(torch.stack(losses).detach().mean())
    finally:
        for hook in hooks:
            hook.remove()


def output(mixer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
        return mixer(x)[0].float()


@torch.no_grad()
def match_size(mixer: nn.Module, x: Tensor, target: Tensor) -> None:
    norm = mixer.g_norm if hasattr(mixer, "g_norm") else mixer.o_norm
    norm.weight *= target.float().std() / output(mixer, x).std()


def watch(attention: nn.Module, seen: dict[int, tuple[Tensor, Tensor]], layer: int):
    """Keeps what goes in and out of a layer's attention."""

    def keep(module, args, kwargs, output):
        seen[layer] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]), output[0]

    return attention.register_forward_hook(keep, with_kwargs=True)
