"""What users of transformers, its Trainer and peft do with any model, done with ours."""

import json
import os
import re
import subprocess
import sys
from shutil import copytree
from types import SimpleNamespace

import accelerate
import hypothesis
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from choices import EXACT, every_choice
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.nn.parallel import scatter_gather
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    DynamicCache,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import glalm.hf
from glalm.data.tokenizer import Tokenizer as OurTokenizer
from glalm.hf import GLALMConfig, GLALMForCausalLM, GLALMModel, cu_seqlens_of_positions, shift_within_sequences
from glalm.model.cache import StateCache
from glalm.model.fla_checkpoints import FORMATS
from glalm.model.mixers.gla import GLAOptions
from glalm.pretrained import check_distributed_parts

HYBRID = {"layers": "gla+attention", "gla": {"short_conv": 4}}


@pytest.fixture
def saved(tiny, tmp_path):
    """saved(**config) saves a tiny model in float32, and returns it and the folder."""

    def save(**changes):
        model = tiny(**changes).float()
        model.save_pretrained(tmp_path / "saved")
        return model, tmp_path / "saved"

    return save


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(50)}
    fast = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="w0", pad_token="w0", padding_side="left")


@pytest.mark.slow
def test_importing_hf_registers_the_auto_classes(saved):
    """Importing the package alone imports and registers nothing."""
    _, folder = saved()
    code = f"""
import sys, glalm
assert not {{"torch", "transformers"}} & sys.modules.keys()
from transformers import AutoModelForCausalLM
import glalm.hf
print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__module__)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "glalm.hf", done.stderr


def test_another_librarys_model_types_stay_its_own(monkeypatch):
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {"retnet": "another library's"})
    glalm.hf.register()
    assert {name: CONFIG_MAPPING[name] for name in glalm.hf.MODEL_TYPES} == {
        "glalm": GLALMConfig,
        "gla": GLALMConfig,
        "transformer": GLALMConfig,
        "retnet": "another library's",
    }
    assert set(glalm.hf.MODEL_TYPES) == {"glalm", *FORMATS}


def test_auto_classes(saved, tokens):
    model, folder = saved()
    assert type(AutoConfig.from_pretrained(folder)) is GLALMConfig
    base, whole = AutoModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert type(base) is GLALMModel and type(AutoModelForCausalLM.from_config(model.config)) is GLALMForCausalLM
    torch.testing.assert_close(whole(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    torch.testing.assert_close(base(tokens(1, 9)).last_hidden_state, model.model(tokens(1, 9)).last_hidden_state)


def test_pushed_to_the_hub_and_loaded_from_it(tiny, tokens, tmp_path, monkeypatch):
    """A folder stands in for the hub: files that would be uploaded are copied there."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, repo, **__: SimpleNamespace(repo_id=repo))
    monkeypatch.setattr(
        GLALMForCausalLM, "_upload_modified_files", lambda _, files, repo, *rest, **__: copytree(files, hub / repo)
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tiny().float()
    model.push_to_hub("someone/model")
    loaded = AutoModelForCausalLM.from_pretrained(hub / "someone" / "model")
    torch.testing.assert_close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_pipeline(saved):
    model, folder = saved()
    word_tokenizer().save_pretrained(folder)
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    texts = ["w3 w4 w5", "w7"]
    together = generate(texts, batch_size=2, return_full_text=False, **settings)
    for text, [out] in zip(texts, together, strict=True):
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
        expected = model.generate(ids, pad_token_id=0, **settings)[0, ids.shape[1] :]
        assert out["generated_text"].split() == [f"w{i}" for i in expected.tolist()]


def test_a_string_stops_generation(tiny, token_folder):
    pytest.importorskip("google.protobuf")
    model = tiny(vocab_size=300)
    tokenizer = LlamaTokenizer.from_pretrained(token_folder, add_prefix_space=False, pad_token="<unk>")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    settings["suppress_tokens"] = [*range(259)]  # Special tokens and bytes, which are no text of their own.
    prompt = tokenizer("alpha", return_tensors="pt")
    T = prompt["input_ids"].shape[1]
    free = model.generate(**prompt, **settings)[0, T:].tolist()
    text = tokenizer.decode(free[3])
    end = [text in tokenizer.decode(free[: i + 1]) for i in range(8)].index(True) + 1
    assert end < 8
    found = model.generate(**prompt, stop_strings=[text], tokenizer=tokenizer, **settings)
    assert found[0, T:].tolist() == free[:end]


def test_a_runs_tokenizer_works_in_transformers(token_folder, tmp_path):
    pytest.importorskip("google.protobuf")
    made = LlamaTokenizer.from_pretrained(token_folder, add_prefix_space=False, add_bos_token=True)
    made.save_pretrained(tmp_path)
    ours, theirs = OurTokenizer(token_folder / "tokenizer.model"), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("alpha beta gamma", " two  spaces ", "a\n\nb ☃ Ü 1,234", ""):
        assert theirs(text).input_ids == [*ours.bos_ids, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == text


MAMBA = {"mixer": "mamba"}
MAMBA2 = {"mixer": "mamba2", "mamba2": {"state_size": 16, "head_dim": 8}}


@pytest.mark.parametrize("choice", [{}, HYBRID, MAMBA, MAMBA2], ids=str)
def test_device_maps(choice, saved, tokens, tmp_path):
    model, folder = saved(**choice)
    expected = model(tokens(1, 9)).logits
    auto = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    torch.testing.assert_close(auto(tokens(1, 9)).logits.cpu(), expected, rtol=1e-4, atol=1e-4)
    places = {"model.embeddings": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    split = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {"lm_head": "disk"}, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(split(tokens(1, 9)).logits, expected)
    ids = tokens(2, 9)
    torch.testing.assert_close(split(ids, labels=ids).loss, model(ids, labels=ids).loss)


@every_choice
def test_offloaded_weights_are_in_memory_when_they_are_used(choice, tiny, tokens):
    """Hooks of a module's call load its weights, so nothing but its forward may read them."""
    model = tiny(**choice)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids, labels=ids)
        accelerate.cpu_offload(model, torch.device("cpu"))
        found = model(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss, check_dtype=False)


def test_loading_in_half_precision(saved, tokens, tmp_path):
    model, folder = saved()
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    expected = model(tokens(1, 9)).logits
    assert (half(tokens(1, 9)).logits.float() - expected).norm() < 0.05 * expected.norm()
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).dtype == torch.float32


def test_sharded_checkpoints(tiny, tokens, tmp_path):
    model = tiny().float()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_a_folder_has_the_weights_that_were_saved_last(tiny, tokens, tmp_path):
    ids = tokens(1, 9)
    for seed, size in enumerate(["50GB", "10KB", "50GB", "20KB", "10KB"]):
        model = tiny(seed=seed).float()
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert {path.name for path in tmp_path.glob("model.safetensors*")} == {"model.safetensors.index.json"}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("choice", [{}, HYBRID, {"mixer": "mamba", "intermediate_size": 0}], ids=str)
def test_gradient_checkpointing_changes_nothing(choice, reentrant, tiny, tokens):
    model, ids = tiny(**choice).train(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    plain = model(ids, attention_mask=mask, labels=ids)
    expected = torch.autograd.grad(plain.loss, [*model.parameters()])
    runs = []
    model.model.layers[0].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    assert len(runs) == 2  # The backward pass ran it again.
    torch.testing.assert_close(out.loss, plain.loss, rtol=0, atol=0)
    for (name, p), grad in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tied, tiny, tokens, tmp_path):
    model = tiny(tie_word_embeddings=tied)
    expected = model(tokens(1, 9)).logits
    model.resize_token_embeddings(57)
    assert model.config.vocab_size == 57 == model.lm_head.out_features == model.get_input_embeddings().num_embeddings
    assert (model.lm_head.weight is model.model.embeddings.weight) == tied
    torch.testing.assert_close(model(tokens(1, 9)).logits[..., :50], expected, **EXACT)
    assert model(torch.tensor([[56]]), labels=torch.tensor([[56]])).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (loaded.lm_head.weight is loaded.model.embeddings.weight) == tied
    torch.testing.assert_close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits, **EXACT)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_are_saved_once_and_learn_together(tied, tiny, tokens, tmp_path):
    from safetensors import safe_open

    model, ids = tiny(tie_word_embeddings=tied).train(), tokens(1, 9)
    model(ids, labels=ids).loss.backward()
    assert (model.lm_head.weight.grad is model.model.embeddings.weight.grad) == tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in [*file.keys()]) != tied


