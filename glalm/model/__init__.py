"""The decoder: one skeleton, a token mixer by name."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from glalm.model.cache import StateCache
from glalm.model.config import GLALMConfig
from glalm.model.lm import GLALMForCausalLM, GLALMModel

AutoConfig.register(GLALMConfig.model_type, GLALMConfig, exist_ok=True)
AutoModel.register(GLALMConfig, GLALMModel, exist_ok=True)
AutoModelForCausalLM.register(GLALMConfig, GLALMForCausalLM, exist_ok=True)

__all__ = ["GLALMConfig", "GLALMForCausalLM", "GLALMModel", "StateCache"]
