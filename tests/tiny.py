"""Small models with weights far from their initial ones, for tests of the model."""

import torch

from engram_lm.config import FusionConfig, MemoryConfig
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import Specification
from engram_lm.model import EngramLMConfig, EngramLMForCausalLM

VOCABULARY = 97


def canonical_map(seed: int = 0) -> CanonicalMap:
    generator = torch.Generator().manual_seed(seed)
    return CanonicalMap(torch.randint(0, 60, (VOCABULARY,), generator=generator))


def tiny_config(
    streams: int = 1, conv: bool = True, orders: int = 2, boundary: str = "document", **changes
) -> EngramLMConfig:
    specification = Specification(
        layers=(0, 2), rows_per_head=(50,) * orders, heads=2, pad_id=1, boundary_rule=boundary
    )
    memory = MemoryConfig(
        specification=specification,
        head_dim=8,
        fusion=FusionConfig(conv_kernel=4 if conv else None),
    )
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "shared_intermediate_size": 24,
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_attention_heads": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "eos_token_id": None,
        "bos_token_id": None,
        "streams": streams,
        "memory": memory.to_dict(),
    }
    return EngramLMConfig(**{**sizes, **changes})


def tiny_model(*args, **kwargs) -> EngramLMForCausalLM:
    """As after training: value, conv, keys and norms are all far from zero and one."""
    torch.manual_seed(1)
    model = EngramLMForCausalLM(tiny_config(*args, **kwargs))
    if model.config.memory is not None:
        model.set_canonical_map(canonical_map())
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()