def test_hidden_states(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 3 and model(ids).hidden_states is None
    torch.testing.assert_close(hidden[0], model.model.embeddings(ids))
    torch.testing.assert_close(model.model.norm(model.model.layers[1](hidden[1])[0]), hidden[2])
    torch.testing.assert_close(model.lm_head(hidden[2]), model(ids).logits)
    model.config.output_hidden_states = True
    torch.testing.assert_close(model(ids).hidden_states, hidden)


class Sentences(Dataset):
    """Rows of unequal length, which the collator pads on the right."""

    def __init__(self, tokens, count: int = 8):
        self.rows = [tokens(5 + 3 * i, seed=i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.rows[i], "attention_mask": torch.ones_like(self.rows[i])}


def training_arguments(folder, **changes) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 3, "seed": 1}
    return TrainingArguments(str(folder), **(settings | changes))


def collate(rows: list[dict]) -> dict:
    from transformers import DataCollatorForLanguageModeling

    right = word_tokenizer()
    right.padding_side = "right"
    return DataCollatorForLanguageModeling(right, mlm=False)(rows)


@pytest.mark.parametrize("choice", [{}, HYBRID], ids=str)
def test_trainer(choice, tiny, tokens, tmp_path):
    data = Sentences(tokens)
    settings = {"eval_strategy": "steps", "eval_steps": 3, "gradient_checkpointing": True}
    trainer = Trainer(
        tiny(**choice).float(),
        training_arguments(tmp_path, **settings),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    resumed = Trainer(tiny(**choice).float(), training_arguments(tmp_path), train_dataset=data, data_collator=collate)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, p), q in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_accumulated_batches_weigh_every_token_the_same(tiny, tokens, tmp_path):
    """Trainer's loss of two micro-batches of unequal length equals that of one batch."""
    data, model = Sentences(tokens, 4), tiny().float()
    rows = collate([data[i] for i in range(4)])
    whole = model(**rows, use_cache=False).loss.item()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = Trainer(model, training_arguments(tmp_path, **settings), train_dataset=data, data_collator=collate)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole, rel=1e-5)


