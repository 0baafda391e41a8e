"""torch.compile of the whole model with labels, as transformers' Trainer compiles it, against the plain model."""

from dataclasses import dataclass

import pytest
import torch
from choices import CHOICES, every_choice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from glalm import IGNORE_INDEX
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.mixers import MIXERS

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
GPU_SHAPE = {"vocab_size": 512, "hidden_size": 256, "num_heads": 4, "intermediate_size": 512}


@dataclass
class Precision:
    dtype: torch.dtype  # of the weights
    autocast: bool
    loss: float  # the largest difference that rounding makes, in nats
    gradient: float  # the same, as a part of the gradient's norm


PRECISIONS = {
    "float32": Precision(torch.float32, False, 1e-5, 1e-4),
    "bf16": Precision(torch.bfloat16, False, 2e-3, 0.03),
    "autocast": Precision(torch.float32, True, 2e-3, 0.03),
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build_model(precision: Precision, device: str = "cpu", **config) -> GLALMForCausalLM:
    torch.manual_seed(0)
    model = GLALMForCausalLM(GLALMConfig(**(SHAPE | config))).train()
    return model.to(device, precision.dtype)


def draw_batch(B: int = 2, T: int = 70, vocabulary: int = 50, device: str = "cpu", seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (B, T), generator=generator)
    ignored = torch.rand(B, T, generator=generator) < 0.1
    return {"input_ids": ids.to(device), "labels": ids.masked_fill(ignored, IGNORE_INDEX).to(device)}


def compute_loss(call, batch: dict, precision: Precision) -> torch.Tensor:
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision.autocast):
        return call(**batch).loss


def train_step(call, model: nn.Module, batch: dict, precision: Precision) -> tuple[float, torch.Tensor]:
    """Return the loss, and the gradients of all parameters as one vector."""
    model.zero_grad()
    loss = compute_loss(call, batch, precision)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def check_training(model: nn.Module, compiled, batch: dict, precision: Precision) -> None:
    """Compare two training steps of the compiled model with those of the plain one."""
    expected_loss, expected = train_step(model, model, batch, precision)
    for _ in range(2):
        torch.compiler.cudagraph_mark_step_begin()
        loss, gradient = train_step(compiled, model, batch, precision)
        assert abs(loss - expected_loss) < precision.loss
        assert (gradient - expected).norm() < precision.gradient * expected.norm()


def check_is_one_graph(model: nn.Module, batch: dict, precision: Precision) -> None:
    """Trace the model, which raises an error at a graph break, and run the graph as it is."""
    counter = CompileCounterWithBackend("eager")
    compute_loss(torch.compile(model, fullgraph=True, backend=counter), batch, precision)
    assert counter.frame_count == 1


@every_mixer
def test_a_model_is_one_graph_under_autocast(mixer):
    precision = PRECISIONS["autocast"]
    check_is_one_graph(build_model(precision, mixer=mixer, num_hidden_layers=1), draw_batch(), precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [PRECISIONS["bf16"], PRECISIONS["autocast"]], ids=["bf16", "autocast"])
@every_choice
def test_a_model_is_one_graph(choice, precision):
    check_is_one_graph(build_model(precision, **choice), draw_batch(), precision)


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(PRECISIONS["float32"], id="float32", marks=pytest.mark.slow),
        pytest.param(PRECISIONS["bf16"], id="bf16", marks=pytest.mark.slow),
        pytest.param(PRECISIONS["autocast"], id="autocast"),
    ],
)
def test_a_compiled_model_trains_as_the_plain_one(precision):
    """aot_eager differentiates the graph as Inductor does."""
    model = build_model(precision, num_hidden_layers=1)
    check_training(model, torch.compile(model, fullgraph=True, backend="aot_eager"), draw_batch(), precision)


def half_padded(batch: dict) -> dict:
    mask = torch.ones_like(batch["input_ids"])
    mask[0, : mask.shape[1] // 2] = 0
    return batch | {"attention_mask": mask}


def packed(batch: dict) -> dict:
    row = {name: x.reshape(1, -1) for name, x in batch.items()}
    T = row["input_ids"].shape[1]
    return row | {"cu_seqlens": torch.tensor([0, T // 3, T // 3, T])}


INPUTS = {
    "labels": lambda batch: batch,
    "shift_labels": lambda batch: {"input_ids": batch["input_ids"], "shift_labels": batch["labels"]},
    "items of all batches": lambda batch: batch | {"num_items_in_batch": torch.tensor(77)},
    "z-loss": lambda batch: batch | {"z_loss": 0.1},
    "padding": half_padded,
    "packed": packed,
}


@pytest.mark.slow
@settings(max_examples=6)
@given(
    choice=st.sampled_from([*CHOICES]),
    precision=st.sampled_from([*PRECISIONS]),
    inputs=st.sampled_from([*INPUTS]),
    head=st.sampled_from(["plain", "bias", "hook", "tied"]),
    B=st.integers(2, 3),
    T=st.integers(2, 80),
)
def test_any_model_and_input_trains_as_the_plain_one(choice, precision, inputs, head, B, T):
    torch._dynamo.reset()
    config = CHOICES[choice] | {"tie_word_embeddings": head == "tied"}
    precision = PRECISIONS[precision]
    model = build_model(precision, **config)
    if head == "bias":
        model.lm_head = nn.Linear(32, 50, dtype=precision.dtype)
    elif head == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    batch = INPUTS[inputs](draw_batch(B, T))
    check_training(model, torch.compile(model, fullgraph=True, backend="aot_eager"), batch, precision)


@pytest.mark.slow
@torch.no_grad()
@every_choice
def test_evaluation_and_decoding_are_one_graph(choice):
    """With labels, evaluation also returns the logits. With a cache, the state is one of the graph's results."""
    model = build_model(PRECISIONS["float32"], **choice).eval()
    batch = draw_batch()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    expected = model(**batch)
    found = compiled(**batch, use_cache=True)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits))
    step = {"input_ids": batch["input_ids"][:, :1], "past_key_values": found.past_key_values}
    torch.testing.assert_close(compiled(**step).logits, model(**step).logits)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_trainer_compiles_the_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    losses = []
    for options in {}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}:
        model = build_model(PRECISIONS["float32"])
        rows = [{name: x[0] for name, x in draw_batch(1, seed=seed).items()} for seed in range(8)]
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, per_device_train_batch_size=2, max_steps=3, bf16=True, use_cpu=True, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=0.01)


# On a GPU, where the operators run their kernels --------------------------------------------------------------------


@pytest.mark.gpu
@every_precision
@every_mixer
def test_a_model_is_one_graph_on_a_gpu(mixer, precision):
    model = build_model(precision, "cuda", **GPU_SHAPE, mixer=mixer)
    check_is_one_graph(model, draw_batch(2, 256, 512, "cuda"), precision)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("precision", [PRECISIONS["bf16"], PRECISIONS["autocast"]], ids=["bf16", "autocast"])
@every_mixer
def test_a_compiled_model_trains_as_the_plain_one_on_a_gpu(mixer, precision, mode):
    """reduce-overhead replays CUDA graphs."""
    counters.clear()
    model = build_model(precision, "cuda", **GPU_SHAPE, mixer=mixer, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for seed in range(2):
        check_training(model, compiled, draw_batch(2, 256, 512, "cuda", seed), precision)
    assert not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
