"""A transformers model with a memory. Importing it registers the classes with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from engram_lm.model.attached import AttachedConfig, AttachedForCausalLM
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.modeling import EngramLMForCausalLM, EngramLMModel

AutoConfig.register(EngramLMConfig.model_type, EngramLMConfig)
AutoConfig.register(AttachedConfig.model_type, AttachedConfig)
AutoModel.register(EngramLMConfig, EngramLMModel)
AutoModelForCausalLM.register(EngramLMConfig, EngramLMForCausalLM)

__all__ = [
    "AttachedConfig",
    "AttachedForCausalLM",
    "EngramLMConfig",
    "EngramLMForCausalLM",
    "EngramLMModel",
]