def test_smoothed_labels_are_shifted_too(tiny, tokens, tmp_path):
    model, ids = tiny().float(), tokens(2, 9)
    trainer = Trainer(model, training_arguments(tmp_path, label_smoothing_factor=1e-9), train_dataset=Sentences(tokens))
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("choice", [{}, HYBRID, {"mixer": "regla"}, {"mixer": "mamba2"}], ids=str)
def test_lora(choice, tiny, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    targets = {"mamba2": ["in_proj", "z_proj", "out_proj"]}.get(
        choice.get("mixer"), ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    if choice.get("mixer") == "mamba2":
        choice = choice | {"mamba2": {"state_size": 16, "head_dim": 8}}
    base = tiny(**choice).float()
    base.save_pretrained(tmp_path / "base")
    expected = base(tokens(1, 9)).logits.detach()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learned and all("lora_" in name for name in learned)
    torch.testing.assert_close(model(input_ids=tokens(1, 9)).logits, expected)
    settings = {"gradient_checkpointing": True, "learning_rate": 3e-2}
    trainer = Trainer(
        model, training_arguments(tmp_path, **settings), train_dataset=Sentences(tokens), data_collator=collate
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    adapted = model(input_ids=tokens(1, 9)).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=tokens(1, 9)).logits, adapted)
    torch.testing.assert_close(again.merge_and_unload()(tokens(1, 9)).logits, adapted, rtol=1e-3, atol=1e-4)


@every_choice
def test_padding_on_the_right_in_training(choice, tiny, tokens):
    """Loss and gradients of a padded batch are those of its sequences, and no real token sees the padding."""
    model, rows = tiny(**choice).train(), [tokens(n, seed=n) for n in (21, 9, 2)]
    ids = torch.stack([F.pad(row, (0, 21 - len(row)), value=7) for row in rows])
    mask = torch.stack([(torch.arange(21) < len(row)).long() for row in rows])
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    apart = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    expected = sum(apart) / sum(len(row) - 1 for row in rows)
    close = {"rtol": 1e-5, "atol": 1e-7}  # The loss is float32.
    torch.testing.assert_close(out.loss, expected, **close)
    names, weights = zip(*model.named_parameters(), strict=True)
    both = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (out.loss, expected))
    for name, found, truth in zip(names, *both, strict=True):
        torch.testing.assert_close(found, truth, **close, msg=lambda m, name=name: f"{name}: {m}")
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, : len(row)], model(row[None]).logits[0], **EXACT)


