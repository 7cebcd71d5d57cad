"""How long the blocks of a step compute: the slower of multiplying and reading weights.

Everything is arithmetic on a backbone and a node; nothing is measured here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from engram_lm.errors import ConfigError
from engram_lm.model.blocks import blocks
from engram_lm.model.budget import ledger
from engram_lm.model.config import EngramLMConfig


class BlockWork(NamedTuple):
    """What one block, or the head, does in a step."""

    flops: float
    """For one token."""
    weights: float
    """Bytes of weights that every step reads."""
    expert: float = 0.0
    """Bytes of one routed expert; those are read that a token of the step chooses."""
    experts: int = 0
    chosen: int = 0
    """Experts of one token."""

    def read(self, tokens: int) -> float:
        """Bytes of weights that so many tokens read, expected where they choose as if at random."""
        if not self.experts:
            return self.weights
        idle = (1 - self.chosen / self.experts) ** tokens
        return self.weights + self.experts * (1 - idle) * self.expert


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The blocks in order, and the head, which works for tokens that are sampled."""

    blocks: tuple[BlockWork, ...]
    head: BlockWork
    prompt_blocks: int
    """Blocks that a token of a prompt passes: the first so many."""

    @classmethod
    def of(cls, config: EngramLMConfig, context: int, weight_bytes: int = 2) -> "Backbone":
        """A model's, from its ledger, each token attending to `context` others."""
        counted, kinds = ledger(config, context), config.mlp_layer_types or []
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        found = []
        for block, kind in zip(blocks(config, context), kinds, strict=True):
            routed = config.n_routed_experts if kind == "sparse" else 0
            found.append(
                BlockWork(
                    flops=block.flops,
                    weights=weight_bytes * (block.parameters - routed * expert),
                    expert=weight_bytes * expert,
                    experts=routed,
                    chosen=(config.num_experts_per_tok or 0) if routed else 0,
                )
            )
        head = counted["LM head"].flops
        return cls(
            blocks=tuple(found),
            head=BlockWork(flops=head, weights=weight_bytes * head / 2),
            prompt_blocks=len(found),
        )


def deepseek_v41() -> Backbone:
    """DeepSeek-V4.1-Flash's: 40 blocks of 384 fp4 experts of 18.8 MB and top 6, 18 GB besides; 16B
    parameters active for a token that is generated, 8B for one of a prompt, which passes the first
    half of the blocks. Attention to the context is not in it: it is sparse."""
    each = 16e9 / 40
    head = BlockWork(flops=2 * 129_280 * 5_120, weights=2 * 129_280 * 5_120)
    block = BlockWork(
        flops=2 * each, weights=(18e9 - 2 * head.weights) / 40, expert=18.8e6, experts=384, chosen=6
    )
    return Backbone(blocks=(block,) * 40, head=head, prompt_blocks=20)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine that serves. Defaults: 8 H200 as one. Raises ConfigError."""

    flops: float = 8 * 989e12
    """At most, in the dtype of the blocks' products: bfloat16, in which H200 do fp4 ones."""
    utilisation: float = 0.35
    """Share of it that the blocks reach."""
    bandwidth: float = 8 * 4.8e12
    """Bytes of weights a second, at most."""
    streaming: float = 0.6
    """Share of it that the blocks reach."""
    overhead: float = 5e-5
    """Seconds of a block beside its work: launches, and all-reduces over eight GPUs."""
    taken: float = 0.0
    """Seconds that compute loses for each CPU second of reading rows; 0 where GPUs compute."""
    dollars_hour: float = 24.0
    """Of the node without what its tiers cost."""

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"node.{name}={getattr(self, name)}: above 0")
        for name in ("utilisation", "streaming"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"node.{name}={getattr(self, name)}: a share above 0 up to 1")
        for name in ("overhead", "dollars_hour"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"node.{name}={getattr(self, name)}: 0 or more")
        if not 0 <= self.taken <= 1:
            raise ConfigError(f"node.taken={self.taken}: seconds from 0 to 1")

    def seconds(self, work: BlockWork, tokens: int) -> float:
        """Of one block of a step."""
        if not tokens:
            return 0.0
        multiplying = tokens * work.flops / (self.flops * self.utilisation)
        reading = work.read(tokens) / (self.bandwidth * self.streaming)
        return max(multiplying, reading) + self.overhead

    def compute(
        self, backbone: Backbone, layers: Sequence[int], prompt: int, decode: int, sampled: int
    ) -> list[float]:
        """Seconds before each of these layers, and after the last, of a step with so many tokens of
        prompts, of continuations, and so many that it samples."""
        both = backbone.prompt_blocks
        shared = prompt + decode
        times = [
            self.seconds(work, shared if index < both else decode)
            for index, work in enumerate(backbone.blocks)
        ]
        bounds = [0, *layers, len(times)]
        found = [sum(times[a:b]) for a, b in pairwise(bounds)]
        found[-1] += self.seconds(backbone.head, sampled)
        return found
