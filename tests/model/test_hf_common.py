"""transformers' own common model and generation tests, run with our classes.

They come with its source, not with the package: TRANSFORMERS_SOURCE=folder of a checkout, or of its unpacked source
distribution (which lacks the generation tests), of the version that is installed. docs/transformers.md lists what
passes and why the rest does not apply.
"""

import os
import sys
import types
import unittest
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers.models.auto import modeling_auto

from glalm.hf import GLALMConfig, GLALMForCausalLM, GLALMModel

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if SOURCE is None:
    pytest.skip("needs TRANSFORMERS_SOURCE, a checkout of transformers", allow_module_level=True)


def common_tests(source: Path) -> tuple[type, type]:
    """ModelTesterMixin and GenerationTesterMixin. Under a name of its own: `tests` may be this folder's."""
    package = sys.modules["transformers_tests"] = types.ModuleType("transformers_tests")
    package.__path__ = [str(source / "tests")]
    for path, mixin in (
        ("exporters/test_export", "ExportTesterMixin"),
        ("generation/test_utils", "GenerationTesterMixin"),
    ):
        if not (source / "tests" / f"{path}.py").exists():  # It is missing in the source distribution.
            folder, name = (f"transformers_tests.{part}" for part in (path.split("/")[0], path.replace("/", ".")))
            sys.modules[folder], sys.modules[name] = types.ModuleType(folder), types.ModuleType(name)
            setattr(sys.modules[name], mixin, type(mixin, (), {}))
    common = import_module("transformers_tests.test_modeling_common")
    return common.ModelTesterMixin, common.GenerationTesterMixin


ModelTesterMixin, GenerationTesterMixin = common_tests(Path(SOURCE))
modeling_auto.MODEL_MAPPING_NAMES["glalm"] = "GLALMModel"  # The mixins find classes with a head here.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["glalm"] = "GLALMForCausalLM"


class Tester:
    """What the mixins ask of a model's tester."""

    batch_size, seq_length, is_training = 2, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 2, 99

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> GLALMConfig:
        shape = {n: getattr(self, n) for n in ("hidden_size", "num_hidden_layers", "vocab_size")}
        return GLALMConfig(num_heads=2, intermediate_size=48, pad_token_id=0, **shape, **self.parent.choice)

    def prepare_config_and_inputs_for_common(self) -> tuple[GLALMConfig, dict]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (GLALMModel, GLALMForCausalLM)
    has_attentions = False

    def setUp(self):
        self.model_tester = Tester(self)


class GLATest(Common, unittest.TestCase):
    choice: dict = {}  # noqa: RUF012


class HybridTest(Common, unittest.TestCase):
    choice = {"layers": "regla+attention"}  # noqa: RUF012