@every_choice
def test_prompts_padded_on_the_left_generate_as_each_does_alone(choice, tiny, tokens):
    model, rows = tiny(**choice), [tokens(n, seed=n) for n in (9, 4, 1)]
    ids = torch.stack([F.pad(row, (9 - len(row), 0), value=7) for row in rows])
    mask = torch.stack([(torch.arange(9) >= 9 - len(row)).long() for row in rows])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)[:, 9:]
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(found, model.generate(row[None], **settings)[0, len(row) :])


def test_shift_labels_take_precedence_over_labels(tiny, tokens):
    model, ids, targets = tiny(), tokens(2, 9), tokens(2, 9, seed=2)
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=targets).loss.double(), expected)


def test_labels_of_packed_sequences_are_shifted_within_each(tiny, tokens):
    model, ids = tiny(), tokens(1, 20)
    parts = [ids[:, :7], ids[:, 7:8], ids[:, 8:]]
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 0, 7, 8, 8, 20]))
    apart = [model(part, labels=part).loss * (part.shape[1] - 1) for part in parts]
    torch.testing.assert_close(packed.loss, sum(apart) / (6 + 0 + 11))


@hypothesis.settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=8), int32=st.booleans())
def test_labels_are_shifted_within_sequences_of_any_length(lengths, int32):
    labels = torch.arange(sum(lengths))[None]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32 if int32 else torch.int64).cumsum(0)
    expected = []
    for part in labels[0].split(lengths):
        expected += [*part[1:].tolist(), -100] if len(part) else []
    assert shift_within_sequences(labels, bounds).tolist() == [expected]


@pytest.mark.parametrize("bounds", [None, [0, 0], [0, 0, 0]], ids=str)
def test_a_row_without_tokens_has_a_loss_of_zero(bounds, tiny, tokens):
    model, ids = tiny().train(), tokens(1, 0)
    loss = model(ids, labels=ids, cu_seqlens=bounds and torch.tensor(bounds)).loss
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("described_by", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=str)
@pytest.mark.parametrize("choice", [{}, HYBRID], ids=str)
def test_flattened_batches_are_packed_sequences(choice, described_by, tiny, tokens, tmp_path):
    """Trainer's loss of a batch by DataCollatorWithFlattening equals that of its rows one by one."""
    model, data = tiny(**choice).float(), Sentences(tokens, 4)
    rows = [data[i]["input_ids"] for i in range(4)]
    apart = [model(row[None], labels=row[None]).loss.item() * (len(row) - 1) for row in rows]
    flat = DataCollatorWithFlattening(position_ids_start=2, **described_by)
    trainer = Trainer(model, training_arguments(tmp_path, max_steps=1), train_dataset=data, data_collator=flat)
    trainer.train()
    expected = sum(apart) / sum(len(row) - 1 for row in rows)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_positions(tiny, tokens):
    model, ids, restart = tiny(**HYBRID), tokens(2, 6), torch.tensor([[0, 1, 0, 0, 1, 2]])
    apart = torch.cat([model(part).logits for part in ids[:1].split([2, 1, 3], 1)], 1)
    torch.testing.assert_close(model(ids[:1], position_ids=restart).logits, apart, **EXACT)
    mask, past = torch.ones_like(ids), model(ids).past_key_values
    onwards = torch.arange(6).repeat(2, 1) + 7
    for more in ({}, {"attention_mask": mask}, {"past_key_values": past}):
        torch.testing.assert_close(model(ids, position_ids=onwards, **more).logits, model(ids, **more).logits)
    packed = {"cu_seqlens": torch.tensor([0, 3, 6])}
    for more in ({"attention_mask": mask[:1]}, {"past_key_values": model(ids[:1]).past_key_values}, packed):
        with pytest.raises(ValueError, match="position_ids restart"):
            model(ids[:1], position_ids=restart, **more)
    with pytest.raises(ValueError, match="in a batch of one"):
        model(ids, position_ids=restart.repeat(2, 1))


def test_positions_at_padding_are_ignored(tiny, tokens):
    model, ids = tiny(**HYBRID), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model(ids, attention_mask=mask).logits
    for usual in ((mask.cumsum(1) - 1).masked_fill(mask == 0, 1), mask.cumsum(1) - mask):
        logits = model(ids, attention_mask=mask, position_ids=usual).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="position_ids restart"):
        model(ids, attention_mask=mask, position_ids=torch.tensor([[1, 1, 0, 1, 0, 1], [*range(6)]]))


