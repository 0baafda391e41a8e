"""Load and export flash-linear-attention's checkpoints, compared with its models' equations, written out here.

tests/gpu/test_interop_fla.py compares with that library itself.
"""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import glalm.hf
from glalm.compat.fla import export_checkpoint
from glalm.hf import GLALMConfig, GLALMForCausalLM

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 48, "num_heads": 4}
BASE |= {"norm_eps": 1e-5, "architectures": ["GLAForCausalLM"], "dtype": "float64", "max_position_embeddings": 2048}
BASE |= {"fuse_norm": True, "fuse_swiglu": True, "fuse_cross_entropy": True, "use_l2warp": False, "attn_mode": "chunk"}
ATTN = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": 7, "rope_theta": 5e5}
FLA_CONFIGS = {
    "gla": {"model_type": "gla"},
    "gla as published": {"model_type": "gla", "attn": None, "clamp_min": None, "feature_map": None, "use_gk": True},
    "gla, fuse_norm=False": {"model_type": "gla", "fuse_norm": False},
    "gla, no output gate": {"model_type": "gla", "use_output_gate": False, "expand_k": 1, "tie_word_embeddings": True},
    "gla, convolution": {"model_type": "gla", "use_short_conv": True, "conv_size": 3, "clamp_min": -0.05},
    "gla, grouped": {"model_type": "gla", "num_kv_heads": 2, "use_short_conv": True, "intermediate_size": None},
    "gla, relu": {"model_type": "gla", "feature_map": "relu", "use_short_conv": True},
    "gla, relu, grouped": {"model_type": "gla", "feature_map": "relu", "num_kv_heads": 2, "use_output_gate": False},
    "gla + attention": {"model_type": "gla", "attn": ATTN},
    "retnet": {"model_type": "retnet", "hidden_ratio": 2, "intermediate_size": None},
    "retnet, fuse_norm=False": {"model_type": "retnet", "fuse_norm": False, "expand_k": 0.5, "expand_v": 1.5},
    "retnet + attention": {"model_type": "retnet", "attn": ATTN | {"window_size": None}},
    "transformer": {"model_type": "transformer"},
    "transformer, grouped, window": {
        "model_type": "transformer",
        "num_kv_heads": 1,
        "window_size": 5,
        "rope_theta": 3e4,
    },
}
DEFAULTS = {
    "gla": {"expand_k": 0.5, "expand_v": 1.0, "use_output_gate": True, "hidden_ratio": 4},
    "retnet": {"expand_k": 1.0, "expand_v": 2.0, "use_output_gate": True, "hidden_ratio": 2},
    "transformer": {"rope_theta": 10000.0, "hidden_ratio": 4},
}


def with_defaults(tree: dict) -> dict:
    return DEFAULTS[tree["model_type"]] | BASE | tree


