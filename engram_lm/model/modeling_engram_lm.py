"""Opens this model with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True).

The code of the model is not here but in the package engram-lm. After `import engram_lm` the model
opens without trust_remote_code, and this file is not run.
"""

try:
    from engram_lm.model import (
        AttachedConfig,
        AttachedForCausalLM,
        EngramLMConfig,
        EngramLMForCausalLM,
        EngramLMModel,
    )
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "engram_lm":
        raise
    raise ImportError("the code of this model is a package: pip install engram-lm") from error

__all__ = [
    "AttachedConfig",
    "AttachedForCausalLM",
    "EngramLMConfig",
    "EngramLMForCausalLM",
    "EngramLMModel",
]