@hypothesis.settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8), starts=st.lists(st.integers(0, 9), min_size=8))
def test_positions_of_any_packing_give_its_bounds(lengths, starts):
    """Two sequences are one if the positions of the second continue those of the first."""
    positions, bounds = [], [0]
    for length, start in zip(lengths, starts, strict=False):
        if positions and start == positions[-1] + 1:
            bounds.pop()
        positions += range(start, start + length)
        bounds.append(len(positions))
    found = cu_seqlens_of_positions(torch.tensor([positions]), torch.zeros(1, len(positions)), None, None, None)
    assert bounds[1:] == [len(positions)] if found is None else bounds == found.tolist()


@pytest.mark.parametrize("choice", [{}, HYBRID, {"mixer": "mamba2"}], ids=str)
def test_positions_of_the_base_model(choice, tiny, tokens):
    """TRL's packing and peft's feature extraction call it alone."""
    model, ids, restart = tiny(**choice).model, tokens(1, 6), torch.tensor([[0, 1, 0, 0, 1, 2]])
    apart = torch.cat([model(part).last_hidden_state for part in ids.split([2, 1, 3], 1)], 1)
    found = model(ids, position_ids=restart, output_attentions=False).last_hidden_state
    torch.testing.assert_close(found, apart, **EXACT)
    bounds = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 3, "max_length_k": 3}
    for positions in (None, restart):
        found = model(ids, position_ids=positions, **packing).last_hidden_state
        torch.testing.assert_close(found, apart, **EXACT)
    with pytest.raises(TypeError, match=r"takes no block_table"):
        model(ids, **packing, block_table=None)
    with pytest.raises(TypeError, match=r"seq_idx alone .* position_ids or cu_seq_lens_q"):
        model(ids, seq_idx=torch.tensor([[0, 0, 1, 2, 2, 2]]))
    with pytest.raises(TypeError, match=r"GLALMModel gives no attention weights"):
        model(ids, output_attentions=True)