def random_fla_weights(tree: dict) -> dict[str, torch.Tensor]:
    """Draw random weights under flash-linear-attention's parameter names."""
    random, t = torch.Generator().manual_seed(0), with_defaults(tree)
    d, H, kind = t["hidden_size"], t["num_heads"], t["model_type"]
    hidden = t["intermediate_size"] or 256 * math.ceil(int(d * t["hidden_ratio"] * 2 / 3) / 256)
    shapes = {"model.embeddings": (50, d), "model.norm": (d,)}
    if not t.get("tie_word_embeddings"):
        shapes["lm_head"] = (50, d)
    for i in range(t["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}attn_norm": (d,), f"{at}mlp_norm": (d,), f"{at}mlp.down_proj": (d, hidden)}
        shapes |= {f"{at}mlp.{x}_proj": (hidden, d) for x in ("gate", "up")}
        spec = t if kind == "transformer" else t.get("attn") or {"layers": []}
        if kind == "transformer" or i in spec["layers"]:
            kv = d // spec["num_heads"] * (spec.get("num_kv_heads") or spec["num_heads"])
            shapes |= {f"{at}attn.{x}_proj": (kv if x in "kv" else d, d) for x in "qkvo"}
            continue
        groups = H // (t.get("num_kv_heads") or H)
        K, V = int(d * t["expand_k"]), int(d * t["expand_v"])
        widths = {"q": K, "k": K // groups, "v": V // groups}
        shapes |= {f"{at}attn.{x}_proj": (n, d) for x, n in widths.items()} | {f"{at}attn.o_proj": (d, V)}
        if kind == "gla":
            shapes |= {f"{at}attn.gk_proj.0": (16, d), f"{at}attn.gk_proj.1": (K // groups, 16)}
            shapes[f"{at}attn.gk_proj.1.bias"] = (K // groups,)
            if t.get("use_short_conv"):
                shapes |= {f"{at}attn.{x}_conv1d": (n, 1, t.get("conv_size", 4)) for x, n in widths.items()}
        if t["use_output_gate"]:
            shapes[f"{at}attn.g_proj"] = (V, d)
        fused = t["use_output_gate"] and t["fuse_norm"]
        shapes[f"{at}attn.{'g_norm_swish_gate' if fused else 'g_norm'}"] = (V // H,)
    named = {n if n.endswith("bias") else f"{n}.weight": shape for n, shape in shapes.items()}
    return {n: torch.randn(s, generator=random, dtype=torch.float64) * 0.4 for n, s in named.items()}


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def apply_rotary(x, theta=10000.0):
    """Rotate channel i together with channel i + D/2 of x [T, H, D]."""
    T, _, D = x.shape
    angles = torch.arange(T)[:, None] * torch.tensor([theta ** (-2 * i / D) for i in range(D // 2)], dtype=x.dtype)
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def run_recurrence(q, k, v, alpha):
    """o_t = K^-1/2 q_t S_t, S_t = diag(alpha_t) S_{t-1} + k_t^T v_t; all [T, H, ...]."""
    S, outputs = torch.zeros(*k.shape[1:], v.shape[-1], dtype=q.dtype), []
    for q_t, k_t, v_t, a_t in zip(q, k, v, alpha, strict=True):
        S = a_t[..., None] * S + k_t[..., None] * v_t[:, None]
        outputs.append(torch.einsum("hk,hkv->hv", q_t, S) * q.shape[-1] ** -0.5)
    return torch.stack(outputs)


def softmax_attention(w, x, spec):
    T, H = len(x), spec["num_heads"]
    D = x.shape[1] // H
    q, k, v = ((x @ w[f"{n}_proj.weight"].T).view(T, -1, D) for n in "qkv")
    q, k = (apply_rotary(y, spec.get("rope_theta", 10000.0)) for y in (q, k))
    k, v = (y.repeat_interleave(H // y.shape[1], 1) for y in (k, v))
    age = torch.arange(T)[:, None] - torch.arange(T)
    seen = (age >= 0) & (age < (spec.get("window_size") or T))
    scores = torch.einsum("thd,shd->hts", q, k) * D**-0.5
    o = torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
    return o.flatten(1) @ w["o_proj.weight"].T


def recurrent_mixer(w, x, t):
    T, H = len(x), t["num_heads"]
    parts = {n: x @ w[f"{n}_proj.weight"].T for n in "qkv"}
    for n in "qkv" if "q_conv1d.weight" in w else "":
        taps = w[f"{n}_conv1d.weight"]
        parts[n] = F.silu(F.conv1d(F.pad(parts[n].T, (taps.shape[2] - 1, 0)), taps, groups=len(taps)).T)
    q, k, v = parts.values()
    if t.get("feature_map") == "relu":
        q, k = q.clamp(min=0), k.clamp(min=0)
    K, V = q.shape[1] // H, w["o_proj.weight"].shape[1] // H
    q, k, v = q.view(T, H, K), k.view(T, -1, K), v.view(T, -1, V)
    if t["model_type"] == "gla":
        logit = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
        log_alpha = F.logsigmoid(logit).view(T, -1, K) / 16
        if t.get("clamp_min") is not None:
            log_alpha = log_alpha.clamp(min=t["clamp_min"])
        k, v, log_alpha = (y.repeat_interleave(H // y.shape[1], 1) for y in (k, v, log_alpha))
        o = run_recurrence(q, k, v, log_alpha.exp())
    else:
        decay = 1 - 2.0 ** (-5 - torch.arange(H, dtype=x.dtype))
        o = run_recurrence(apply_rotary(q), apply_rotary(k), v, decay[None, :, None].expand(T, H, K))
    scale = w["g_norm_swish_gate.weight"] if "g_norm_swish_gate.weight" in w else w["g_norm.weight"]
    y = rms_norm(o, scale, t["norm_eps"]).flatten(1)
    if t["use_output_gate"]:
        y = y * F.silu(x @ w["g_proj.weight"].T)
    return y @ w["o_proj.weight"].T


def fla_logits(tree: dict, w: dict, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits [T, vocabulary] of the model that config.json and weights describe, one token at a time."""
    t = with_defaults(tree)
    x = w["model.embeddings.weight"][ids]
    for i in range(t["num_hidden_layers"]):
        layer = {n.removeprefix(f"model.layers.{i}."): y for n, y in w.items() if n.startswith(f"model.layers.{i}.")}
        attn = {n.removeprefix("attn."): y for n, y in layer.items()}
        h = rms_norm(x, layer["attn_norm.weight"], t["norm_eps"])
        if t["model_type"] == "transformer":
            x = x + softmax_attention(attn, h, t)
        elif t.get("attn") and i in t["attn"]["layers"]:
            x = x + softmax_attention(attn, h, t["attn"])
        else:
            x = x + recurrent_mixer(attn, h, t)
        h = rms_norm(x, layer["mlp_norm.weight"], t["norm_eps"])
        gate, up = (h @ layer[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embeddings.weight"])
    return rms_norm(x, w["model.norm.weight"], t["norm_eps"]) @ head.T


@pytest.fixture
def write_fla_checkpoint(tmp_path):
    """published(config.json's fields): a folder with that library's model, and its weights."""

    def write(sharded: bool = False, **tree):
        folder, weights = tmp_path / "theirs", random_fla_weights(tree)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(BASE | tree))
        if sharded:
            names = sorted(weights)
            files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
            for file in set(files.values()):
                save_file({n: weights[n] for n in names if files[n] == file}, folder / file, {"format": "pt"})
            index = {"metadata": {"total_size": 0}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder, weights

    return write


@pytest.mark.parametrize("name", FLA_CONFIGS)
def test_checkpoint_loads_and_computes_the_same(name, write_fla_checkpoint, random_tokens):
    folder, weights = write_fla_checkpoint(sharded=len(name) % 2 == 0, **FLA_CONFIGS[name])
    ids = random_tokens(20)
    expected = fla_logits(FLA_CONFIGS[name], weights, ids)
    for model in (AutoModelForCausalLM.from_pretrained(folder), GLALMForCausalLM.from_pretrained(folder)):
        assert type(model) is GLALMForCausalLM and model.dtype == torch.float64 and not model.training
        torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=1e-7, atol=1e-8)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is GLALMConfig and config.model_type == "glalm"


@pytest.mark.parametrize("name", FLA_CONFIGS)
def test_loaded_model_is_saved_in_our_format(name, write_fla_checkpoint, tmp_path):
    folder, _ = write_fla_checkpoint(**FLA_CONFIGS[name])
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "glalm"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("name", FLA_CONFIGS)
def test_export_restores_the_checkpoint(name, write_fla_checkpoint, random_tokens, tmp_path):
    """The weights come back under fuse_norm=True's names, and config.json describes the same model."""
    folder, weights = write_fla_checkpoint(**FLA_CONFIGS[name])
    export_checkpoint(GLALMForCausalLM.from_pretrained(folder), tmp_path / "out")
    tree, out = (
        json.loads((tmp_path / "out" / "config.json").read_text()),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    gated = FLA_CONFIGS[name].get("use_output_gate", True)
    names = {n.replace("g_norm.", "g_norm_swish_gate.") if gated else n: w for n, w in weights.items()}
    assert out.keys() == names.keys() and all(torch.equal(out[n], w) for n, w in names.items())
    torch.testing.assert_close(
        fla_logits(tree, out, random_tokens(9)), fla_logits(FLA_CONFIGS[name], weights, random_tokens(9))
    )
    skipped = ("fuse_norm", "conv_size", "intermediate_size", "architectures")
    for field, value in (BASE | FLA_CONFIGS[name]).items():
        if field in tree and field not in skipped and value is not None:
            assert tree[field] == value, field


def test_exported_config_has_dtype_of_weights(build_model, tmp_path):
    export_checkpoint(build_model().bfloat16(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_loading_options_apply_to_fla_checkpoints(write_fla_checkpoint, random_tokens, tmp_path):
    folder, _ = write_fla_checkpoint(**FLA_CONFIGS["gla, convolution"])
    GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=49).save_pretrained(folder)
    expected = GLALMForCausalLM.from_pretrained(folder)(random_tokens(1, 9)).logits.float()
    mapped = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto")
    torch.testing.assert_close(mapped(random_tokens(1, 9)).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert (
        mapped.generate(random_tokens(1, 9).to(mapped.device)).shape[1] <= 12
        and mapped.generation_config.eos_token_id == 49
    )
    assert mapped.name_or_path == str(folder)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["gla", "gla, convolution"])
def test_load_from_hub_cache(name, write_fla_checkpoint, random_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder, weights = write_fla_checkpoint(sharded=True, **FLA_CONFIGS[name])
    repository = tmp_path / "cache" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    expected = fla_logits(FLA_CONFIGS[name], weights, random_tokens(9))
    for cls in (AutoModelForCausalLM, GLALMForCausalLM):
        model = cls.from_pretrained("someone/model", cache_dir=tmp_path / "cache")
        torch.testing.assert_close(model(random_tokens(1, 9)).logits[0], expected, rtol=1e-7, atol=1e-8)
        assert model.name_or_path == "someone/model"


def test_flas_own_classes_keep_their_model_types(write_fla_checkpoint, random_tokens, monkeypatch):
    """If flash-linear-attention is imported too, the Auto classes use its classes, and ours still read the format."""

    class Theirs(PreTrainedConfig):
        model_type = "gla"

    folder, weights = write_fla_checkpoint(**FLA_CONFIGS["gla"])
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    AutoConfig.register("gla", Theirs, exist_ok=True)
    glalm.hf.register()
    assert type(AutoConfig.from_pretrained(folder)) is Theirs
    loaded = GLALMForCausalLM.from_pretrained(folder)
    expected = fla_logits(FLA_CONFIGS["gla"], weights, random_tokens(9))
    torch.testing.assert_close(loaded(random_tokens(1, 9)).logits, expected[None], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "tree, message",
    [
        (
            {"model_type": "gla", "feature_map": "elu"},
            'model_type gla has feature_map="elu", .* Supported: null, "relu"',
        ),
        ({"model_type": "gla", "hidden_act": "powlu"}, 'has hidden_act="powlu"'),
        ({"model_type": "gla", "elementwise_affine": False}, "has elementwise_affine=false"),
        ({"model_type": "gla", "attnres_block_size": 4}, "has attnres_block_size=4"),
        ({"model_type": "gla", "attn": [ATTN | {"layers": [0]}, ATTN]}, "attn has 2 kinds of attention"),
        ({"model_type": "gla", "attn": {"num_heads": 2}}, "attn is .*must be a mapping with layers and num_heads"),
        ({"model_type": "gla", "attn": "x"}, "attn is .*must be a mapping with layers and num_heads"),
        (
            {"model_type": "gla", "attn": ATTN | {"layers": [99]}},
            r"attn.layers is \[99\]. It must be a list of layers from 0 to",
        ),
        ({"model_type": "gla", "attn": ATTN | {"qkv_bias": True}}, "has attn.qkv_bias=true"),
        ({"model_type": "retnet", "feature_map": "relu"}, 'feature_map="relu", .* Supported: null$'),
        ({"model_type": "retnet", "use_output_gate": False}, "model_type retnet has use_output_gate=false"),
        ({"model_type": "retnet", "num_kv_heads": 2}, "model_type retnet has num_kv_heads=2"),
        ({"model_type": "transformer", "qk_norm": True}, "model_type transformer has qk_norm=true"),
    ],
)
def test_unsupported_field_is_an_error(tree, message, write_fla_checkpoint):
    folder, _ = write_fla_checkpoint(**{"model_type": tree["model_type"]})
    (folder / "config.json").write_text(json.dumps(BASE | tree))
    for load in (AutoModelForCausalLM, GLALMForCausalLM, AutoConfig, GLALMConfig):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mixer": "regla"}, "no model with layers of regla"),
        ({"layers": "gla+mamba2", "mamba2": {"head_dim": 8}}, "no model with layers of gla, mamba2"),
        ({"gla": {"gate": "scalar"}}, "model.gla.gate=scalar cannot be exported: .* always vector"),
        ({"gate_low_rank_dim": 8}, "model.gate_low_rank_dim=8 cannot be exported: .* always 16"),
        ({"intermediate_size": 0}, "model.intermediate_size=0 cannot be exported"),
    ],
)
def test_model_that_fla_lacks_is_not_exported(options, message, build_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_checkpoint(build_model(**options), tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_incomplete_fla_weights_are_an_error(write_fla_checkpoint):
    folder, weights = write_fla_checkpoint(**FLA_CONFIGS["gla, convolution"])
    file = folder / "model.safetensors"
    save_file({n: w for n, w in weights.items() if "layers.1.attn.k_conv1d" not in n}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no place for: model.layers.1.attn.q_conv1d.weight"):
        AutoModelForCausalLM.from_pretrained(folder)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short"):
        AutoModelForCausalLM.from_pretrained(folder)
    file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"found only pytorch_model.bin"):
        AutoModelForCausalLM.from_pretrained(folder)
