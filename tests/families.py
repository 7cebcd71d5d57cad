"""Small random decoders of transformers' own families, bare and with a memory attached."""

from functools import cache

import torch
import transformers
from tiny import VOCABULARY, canonical_map

import engram_lm
from engram_lm import FusionConfig, MemoryConfig, Specification

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOW = {"sliding_window": 6}

FAMILIES = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", _EXPERTS),
    "mistral": ("Mistral", _WINDOW),
    "gemma3": (
        "Gemma3",
        _WINDOW | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    ),
    "gpt_neox": ("GPTNeoX", {}),
    "olmo2": ("Olmo2", {}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
    ),
}
"""Plain attention, experts, sliding windows (Mistral, Gemma 3), latent attention, and a hybrid."""


def memory(conv: bool = True, boundary: str = "document") -> MemoryConfig:
    specification = Specification(
        layers=(0, 2), rows_per_head=(50, 50), heads=2, pad_id=1, boundary_rule=boundary
    )
    fusion = FusionConfig(conv_kernel=4 if conv else None)
    return MemoryConfig(specification=specification, head_dim=8, fusion=fusion)


def bare(family: str, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """With weights large enough for every part to matter."""
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}{'Text' * (family == 'gemma3')}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{**_SIZES, **sizes, **changes}))
    for key, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "norm" not in key:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def attached(family: str, seed: int = 0, *, conv: bool = True, boundary="document", **changes):
    """With a memory as after training: value, convolution, keys and norms far from their start."""
    model = bare(family, seed, **changes)
    engram_lm.attach(model, canonical_map(), memory(conv, boundary))
    speak(model)
    return model


def speak(model) -> None:
    """Draws every parameter of a memory anew."""
    for key, parameter in model.named_parameters():
        if ".engram." in key or ".tables." in key:
            if "norm" in key:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.3)


@cache
def shared(family: str, **options):
    """One object for all who ask: leave it as it was."""
    return attached(family, **options)