@pytest.mark.slow
def test_training_with_positions_compiles_without_a_graph_break(tiny, tokens):
    torch._dynamo.reset()
    model, ids = tiny(num_hidden_layers=1).train(), tokens(2, 10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(ids, labels=ids, use_cache=False, position_ids=torch.arange(10)[None]).loss
    found.backward()
    torch.testing.assert_close(found, model(ids, labels=ids).loss)


def test_compiled_code_refuses_positions_that_restart_in_a_batch():
    torch._dynamo.reset()
    compiled = torch.compile(cu_seqlens_of_positions, fullgraph=True, backend="aot_eager")
    x, mask = torch.zeros(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    assert compiled(mask.cumsum(1) - 1, x, mask, None, None) is None
    with pytest.raises(RuntimeError, match="position_ids restart"):
        compiled(torch.tensor([[0, 1, 2, 3, 0, 1]]), x, mask, None, None)


def test_positions_in_a_batch_of_one_break_the_graph_and_say_why():
    torch._dynamo.reset()
    restart, x = torch.tensor([[0, 1, 0, 0, 1, 2]]), torch.zeros(1, 6)
    compiled = torch.compile(cu_seqlens_of_positions, backend="eager")
    assert compiled(restart, x, None, None, None).tolist() == [0, 2, 3, 6]
    torch._dynamo.reset()
    compiled = torch.compile(cu_seqlens_of_positions, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="pass cu_seqlens, not position_ids"):
        compiled(restart, x, None, None, None)


@every_choice
@torch.no_grad()
def test_caches_of_replicas_are_gathered(choice, tiny, tokens, monkeypatch):
    """nn.DataParallel joins outputs by scatter_gather.gather, of which a CPU lacks only the copy between devices."""
    model, ids = tiny(**choice), tokens(4, 9)
    join = SimpleNamespace(apply=lambda device, dim, *tensors: torch.cat(tensors, dim))
    monkeypatch.setattr(scatter_gather, "Gather", join)
    gathered = scatter_gather.gather([model(half) for half in ids.split(2)], "cpu")
    torch.testing.assert_close(gathered.logits, model(ids).logits)
    more, cache = tokens(4, 3, seed=2), gathered.past_key_values
    expected = model(torch.cat([ids, more], 1)).logits[:, 9:]
    assert cache.seen == 9
    torch.testing.assert_close(model(more, past_key_values=cache).logits, expected, **EXACT)


@every_choice
@torch.no_grad()
def test_sequences_of_a_cache_are_repeated_and_selected(choice, tiny, tokens):
    model, ids, more = tiny(**choice), tokens(2, 9), tokens(4, 3, seed=2)
    cache = model(ids).past_key_values
    cache.batch_repeat_interleave(2)
    expected = model(torch.cat([ids.repeat_interleave(2, 0), more], 1)).logits[:, 9:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, expected, **EXACT)
    cache.batch_select_indices(torch.tensor([3, 0]))
    torch.testing.assert_close(model(more[[3, 0]], past_key_values=cache).logits, expected[[3, 0]], **EXACT)
    cache.batch_select_indices(torch.tensor([False, True]))
    torch.testing.assert_close(model(more[:1], past_key_values=cache).logits, expected[:1], **EXACT)
    assert not cache.is_croppable and not cache.is_compileable
    with pytest.raises(NotImplementedError, match="Keep the cache of that token instead"):
        cache.crop(-1)


@torch.no_grad()
def test_the_advice_for_beams_continues_each_sequence(tiny, tokens):
    """Rows 0 to 2 of six belong to the first of two sequences."""
    model, ids, more = tiny(), tokens(2, 9), tokens(2, 3, seed=2).repeat_interleave(3, 0)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"the input 6\. To continue .* past_key_values\.batch_repeat_interleave\(3\)"):
        model(more, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    expected = model(torch.cat([ids.repeat_interleave(3, 0), more], 1)).logits[:, 9:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, expected, **EXACT)
    for cached, rows in ((cache, 4), (cache, 7), (model(ids[:0]).past_key_values, 2)):
        with pytest.raises(ValueError, match=rf"and the input {rows}\.$"):
            model(more[:1].repeat(rows, 1), past_key_values=cached)


@every_choice
def test_a_cache_is_taken_apart_and_put_together(choice, tiny, tokens):
    cache = tiny(**choice)(tokens(2, 9)).past_key_values
    leaves, structure = tree_flatten(cache)
    again = tree_unflatten(leaves, structure)
    assert type(again) is StateCache and again.seen == 9
    torch.testing.assert_close(again.states, cache.states, rtol=0, atol=0)
    assert list(StateCache(iter(StateCache([], 5)))) == [torch.tensor([5])]


@pytest.mark.parametrize("choice", [{}, {"mixer": "attention"}], ids=str)
@torch.no_grad()
def test_exported_programs_return_and_continue_caches(choice, tiny, tokens):
    model, ids, longer = tiny(**choice, num_hidden_layers=1), tokens(2, 10), tokens(2, 17)
    shapes = {"input_ids": {1: torch.export.Dim("T", min=2, max=64)}}
    program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=shapes).module()
    found, expected = program(input_ids=longer), model(longer)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.past_key_values.seen == 17
    step = {"input_ids": ids[:, :1], "past_key_values": expected.past_key_values}
    found = torch.export.export(model, (), step).module()(**step)
    torch.testing.assert_close(found.logits, model(**step).logits)
    assert found.past_key_values.seen == 18


def test_wrappers_can_take_their_own_loss_from_the_logits(tiny, tokens):
    """They give inputs_embeds. The logits are computed when they are read, and with all gradients."""
    model, ids = tiny().train(), tokens(2, 9)
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(ids).logits
    calls.clear()
    out = model(inputs_embeds=model.model.embeddings(ids), labels=torch.full_like(ids, -100))
    called = len(calls)
    torch.testing.assert_close(out.logits, expected)
    assert out.logits is out.logits and len(calls) == called + 1 and [*out] == ["loss"]
    out.logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_context_aware_prompt_tuning(tiny, tokens):
    peft = pytest.importorskip("peft")
    prompt = {"cpt_token_ids": [0, 1, 2, 3], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}
    model = peft.get_peft_model(tiny().float(), peft.CPTConfig(task_type="CAUSAL_LM", **prompt)).train()
    ids = tokens(2, 9)
    ones = torch.ones_like(ids)
    loss = model(input_ids=ids, attention_mask=ones, labels=ids, input_type_mask=4 * ones).loss
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_prefix_tuning_is_refused(tiny, tokens):
    peft = pytest.importorskip("peft")
    shape = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 2, "num_virtual_tokens": 3}
    model = peft.get_peft_model(tiny().float(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", **shape))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache, not a StateCache\. .* use LoRA"):
            call(input_ids=tokens(1, 5))


def test_caches_of_transformers_are_refused(tiny, tokens):
    model, ids = tiny(), tokens(1, 5)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache, not a StateCache\. Leave it out"):
            call(input_ids=ids, past_key_values=DynamicCache(config=model.config))


def test_a_config_may_ask_for_tuples(tiny, tokens):
    model, ids = tiny(), tokens(1, 5)
    expected = model(ids, labels=ids)
    model.config.return_dict = False
    loss, logits, cache = model(ids, labels=ids)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits) and cache.seen == 5
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > 5


