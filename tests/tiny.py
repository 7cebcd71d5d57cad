"""Small models with weights far from their initial ones, for tests of the model."""

from functools import cache
from itertools import product

import torch

from engram_lm.config import FusionConfig, MemoryConfig
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import Specification
from engram_lm.model import EngramLMConfig, EngramLMForCausalLM
from engram_lm.train.optimizers import Optimizers

VOCABULARY = 97

DECODERS = {
    f"streams{streams}-{'conv' if conv else 'noconv'}-N{longest}": (streams, conv, longest - 1)
    for streams, conv, longest in product([1, 4], [True, False], [3, 4])
}
"""Arguments of trained_model for the eight models that decoding is tested on."""

PAIRED = ("streams1-conv-N3", "streams1-noconv-N4", "streams4-conv-N4", "streams4-noconv-N3")
"""Four in which any two settings meet."""


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


def phrases(sequences: int, tokens: int, seed: int) -> torch.Tensor:
    """Ids of a text made of 20 set phrases: what comes next is decided by the last few ids."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(4, 8, (20,), generator=generator).tolist()
    known = [torch.randint(2, 22, (length,), generator=generator) for length in lengths]
    generator.manual_seed(seed)
    order = torch.randint(20, (sequences * tokens,), generator=generator).tolist()
    text = torch.cat([known[i] for i in order])
    return text[: sequences * tokens].view(sequences, tokens)


@cache
@torch.enable_grad()
def trained_model(*args, steps: int = 20, **kwargs) -> EngramLMForCausalLM:
    """tiny_model after some steps on `phrases`: confident, and every part of it in use.

    One object for all who ask: leave it as it was.
    """
    # Twenty rounds of normalising the streams' mix would be most of the work of a model this small.
    model = tiny_model(*args, **{"hc_sinkhorn_iters": 4, **kwargs}).train()
    optimizers = Optimizers(model, lr=0.01, table_lr_multiplier=5, weight_decay=0.0)
    for step in range(steps):
        ids = phrases(8, 40, seed=step)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizers.clip(1.0)
        optimizers.step()
        optimizers.zero_grad()
    return model.eval()
