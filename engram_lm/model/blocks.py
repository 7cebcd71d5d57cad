"""The ledger's parameters and FLOPs block by block: what is computed before a layer needs its rows.

Table rows are in no block, because no block computes with more than those it has waited for.
"""

from typing import NamedTuple

from engram_lm.model.budget import ledger
from engram_lm.model.config import EngramLMConfig

EVERY = ("attention", "mHC", "norms")
SPARSE = ("shared expert", "routed experts active", "routed experts inactive", "router")
MEMORY = ("Engram projections", "Engram conv", "Engram norms and biases")


class Block(NamedTuple):
    """One decoder layer. flops: forward, for one token, counted as in the ledger."""

    parameters: int
    flops: int


def blocks(config: EngramLMConfig, context: int) -> tuple[Block, ...]:
    """Every decoder layer in order; head, embedding and the norm at the end are in none."""
    counted = ledger(config, context)
    S, D = config.streams, config.hidden_size
    kinds = config.mlp_layer_types or []
    memory = config.memory_config
    reading = () if memory is None else memory.specification.layers
    # What stands once behind all blocks: the last norm, and the mix of the streams before the head.
    last = {"norms": Block(D, 0)}
    if S > 1:
        last["mHC"] = Block(S * S * D + S + 1, 2 * S * S * D)

    def share(names: tuple[str, ...], layers: int) -> Block:
        parameters = flops = 0
        for name in names:
            component, outside = counted[name], last.get(name, Block(0, 0))
            parameters += component.total - outside.parameters
            flops += component.flops - outside.flops
        assert parameters % layers == 0 and flops % layers == 0
        return Block(parameters // layers, flops // layers)

    found = []
    for layer, kind in enumerate(kinds):
        parts = [share(EVERY, len(kinds))]
        parts.append(share(SPARSE if kind == "sparse" else ("dense FFN",), kinds.count(kind)))
        if layer in reading:
            parts.append(share(MEMORY, len(reading)))
        found.append(Block(sum(p.parameters for p in parts), sum(p.flops for p in parts)))
    return tuple(found)
