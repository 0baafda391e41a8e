import pytest
import torch
from torch.nn.functional import elu, relu, silu

from glalm.config.strict import ConfigError
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM

MAPS = {"silu": silu, "elu1": lambda m: elu(m) + 1, "relu": relu, "identity": lambda m: m}


def decay_rate(head, config, layer):
    """ALiBi's slope of head 1, 2, ..., smaller in higher layers."""
    return 2 ** (-8 * head / config.num_heads) * (1 - layer / (config.num_hidden_layers - 1) + 1e-5)


def transnormer(w, x, config, layer=0):
    """The parallel form, as a matrix of all pairs: (Q K^T * D) V with complex rotations in place of LRPE."""
    options, H, T, heads = config.transnormer, config.num_heads, len(x), []
    distance = torch.arange(T)[:, None] - torch.arange(T)
    for h in range(H):
        q, k, v = (m.chunk(H, 1)[h] for m in (x @ w[f"{n}_proj.weight"].T for n in "qkv"))
        q, k = (MAPS[options.feature_map](m) for m in (q, k))
        rate = decay_rate(h + 1, config, layer) if options.decay else 0.0
        decay = torch.where(distance >= 0, torch.exp(-rate * distance.double()), 0)
        if "lrpe.theta" in w:
            turn = torch.exp(1j * torch.arange(T).double()[:, None] * w["lrpe.theta"][h])
            scores = ((q * turn) @ (k * turn).mH).real
        else:
            scores = q @ k.T
        heads.append(scores * decay @ v / q.shape[1] ** 0.5)
    y = torch.cat(heads, 1)
    y = y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
    if options.output_gate:
        y = y * (x @ w["u_proj.weight"].T)
    return y @ w["o_proj.weight"].T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lrpe": "none"},
        {"feature_map": "elu1", "decay": False, "lrpe": "all", "output_gate": False},
        {"feature_map": "identity", "lrpe": "none", "output_gate": False},
        {"feature_map": "relu", "decay": False, "lrpe": "none"},
    ],
    ids=str,
)
def test_is_the_parallel_form(options, assert_is):
    assert_is(transnormer, T=70, mixer="transnormer", num_heads=4, expand_k=1.0, transnormer=options)


def test_a_layer_decays_by_its_number(tiny):
    model = tiny(mixer="transnormer", num_hidden_layers=3)
    x = torch.randn(30, 32, dtype=torch.float64)
    for layer, block in enumerate(model.model.layers):
        w = dict(block.attn.named_parameters())
        assert ("lrpe.theta" in w) == (layer == 0)
        expected = transnormer(w, x, model.config, layer)
        torch.testing.assert_close(block.attn(x[None])[0][0], expected, rtol=1e-7, atol=1e-9)


class SiLUOfQueriesAndKeys(torch.nn.Module):
    def forward(self, qkv):
        """Map q and k of 4 heads, each of which has 8 channels of q, k and v side by side."""
        q_and_k, v = qkv.unflatten(-1, (4, 24)).split([16, 8], -1)
        return torch.cat([silu(q_and_k), v], -1).flatten(-2)


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_decays_as_minimax_lightning_attention(layer, tiny):
    """transformers' layer also maps v by a SiLU and its gate by a sigmoid. Without these it computes the same."""
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 8}
    settings = minimax.MiniMaxConfig(**sizes, layer_types=["linear_attention"] * 4, block_size=16)
    theirs = minimax.MiniMaxLightningAttention(settings, layer)
    theirs.act_fn = SiLUOfQueriesAndKeys()
    theirs.output_gate.weight.zero_()  # The sigmoid of its output is 1/2.
    theirs.norm.variance_epsilon = 1e-9
    model = tiny(
        mixer="transnormer", num_heads=4, expand_k=1.0, num_hidden_layers=4, norm_eps=1e-9,
        transnormer={"lrpe": "none", "output_gate": False},
    )  # fmt: skip
    ours = model.float().model.layers[layer].attn
    weights = theirs.qkv_proj.weight.view(4, 3, 8, 32)  # of each head, its q, k and v
    for i, name in enumerate("qkv"):
        getattr(ours, f"{name}_proj").weight.copy_(weights[:, i].reshape(32, 32))
    ours.o_proj.weight.copy_(theirs.out_proj.weight)
    x = torch.randn(2, 50, 32)
    expected = 2 * theirs(x, None, None)[0]
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-5)


def diag_attention(w, x, config):
    """Softmax attention with a mask of blocks on the diagonal, and complex rotations."""
    H, T, block, heads = config.num_heads, len(x), config.transnormer_diag.block, []
    time = torch.arange(T)
    visible = (time[:, None] >= time) & (time[:, None] // block == time // block)
    for h in range(H):
        q, k, v = (m.chunk(H, 1)[h] for m in (x @ w[f"{n}_proj.weight"].T for n in "qkv"))
        half = q.shape[1] // 2
        turn = torch.exp(1j * time.double()[:, None] * 10000 ** -(torch.arange(half).double() / half))
        q, k = (torch.complex(m[:, :half], m[:, half:]) * turn for m in (q, k))
        scores = (q @ k.mH).real / (2 * half) ** 0.5
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(1) @ v)
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


@pytest.mark.parametrize("block", [1, 7, 64])
def test_is_softmax_attention_inside_of_blocks(block, assert_is, tiny):
    if block == 1:  # A token that sees itself alone has a value, and its query and key do not matter.
        mixer = tiny(mixer="transnormer_diag", transnormer_diag={"block": 1}).model.layers[0].attn
        x = torch.randn(1, 5, 32, dtype=torch.float64)
        torch.testing.assert_close(mixer(x)[0], mixer.o_proj(mixer.v_proj(x)))
        return
    assert_is(diag_attention, T=40, mixer="transnormer_diag", transnormer_diag={"block": block})


def test_blocks_of_no_tokens(tiny):
    mixer = tiny(mixer="transnormer_diag").model.layers[0].attn
    y, state = mixer(torch.zeros(2, 0, 32, dtype=torch.float64))
    assert y.shape == (2, 0, 32) and state is None


def test_odd_heads_are_refused():
    with pytest.raises(ConfigError, match=r"model\.num_heads=16 does not cut model.hidden_size=48 into heads"):
        ModelConfig(mixer="transnormer_diag", vocab_size=8, hidden_size=48, num_heads=16, expand_k=1.0)
    with pytest.raises(ConfigError, match=r"model\.transnormer_diag\.block must be positive"):
        ModelConfig(mixer="transnormer_diag", vocab_size=8, transnormer_diag={"block": 0})


def test_layers_keep_their_numbers_in_other_faces(tiny, tokens, tmp_path):
    """The numbers are in no state dict, so each way to build a model must set them."""
    model, ids = tiny(mixer="transnormer", num_hidden_layers=3), tokens(1, 20)
    expected = model(ids).logits
    core = model.to_core()
    assert isinstance(core, CausalLM)
    torch.testing.assert_close(core(ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert [block.attn.decay.layer.item() for block in loaded.model.layers] == [0, 1, 2]
    torch.testing.assert_close(loaded(ids).logits, expected)
