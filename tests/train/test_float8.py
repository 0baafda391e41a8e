"""train.float8: large linear layers train in float8, here by torchao's emulation on the CPU."""

import json
import sys
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from glalm.config.run import TrainConfig
from glalm.config.strict import ConfigError
from glalm.data.files import read_jsonl
from glalm.hf import GLALMForCausalLM
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.train import float8, trainer
from glalm.train.compile import apply_training_forward
from glalm.train.state import BatchPlan
from glalm.train.trainer import train

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 320, "hidden_size": 512, "num_heads": 2, "intermediate_size": 528, "gate_low_rank_dim": 16}
LARGE = {"attn.v_proj", "attn.g_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
SMALL = {"attn.q_proj", "attn.k_proj", "attn.gk_proj.0", "attn.gk_proj.1"}  # half as many keys as values: 256


@pytest.fixture
def emulated(monkeypatch):
    """Let torchao emulate float8 products by casts to float8 and back, which runs on any machine."""
    torchao = pytest.importorskip("torchao.float8")
    recipes = {"tensorwise": torchao.Float8LinearConfig(emulate=True)}
    monkeypatch.setattr(torchao.Float8LinearConfig, "from_recipe_name", staticmethod(recipes.__getitem__))
    monkeypatch.setattr(trainer, "check_float8_support", lambda plan, device: None)


def gla(layers: int = 1, **shape) -> CausalLM:
    torch.manual_seed(0)
    config = ModelConfig(**SHAPE | {"num_hidden_layers": layers} | shape)
    return CausalLM(config).train()


def tokens(T: int = 64) -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (2, T + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}


def step(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and the gradients of all parameters as one vector."""
    model.zero_grad()
    loss = model(**tokens()).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def kinds(model) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_only_the_large_layers_of_blocks_are_converted(emulated):
    model = gla(2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    float8.convert_to_float8(model)
    blocks = {f"model.layers.{i}.{name}" for i in (0, 1) for name in LARGE}
    plain = {f"model.layers.{i}.{name}" for i in (0, 1) for name in SMALL} | {"lm_head"}
    assert kinds(model) == dict.fromkeys(blocks, "Float8Linear") | dict.fromkeys(plain, "Linear")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() == parameters.keys()
    assert all(after[n] is parameters[n] and torch.equal(after[n], before[n]) for n in before)


def test_subclasses_and_unaligned_layers_are_not_converted(emulated):
    class Other(nn.Linear):
        pass

    assert float8.is_large_linear(nn.Linear(512, 1024)) and not float8.is_large_linear(Other(512, 1024))
    assert not float8.is_large_linear(nn.Linear(512, 1023)) and not float8.is_large_linear(nn.Linear(1016, 512))
    assert not float8.is_large_linear(nn.Linear(2048, 496)) and not float8.is_large_linear(nn.Embedding(512, 512))
    with pytest.raises(ConfigError, match="no linear layer of the blocks has 512 features or more"):
        float8.convert_to_float8(gla(hidden_size=256))


def test_training_is_close_to_the_plain_model_and_validation_equal(emulated):
    """Measured errors: a product 4% forward and 6% backward, a layer's gradient 13% (bfloat16: 1%)."""
    plain, model = gla(), gla()
    float8.convert_to_float8(model)
    (loss, gradient), (loss8, gradient8) = step(plain), step(model)
    assert 0 < abs(loss8 - loss) < 0.02
    assert 0.05 < (gradient8 - gradient).norm() / gradient.norm() < 0.2
    with torch.no_grad():
        assert torch.equal(model.eval()(**tokens()).loss, plain.eval()(**tokens()).loss)
    assert torch.equal(step(model.train())[1], gradient8)


@pytest.mark.parametrize("kept", ["elementwise", "selective", "full"])
def test_compiled_blocks_share_a_graph_without_a_break(emulated, kept, monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend=counter))
    found = []
    for config in TrainConfig(compile=False), TrainConfig(compile=True, activation_checkpointing=kept):
        model = gla(3, initializer_range=0.006)
        float8.convert_to_float8(model)
        apply_training_forward(model, config, CPU)
        found.append(step(model))
        with torch.no_grad():
            model.eval()(**tokens(9))
    torch.testing.assert_close(found[1], found[0])
    assert counter.frame_count == 1
    torch._dynamo.reset()


def wide(run_config, change):
    """Return a config with large layers, and a learning rate low enough for them."""
    more = {"optim.lr": 1e-3, "optim.min_lr": 1e-4, "train.checkpoint.keep_last": 9}
    return change(run_config, model=ModelConfig(**SHAPE, num_hidden_layers=1), **more)


def rows(config, key: str) -> list[float]:
    return [row[key] for row in read_jsonl(config.folder / "metrics.jsonl") if key in row]


@pytest.mark.parametrize("first", [True, False])
def test_run_can_resume_with_or_without_float8(emulated, run_config, change, first):
    config = change(wide(run_config, change), **{"train.float8": first})
    assert train(config) == 0
    source = config.folder / "checkpoints" / "step_4"
    fork = change(config, name="fork", **{"train.float8": not first, "train.resume_from": str(source)})
    assert train(fork) == 0
    one, two = (c.folder / "checkpoints" / "step_6" for c in (config, fork))
    one, two = (load_file(path / "model.safetensors") for path in (one, two))
    assert one.keys() == two.keys() and all(t.dtype == torch.float32 for t in one.values())
    assert not all(torch.equal(t, two[n]) for n, t in one.items())
    assert rows(fork, "loss") == pytest.approx(rows(config, "loss")[4:], rel=0.02)
    GLALMForCausalLM.from_pretrained(source).load_state_dict(one)


def test_what_is_not_supported_is_refused(run_config, change, monkeypatch):
    with pytest.raises(ConfigError, match=r"set train\.precision=bf16 or train\.float8=false"):
        TrainConfig(float8=True, precision="fp32")
    plan = BatchPlan.from_config(run_config, 1)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"pip install 'torchao>=0\.18', or set train\.float8=false"):
        float8.check_float8_support(plan, CPU)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(float8=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "torchao.float8", SimpleNamespace())
    with pytest.raises(ConfigError, match=r"capability 8\.9 or more .* but this is a CPU\. Set train\.float8=false"):
        float8.check_float8_support(plan, CPU)

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(ConfigError, match=r"this is NVIDIA A100 of 8\.0"):
        float8.check_float8_support(plan, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    float8.check_float8_support(plan, gpu)
    odd = BatchPlan.from_config(change(run_config, **{"data.seq_len": 12}), 1)
    with pytest.raises(ConfigError, match="24 tokens, which is not a multiple of 16"):
        float8.check_float8_support(odd, gpu)


def test_refused_before_the_run_has_a_folder(run_config, change, monkeypatch):
    def refuse(plan, device):
        raise ConfigError("no float8")

    monkeypatch.setattr(trainer, "check_float8_support", refuse)
    with pytest.raises(ConfigError, match="no float8"):
        train(change(run_config, **{"train.float8": True}))
    assert not run_config.folder.exists()


def test_float8_is_logged_and_recorded(emulated, run_config, change, capfd):
    config = change(wide(run_config, change), **{"train.float8": True, "train.steps": 2})
    assert train(config) == 0
    assert "1 x cpu, fp32, large linear layers in float8\n" in capfd.readouterr().err
    assert json.loads((config.folder / "run.json").read_text())["versions"]["torchao"] == metadata.version("torchao")
    assert train(change(config, name="plain", **{"train.float8": False})) == 0
    assert "float8" not in capfd.readouterr().err
    assert "torchao" not in json.loads((config.folder.with_name("plain") / "run.json").read_text())["versions"]


@pytest.mark.gpu
def test_on_a_gpu(run_config, change, monkeypatch):
    """It compiles without a graph break, trains close to bfloat16, validates in it, and resumes without float8."""
    pytest.importorskip("torchao.float8")
    if torch.cuda.get_device_capability() < float8.MIN_CAPABILITY:
        pytest.skip("needs a GPU with float8")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True))
    plain = change(wide(run_config, change), **{"train.batch_size": 16, "train.micro_batch_size": 8})
    config = change(plain, name="float8", **{"train.float8": True})
    assert train(plain) == 0 and train(config) == 0
    one, two = rows(plain, "loss"), rows(config, "loss")
    assert two == pytest.approx(one, rel=0.02) and two != one
    assert rows(config, "val_loss")[0] == pytest.approx(rows(plain, "val_loss")[0], abs=1e-5)
    source = config.folder / "checkpoints" / "step_4"
    fork = change(plain, name="fork", **{"train.resume_from": str(source)})
    assert train(fork) == 0
    assert rows(fork, "loss") == pytest.approx(two[4:], rel=0.02)
