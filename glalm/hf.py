"""The transformers face of the models. Importing this module registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from glalm.model.cache import StateCache
from glalm.model.decoder import GLALMForCausalLM, GLALMModel
from glalm.model.hf_config import GLALMConfig

__all__ = ["GLALMConfig", "GLALMForCausalLM", "GLALMModel", "StateCache"]

# The model types of config.json that glalm reads: its own, and those of published GLA, RetNet and Transformer++ models.
MODEL_TYPES = ("glalm", "gla", "retnet", "transformer")

AutoConfig.register(GLALMConfig.model_type, GLALMConfig, exist_ok=True)
for model_type in MODEL_TYPES:
    if model_type not in CONFIG_MAPPING:  # flash-linear-attention registers its own, where it is imported too
        CONFIG_MAPPING.register(model_type, GLALMConfig)
AutoModel.register(GLALMConfig, GLALMModel, exist_ok=True)
AutoModelForCausalLM.register(GLALMConfig, GLALMForCausalLM, exist_ok=True)
# Trainer's label smoothing shifts the labels only for model classes that this table names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GLALMConfig.model_type] = GLALMForCausalLM.__name__
