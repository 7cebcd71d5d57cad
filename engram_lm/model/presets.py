"""Whole models by name. Presets are functions; a variant is a changed copy of what they return."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from engram_lm.errors import ConfigError
from engram_lm.memory.specification import Specification
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.twin import twin

RHO = 0.75
"""Share of sparse parameters that stays with experts: inside the paper's best range, 75-85 %."""


def nano_moe() -> EngramLMConfig:
    """The MoE of `engram demo`: 6 layers of width 128, 32 experts, 0.8M of 5.2M active."""
    return EngramLMConfig()


def nano_engram() -> EngramLMConfig:
    """Its twin of equal parameters and FLOPs: a quarter of the sparse ones are table rows."""
    return twin(nano_moe(), RHO)


PRESETS = {"nano-moe": nano_moe, "nano-engram": nano_engram}


def preset(name: str) -> EngramLMConfig:
    """ConfigError with the accepted names."""
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r}: accepted are {', '.join(PRESETS)}")
    return PRESETS[name]()


def configure(config: EngramLMConfig, changes: dict[str, Any]) -> EngramLMConfig:
    """A configuration with some fields changed; `memory.head_dim` and the like reach inside.

    ConfigError on unknown fields and unfit values.
    """
    record = config.to_dict()
    for key, value in changes.items():
        *path, name = key.split(".")
        place: Any = record
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            raise ConfigError(f"model.{key}={value!r}: no such field in this configuration")
        place[name] = value
    if any(key.startswith("memory.specification.") for key in changes):
        # Constants and hash follow from the rules that have just changed.
        rules = dict(record["memory"]["specification"])
        rules = {name: rules[name] for name in rules if name not in ("primes", "multipliers")}
        specification = Specification.from_dict(rules)
        record["memory"]["specification"] = specification.to_dict()
        record["memory"]["specification_sha256"] = specification.digest
    try:
        return EngramLMConfig.from_dict(record)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model: {reason}") from error


def for_vocabulary(
    config: EngramLMConfig, *, token_ids: int, separator_id: int, padding_id: int | None
) -> EngramLMConfig:
    """The same sizes with another vocabulary, for documents packed behind their separators.

    Before the start of a document stands the padding, or the separator where there is none;
    n-grams and the short convolution stop at document starts.
    """
    changes: dict[str, Any] = {
        "vocab_size": token_ids,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "pad_token_id": padding_id,
    }
    if config.memory is not None:
        changes["memory.specification.pad_id"] = separator_id if padding_id is None else padding_id
        changes["memory.specification.boundary_rule"] = "document"
    return configure(config, changes)