def test_continuous_batching_is_refused(tiny):
    with pytest.raises(NotImplementedError, match=r"generate_batch .* Call generate"):
        tiny().generate_batch([[1, 2, 3], [4]])


def test_unsupported_arguments_are_refused(tiny, tokens):
    for argument in ("output_attentions", "token_type_ids"):
        with pytest.raises(TypeError, match=r"gives no attention weights|takes no token_type_ids"):
            tiny()(tokens(1, 3), **{argument: True})


def test_chosen_logits(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    logits = model(ids).logits
    for chosen, same in ((2, [7, 8]), (torch.tensor([1, 5]), [1, 5])):
        torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, logits[:, same])
        late = model.train()(inputs_embeds=model.get_input_embeddings()(ids), labels=ids, logits_to_keep=chosen)
        torch.testing.assert_close(late.logits, logits[:, same])


def test_a_config_with_nested_options_survives_json(tmp_path):
    config = GLALMConfig(layers="2*gla+attention", gla={"short_conv": 4}, attention={"window": 9}, num_hidden_layers=3)
    config.save_pretrained(tmp_path)
    for loaded in (
        GLALMConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        GLALMConfig.from_dict(config.to_dict()),
        GLALMConfig.from_json_file(tmp_path / "config.json"),
    ):
        origin = {"transformers_version": None, "_name_or_path": None}
        assert type(loaded) is GLALMConfig and loaded.to_dict() | origin == config.to_dict() | origin
        assert loaded.gla.short_conv == 4 and loaded.attention.window == 9  # dataclasses, not mappings
        assert loaded.layer_mixers() == ["gla", "gla", "attention"]
    assert json.loads(config.to_json_string())["gla"]["short_conv"] == 4


def test_unknown_keys_are_kept_and_misspelt_ones_refused(saved, tokens):
    _, folder = saved()
    tree = json.loads((folder / "config.json").read_text())

    def load(**keys):
        (folder / "config.json").write_text(json.dumps(tree | keys))
        return AutoModelForCausalLM.from_pretrained(folder)

    assert load(some_other_tool={"run": 3}, id2label={"0": "a"}).config.some_other_tool == {"run": 3}
    with pytest.raises(ValueError, match="unknown key hiden_size; did you mean hidden_size"):
        load(hiden_size=64)
    for name, ours in (("num_layers", "num_hidden_layers"), ("d_model", "hidden_size"), ("n_head", "num_heads")):
        with pytest.raises(ValueError, match=f"unknown key {name}; did you mean {ours}"):
            load(**{name: 2})
    with pytest.raises(ValueError, match=r"unknown key model.gla.shortconv; did you mean model.gla.short_conv"):
        load(gla={"shortconv": 4})
    with pytest.raises(ValueError, match=r"model.num_heads=5 does not divide"):
        load(num_heads=5)


def test_options_may_be_changed_in_loading(tiny, tokens, tmp_path):
    model, ids = tiny(gla={"short_conv": 3}).float(), tokens(1, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gla={"min_log_gate": -0.01}, use_cache=False)
    assert loaded.config.gla == GLAOptions(short_conv=3, min_log_gate=-0.01) and not loaded.config.use_cache
    model.config.gla.min_log_gate = -0.01
    clamped = GLALMForCausalLM(model.config).eval()
    clamped.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(ids).logits, clamped(ids).logits)
    with pytest.raises(ValueError, match=r"model.num_heads=3 does not divide"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_heads=3)


def test_mappings_may_be_assigned_to_a_config(tiny):
    config = tiny().config
    config.update({"gla": {"short_conv": 3}, "num_hidden_layers": 1})
    config.attention = {"window": 9}
    assert config.gla == GLAOptions(short_conv=3) and config.attention.window == 9
    assert GLALMForCausalLM(config).model.layers[0].attn.conv is not None
    with pytest.raises(ValueError, match=r"unknown key model.gla.shortconv; did you mean model.gla.short_conv"):
        config.gla = {"shortconv": 3}
    config.num_heads = 5
    with pytest.raises(ValueError, match=r"model.num_heads=5 does not divide"):
        GLALMForCausalLM(config)


