"""The decoder: one skeleton, a token mixer by name."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from glalm.model.cache import StateCache
from glalm.model.config import GLALMConfig
from glalm.model.lm import GLALMForCausalLM, GLALMModel

AutoConfig.register(GLALMConfig.model_type, GLALMConfig, exist_ok=True)
AutoModel.register(GLALMConfig, GLALMModel, exist_ok=True)
AutoModelForCausalLM.register(GLALMConfig, GLALMForCausalLM, exist_ok=True)
# Of a name that is not here, Trainer takes the labels as shifted already where it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GLALMConfig.model_type] = GLALMForCausalLM.__name__

__all__ = ["GLALMConfig", "GLALMForCausalLM", "GLALMModel", "StateCache"]
