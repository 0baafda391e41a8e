"""flash-linear-attention's own models against ours: the same weights, the same logits, in both directions."""

import math
import os

import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # its kernels compute float32 in TF32 otherwise: 1e-3, not 1e-4
fla_models = pytest.importorskip("fla.models", reason="needs flash-linear-attention")

from triton.runtime.autotuner import Autotuner  # noqa: E402

from glalm.compat.fla import config_to_fla, export_checkpoint  # noqa: E402
from glalm.hf import GLALMConfig, GLALMForCausalLM  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 63, 64, 65, 2048)
SHAPE = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 512, "intermediate_size": 384}
SHAPE |= {"fuse_cross_entropy": False}
THEIRS = {
    "gla": (fla_models.GLAConfig, fla_models.GLAForCausalLM, {"num_heads": 2}),
    "gla, fuse_norm=False": (fla_models.GLAConfig, fla_models.GLAForCausalLM, {"num_heads": 2, "fuse_norm": False}),
    "gla, convolution, clamp, grouped": (
        fla_models.GLAConfig,
        fla_models.GLAForCausalLM,
        {"num_heads": 4, "use_short_conv": True, "clamp_min": -0.05, "num_kv_heads": 2, "tie_word_embeddings": True},
    ),
    "gla, no output gate": (
        fla_models.GLAConfig,
        fla_models.GLAForCausalLM,
        {"num_heads": 2, "use_output_gate": False},
    ),
    "gla + attention": (
        fla_models.GLAConfig,
        fla_models.GLAForCausalLM,
        {"num_heads": 2, "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 100}},
    ),
    "retnet": (fla_models.RetNetConfig, fla_models.RetNetForCausalLM, {"num_heads": 4}),
    "retnet, fuse_norm=False": (
        fla_models.RetNetConfig,
        fla_models.RetNetForCausalLM,
        {"num_heads": 4, "fuse_norm": False},
    ),
    "transformer": (fla_models.TransformerConfig, fla_models.TransformerForCausalLM, {"num_heads": 4}),
    "transformer, grouped, window": (
        fla_models.TransformerConfig,
        fla_models.TransformerForCausalLM,
        {"num_heads": 4, "num_kv_heads": 2, "window_size": 50, "rope_theta": 5e5},
    ),
}
OURS = {
    "gla": {"num_heads": 2},
    "gla, convolution": {"num_heads": 4, "gla": {"short_conv": 4, "num_kv_heads": 2, "min_log_gate": -0.05}},
    "gla, no output gate": {"num_heads": 2, "gla": {"output_gate": False}, "tie_word_embeddings": True},
    "hybrid": {"num_heads": 2, "layers": "gla+attention", "attention": {"window": 100}},
    "retention": {"mixer": "retention", "num_heads": 4, "expand_k": 1.0, "expand_v": 2.0},
    "attention": {"mixer": "attention", "attention": {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 5e5}},
}


def flash_attn_func(q, k, v, causal, window_size):
    """flash-attn's function, which that library's attention needs, in PyTorch: [B, T, H, D]."""
    T, S, left = q.shape[1], k.shape[1], window_size[0]
    age = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    mask = (age >= 0) & ((age <= left) if left >= 0 else torch.ones_like(age, dtype=torch.bool))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size):
    pieces = [x.split(b.diff().tolist()) for x, b in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))]
    each = [flash_attn_func(*(x[None] for x in piece), causal, window_size)[0] for piece in zip(*pieces, strict=True)]
    return torch.cat(each)


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """With flash-attn's functions, and each kernel's first choice that runs, where timing all of them takes minutes."""
    bench = Autotuner._bench

    def first_that_runs(self, *args, config, **meta):
        if self.__dict__.get("settled_for") is self.nargs:
            return [math.inf] * 3
        times = bench(self, *args, config=config, **meta)
        if times[0] != math.inf:
            self.settled_for = self.nargs
        return times

    monkeypatch.setattr(Autotuner, "_bench", first_that_runs)
    monkeypatch.setattr("fla.layers.attn.flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setattr("fla.layers.attn.flash_attn_varlen_func", flash_attn_varlen_func, raising=False)


@torch.no_grad()
def stirred(make):
    """make(), away from the initial values, where norms are 1 and the mixers' outputs are small.

    Keys are near queries: the norm of an output whose scores cancel would multiply every rounding by a thousand.
    """
    torch.manual_seed(0)
    model = make()
    weights = dict(model.named_parameters())
    for p in weights.values():
        p += 0.04 * torch.randn(p.shape).to(p)
    for name, k in weights.items():
        if ".k_proj." in name:
            k.copy_(weights[name.replace(".k_proj.", ".q_proj.")][: len(k)] + 0.3 * k)
    return model.to(DEVICE).eval()


@torch.no_grad()
def logits(model) -> list[torch.Tensor]:
    """Float32 [tokens, vocabulary]: of every length, of packed sequences, and of the real tokens of a padded batch."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, SHAPE["vocab_size"], (2, max(LENGTHS)), generator=random).to(DEVICE)
    bounds = [0, 1, 64, 128, 193, *([1000] if max(LENGTHS) > 1000 else []), max(LENGTHS)]
    cu_seqlens = torch.tensor([b for b in bounds if b <= max(LENGTHS)], device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, : max(LENGTHS) // 3] = 0
    found = [model(ids[:, :T], use_cache=False).logits for T in LENGTHS]
    found.append(model(ids[:1], cu_seqlens=cu_seqlens, use_cache=False).logits)
    found.append(model(ids, attention_mask=mask, use_cache=False).logits[mask > 0])
    return [x.float().flatten(0, -2) for x in found]


def assert_same(ours, theirs) -> None:
    """To 1e-4 in float32; in bf16 to the rounding of either."""
    exact = logits(theirs)
    for found, truth in zip(logits(ours), exact, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    rounded = logits(ours.bfloat16()), logits(theirs.bfloat16())
    for found, truth, best in zip(*rounded, exact, strict=True):
        error, usual = (found - best).norm(), (truth - best).norm()
        assert error < 2 * usual and (found - truth).norm() < 3 * usual and usual < 0.1 * best.norm()


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_load_here(name, tmp_path):
    config, cls, options = THEIRS[name]
    theirs = stirred(lambda: cls(config(**SHAPE, **options)))
    theirs.save_pretrained(tmp_path, max_shard_size="1MB")
    assert_same(GLALMForCausalLM.from_pretrained(tmp_path).to(DEVICE), theirs)


@pytest.mark.parametrize("name", OURS)
def test_ours_load_there(name, tmp_path):
    shape = {k: v for k, v in SHAPE.items() if k != "fuse_cross_entropy"}
    ours = stirred(lambda: GLALMForCausalLM(GLALMConfig(**shape, **OURS[name])))
    export_checkpoint(ours, tmp_path)
    cls = getattr(fla_models, config_to_fla(ours.config)["architectures"][0])
    theirs, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(ours, theirs.to(DEVICE).eval())
