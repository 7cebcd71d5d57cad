"""Whole models by name. Presets are functions; a variant is a changed copy of what they return."""

import copy
from dataclasses import replace
from typing import Any

from engram_lm.config import MemoryConfig, paper
from engram_lm.errors import ConfigError, instance
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


def dense_4b() -> EngramLMConfig:
    """Dense-4B of arXiv 2601.07372; its FFN width, 12,288, is chosen to give the paper's 4.1B."""
    return _paper(intermediate_size=12_288, mlp_layer_types=["dense"] * 30)


def moe_27b() -> EngramLMConfig:
    """MoE-27B of the same: 2 shared and 72 routed experts in all blocks but the first."""
    return _paper_moe(72, None)


def engram_27b() -> EngramLMConfig:
    """Engram-27B: 17 experts of each block give way to 5.79B table values.

    As the paper has it, which leaves the projections on top of equal active parameters (0.9 %);
    `twin(moe_27b(), 0.743, paper())` is the same trade within 0.5 %.
    """
    return _paper_moe(55, paper())


def engram_40b() -> EngramLMConfig:
    """Engram-40B: the same with 7,239,680 rows per head, 18.53B table values."""
    memory = paper()
    specification = replace(memory.specification, rows_per_head=(7_239_680, 7_239_680))
    return _paper_moe(55, replace(memory, specification=specification))


def _paper_moe(experts: int, memory: MemoryConfig | None) -> EngramLMConfig:
    expert = 1_536  # 17 x 29 of them weigh what the tables and projections do
    return _paper(
        intermediate_size=10_240,
        mlp_layer_types=["dense"] + ["sparse"] * 29,
        moe_intermediate_size=expert,
        shared_intermediate_size=2 * expert,
        n_routed_experts=experts,
        num_experts_per_tok=6,
        memory=None if memory is None else memory.to_dict(),
    )


def _paper(**ffn: Any) -> EngramLMConfig:
    """The paper's appendix A, and where it is silent DeepSeek-V3: latent ranks but for queries,
    head widths, special token ids, an LM head of its own."""
    return EngramLMConfig(
        vocab_size=129_280,
        hidden_size=2_560,
        num_hidden_layers=30,
        num_attention_heads=32,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        streams=4,
        max_position_embeddings=4_096,
        rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"},
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        **ffn,
    )


PRESETS = {
    function.__name__.replace("_", "-"): function
    for function in (nano_moe, nano_engram, dense_4b, moe_27b, engram_27b, engram_40b)
}


def preset(name: str) -> EngramLMConfig:
    """By its function's name, with - or _ alike. ConfigError with the accepted names."""
    instance("preset", name, str)
    dashed = name.replace("_", "-")
    if dashed not in PRESETS:
        raise ConfigError(f"preset={name!r}: accepted are {', '.join(PRESETS)}")
    return PRESETS[dashed]()


def configure(config: EngramLMConfig, changes: dict[str, Any]) -> EngramLMConfig:
    """A configuration with some fields changed; `memory.head_dim` and the like reach inside.

    ConfigError on unknown fields and unfit values.
    """
    return EngramLMConfig.from_dict(changed(config.to_dict(), changes))


def changed(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration's plain values, with those that `changes` names by their dotted paths set."""
    record = copy.deepcopy(record)
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
    return record


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
