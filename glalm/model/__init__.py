"""The decoder: one skeleton, a token mixer by name."""

from glalm.model.cache import StateCache
from glalm.model.config import GLALMConfig
from glalm.model.lm import GLALMForCausalLM, GLALMModel

__all__ = ["GLALMConfig", "GLALMForCausalLM", "GLALMModel", "StateCache"]