def test_what_trl_reads_of_a_config(saved):
    model, folder = saved()
    assert AutoConfig.from_pretrained(folder).auto_map == {}
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert model.config.architectures == ["GLALMForCausalLM"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_fsdp_plan_names_all_modules_with_weights(tied, tiny):
    model = tiny(tie_word_embeddings=tied)
    covered = [re.compile(re.escape(key).replace(r"\*", r"\d+") + r"\.") for key in model.fsdp_plan]
    assert all(any(key.match(name) for key in covered) for name, _ in model.named_parameters())
    names = [name + "." for name, _ in model.named_modules()]
    assert all(any(key.fullmatch(name) for name in names) for key in covered)


def write_distributed_checkpoint(model: GLALMForCausalLM, folder, **more: torch.Tensor) -> None:
    """Write what save_pretrained(distributed_checkpoint=True) does, which needs several processes, by its writer."""
    pytest.importorskip("transformers.distributed.checkpoint", reason="transformers 5.17 writes it and cannot read it")
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    model.config.save_pretrained(folder)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    dcp.save(weights | more, storage_writer=writer, no_dist=True)


@pytest.mark.parametrize("tied", [False, True])
def test_distributed_checkpoints(tied, tiny, tokens, tmp_path):
    model, ids = tiny(tie_word_embeddings=tied).float(), tokens(1, 9)
    write_distributed_checkpoint(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embeddings.weight) == tied
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    other = tiny(seed=1, tie_word_embeddings=tied).float()
    other.save_pretrained(tmp_path, max_shard_size="10KB")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, other(ids).logits)


def test_distributed_checkpoints_that_do_not_fit_are_refused(tiny, tmp_path):
    model = tiny().float()
    write_distributed_checkpoint(model, tmp_path / "more", other=torch.ones(3))
    with pytest.raises(ValueError, match="has weights that the config has no place for: other"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    write_distributed_checkpoint(model, tmp_path / "part")
    parts = [str(path) for path in (tmp_path / "part").glob("shard-*")]
    larger = tiny(vocab_size=60).float()
    with pytest.raises(ValueError, match=r"has 1600 of the 1920 numbers of .*: one of its files .* is missing"):
        check_distributed_parts(tmp_path / "part", parts, larger)


def test_a_checkpoint_runs_no_code(saved, tokens):
    """Its modules, generation code and kernels are ignored, also with trust_remote_code=True."""
    model, folder = saved()
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('ran')")
    tree = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    tree |= {"auto_map": auto_map, "attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    tree |= {"transformers_weights": "adapter_model.bin"}
    torch.save({name: torch.zeros_like(w) for name, w in model.state_dict().items()}, folder / "adapter_model.bin")
    (folder / "config.json").write_text(json.dumps(tree))
    for cls in (AutoModelForCausalLM, GLALMForCausalLM):
        for trust in (None, False, True):
            loaded = cls.from_pretrained(folder, trust_remote_code=trust)
            assert type(loaded) is GLALMForCausalLM and loaded.config._attn_implementation != "someone/kernel"
            ids, settings = tokens(1, 4), {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


def test_pickles_are_refused(saved):
    model, folder = saved()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for cls in (AutoModelForCausalLM, GLALMForCausalLM, GLALMModel):
        with pytest.raises(ValueError, match=r"found only pytorch_model.bin: pickles"):
            cls.from_pretrained(folder)
    with pytest.raises(ValueError, match="use_safetensors=False would read a pickle"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"must hold weights as model.safetensors .*; found none"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_broken_files_are_named(tiny, tmp_path):
    tiny().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for broken in (whole[:-100], whole[:5], b"<html>not found</html>", b""):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{shard.name} is cut short or no safetensors file"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 3}, r"lacks model.layers.2.attn.g_norm_swish_gate.weight.* and \d+ more"),
        ({"num_hidden_layers": 1}, r"has weights that the config has no place for: model.layers.1"),
        ({"vocab_size": 60}, r"of another shape than the config's: lm_head.weight is \[50, 32\], not \[60, 32\]"),
        ({"gla": {"output_gate": False}}, r"no place for: model.layers.0.attn.g_norm_swish_gate.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(change, message, saved):
    _, folder = saved()
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | change))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert all(p.isfinite().all() for p in loaded.parameters())
