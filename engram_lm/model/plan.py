"""What training a model with sharded tables takes on many workers: memory, traffic, time.

Arithmetic on the configuration, a frequency profile and the machines; nothing is allocated.
docs/scaling.md has every formula with its symbols. What is assumed is a field with a default, so
that it can be said beside the result and changed.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError
from engram_lm.model.blocks import Block, blocks
from engram_lm.model.budget import Ledger, ledger
from engram_lm.model.cluster import Cluster, Job, RowState
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.row_profile import Profile
from engram_lm.model.traffic import Exchange, exchanges, expected, owned
from engram_lm.model.units import size_text, time_text


class Waits(NamedTuple):
    """Seconds of one pass."""

    compute: float
    before: dict[int, float]
    """Layer -> forward compute until it needs its rows."""
    arrive: dict[int, float]
    """Layer -> when its rows are there, counted from the start of the pass."""
    rows: float
    """That the forward pass waits for rows."""
    gradients: float
    """That the backward pass is longer by the exchange of row gradients."""
    backbone: float
    """That the links are longer busy, with the backbone's parameters, than compute takes."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a plan takes from a configuration, and the same for every cluster."""

    memory: MemoryConfig
    rows: dict[int, int]
    """Layer -> rows of its table."""
    ledger: Ledger
    blocks: tuple[Block, ...]
    stream_values: int
    """Of all residual streams, for one token."""

    @classmethod
    def of(cls, config: EngramLMConfig, context: int) -> "Sizes":
        """ConfigError for a model without memory."""
        memory = config.memory_config
        if memory is None:
            raise ConfigError("memory=None: a model without memory has no rows to plan for")
        specification = memory.specification
        return cls(
            memory=memory,
            rows={layer: specification.table_rows(layer) for layer in specification.layers},
            ledger=ledger(config, context),
            blocks=blocks(config, context),
            stream_values=config.streams * config.hidden_size,
        )

    @property
    def dense(self) -> int:
        """Parameters that are no table rows."""
        return self.ledger.parameters - self.ledger.tables

    @property
    def dense_moments(self) -> int:
        """Bytes of their moments: float32, Muon one and Adam two."""
        return self.ledger.optimizer_bytes - 8 * self.ledger.tables


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One model on one cluster. Raises ConfigError where workers would have no tokens."""

    sizes: Sizes
    profile: Profile
    cluster: Cluster
    job: Job

    def __post_init__(self) -> None:
        if self.cluster.workers > self.sequences:
            raise ConfigError(
                f"workers={self.cluster.workers}: a step has {self.sequences} sequences of "
                f"{self.job.context} tokens, and every worker needs one"
            )

    @property
    def passes(self) -> int:
        """Forward and backward passes of a step, whose gradients are accumulated."""
        sequences = -(-self.job.tokens // (self.job.context * self.cluster.workers))
        return -(-sequences // self.job.sequences)

    @property
    def pass_tokens(self) -> float:
        """Tokens that a worker has in one pass: the mean over workers and passes."""
        return self.job.tokens / (self.cluster.workers * self.passes)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest pass."""
        context, shares = self.job.context, self.cluster.workers * self.passes
        return context * -(-self.job.tokens // (context * shares))

    @property
    def shard(self) -> dict[int, int]:
        """Layer -> rows of the largest shard, the first worker's."""
        return {
            layer: owned(rows, self.cluster.workers)[0][1]
            for layer, rows in self.sizes.rows.items()
        }

    @property
    def state(self) -> RowState:
        return self.job.state

    def exchanges(self, *, merged: bool = True) -> dict[int, tuple[Exchange, ...]]:
        """Layer -> the All-to-Alls of one pass; not merged, every request is sent."""
        memory, workers = self.sizes.memory, self.cluster.workers
        specification, dim = memory.specification, memory.head_dim
        rows_LH = self.profile.distinct(self.pass_tokens)
        if not merged:
            rows_LH = rows_LH * 0 + self.pass_tokens
        found = {}
        for layer, rows_H in zip(specification.layers, rows_LH, strict=True):
            primes_H = [prime for order in specification.primes[layer] for prime in order]
            load = expected(rows_H, primes_H, self.sizes.rows[layer], workers)
            found[layer] = exchanges(
                load, workers, dim * self.state.weight, dim * self.state.gradient
            )
        return found

    @cached_property
    def memory(self) -> dict[str, float]:
        """What is kept -> bytes; activations within a block and the logits are not among it."""
        state, sizes, job = self.state, self.sizes, self.job
        shard, dim = sum(self.shard.values()), sizes.memory.head_dim
        sharded = job.backbone == "fully_shard" and self.cluster.workers > 1
        parts = self.cluster.workers if sharded else 1
        gathered = 0
        if sharded:
            # The root's own parameters, the block at work, its gradients, the block gathered ahead.
            each = [block.parameters for block in sizes.blocks]
            gathered = sizes.dense - sum(each) + 3 * max(each)
        vectors = len(sizes.rows) * self.most_tokens * sizes.memory.memory_dim
        return {
            "table rows": shard * dim * state.weight,
            "row moments": shard * (dim * state.moments + state.row),
            "row gradients": self._gradient_rows * (dim * state.gradient + 8),
            "backbone weights": 4 * sizes.dense / parts,
            # Accumulated whole on every worker, and scattered in the last pass of the step.
            "backbone gradients": 4 * sizes.dense / (parts if self.passes == 1 else 1),
            "backbone moments": sizes.dense_moments / parts,
            "blocks gathered": 4 * gathered,
            "vectors read": vectors * state.weight,
            "block inputs": 4 * len(sizes.blocks) * self.most_tokens * sizes.stream_values,
        }

    @property
    def _gradient_rows(self) -> float:
        """Rows with a gradient on the busiest owner at the end of a step, at most."""
        rows = 0.0
        for layer, (_, ids, *_) in self.exchanges().items():
            share = ids.busiest_bytes / 8 + ids.bytes / 8 / self.cluster.workers
            rows += min(self.passes * share, self.shard[layer])
        return rows

    @cached_property
    def waits(self) -> Waits:
        """One pass: compute, and what it waits for."""
        cluster, tokens = self.cluster, self.pass_tokens
        speed = cluster.flops * cluster.utilisation
        seconds = {
            layer: [
                exchange.seconds(cluster.workers, cluster.link, cluster.latency)
                for exchange in found
            ]
            for layer, found in self.exchanges().items()
        }
        before = {
            layer: tokens * sum(block.flops for block in self.sizes.blocks[:layer]) / speed
            for layer in seconds
        }
        arrive: dict[int, float] = {}
        waited = sent = 0.0
        for layer, (counts, ids, rows, _) in seconds.items():
            sent += counts + ids + rows
            arrive[layer] = sent
            waited += max(0.0, sent - before[layer] - waited)
        # Backward comes to the last layer first; what is below it takes three times its forward.
        over = -math.inf
        for layer in reversed(seconds):
            over = max(over, -3 * before[layer]) + seconds[layer][-1]
        # Forward, forward again for what was not kept, and a backward of twice that; all wait for
        # the worker with most tokens.
        compute = 4 * self.most_tokens * self.sizes.ledger.flops / speed
        gradients = sum(each[-1] for each in seconds.values())
        busy = sent + gradients + self.backbone_bytes / cluster.link
        return Waits(compute, before, arrive, waited, max(0.0, over), max(0.0, busy - compute))

    @property
    def backbone_bytes(self) -> float:
        """Through a worker's link in a pass, each way: float32, without tables; the mean of a step.

        fully_shard gathers parameters for the forward and for the backward of each pass. Gradients
        are reduced once a step: a scatter, and under ddp a gather behind it.
        """
        sharded = self.job.backbone == "fully_shard"
        times = 2 + 1 / self.passes if sharded else 2 / self.passes
        return times * 4 * self.sizes.dense * (self.cluster.workers - 1) / self.cluster.workers

    @property
    def step_seconds(self) -> float:
        waits = self.waits
        longest = waits.compute + max(waits.rows + waits.gradients, waits.backbone)
        return self.passes * longest

    @property
    def checkpoint_bytes(self) -> int:
        """All parameters and moments."""
        dim, sizes = self.sizes.memory.head_dim, self.sizes
        rows = sum(self.state.bytes(rows, dim) for rows in sizes.rows.values())
        return rows + 4 * sizes.dense + sizes.dense_moments

    @property
    def checkpoint_seconds(self) -> float:
        return self.checkpoint_bytes / self.cluster.disk

    @property
    def strain(self) -> dict[str, float]:
        """What is asked over what there is; more than 1 breaks."""
        slack, waits = self.job.slack, self.waits
        return {
            "memory": sum(self.memory.values()) / (self.cluster.memory * (1 - self.job.free)),
            "rows": (waits.rows + waits.gradients) / (slack * waits.compute),
            "backbone": waits.backbone / (slack * waits.compute),
            "checkpoint": self.checkpoint_seconds / (slack * self.job.every),
        }

    def on(self, workers: int) -> "Plan":
        """The same on another number of workers."""
        return replace(self, cluster=replace(self.cluster, workers=workers))

    @cached_property
    def fewest(self) -> int | None:
        """The fewest workers on which memory suffices; None where it does not on the most."""
        if self.on(self.sequences).strain["memory"] > 1:
            return None
        return next(n for n in count(1) if self.on(n).strain["memory"] <= 1)

    @cached_property
    def late(self) -> int | None:
        """From about how many workers on rows come too late; None where they never do."""
        low, high = 0, self.sequences
        if self.on(high).strain["rows"] <= 1:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.on(middle).strain["rows"] > 1 else (middle, high)
        return high

    @property
    def sequences(self) -> int:
        """Of a step, and so the most workers there can be."""
        return self.job.tokens // self.job.context

    def to_dict(self) -> dict[str, Any]:
        """Bytes are bytes, times are seconds; those of a pass are of the worker with most."""
        waits = self.waits
        return {
            "workers": self.cluster.workers,
            "passes": self.passes,
            "pass_tokens": self.pass_tokens,
            "rows": {str(layer): rows for layer, rows in self.shard.items()},
            "row_bytes": self.sizes.memory.head_dim * self.state.weight,
            "memory": self.memory,
            "merged": _plain(self.exchanges()),
            "unmerged": _plain(self.exchanges(merged=False)),
            "before": {str(layer): seconds for layer, seconds in waits.before.items()},
            "arrive": {str(layer): seconds for layer, seconds in waits.arrive.items()},
            "pass_seconds": waits.compute,
            "waits": {
                "rows": waits.rows,
                "gradients": waits.gradients,
                "backbone": waits.backbone,
            },
            "backbone_bytes": self.backbone_bytes,
            "step_seconds": self.step_seconds,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_seconds": self.checkpoint_seconds,
            "strain": self.strain,
            "fewest_workers": self.fewest,
            "late_workers": self.late,
            "verdict": self.verdict,
        }

    @property
    def verdict(self) -> str:
        """One sentence: what breaks first, or comes nearest to it.

        Memory that does not suffice is first whatever else breaks: nothing runs then.
        """
        first = max(self.strain, key=self.strain.__getitem__)
        first = "memory" if self.strain["memory"] > 1 else first
        strain, waits, job = self.strain[first], self.waits, self.job
        saying = {
            "memory": (
                f"memory: {size_text(sum(self.memory.values()))} where "
                f"{size_text(self.cluster.memory * (1 - job.free))} may be used"
            ),
            "rows": (
                f"the links, by table rows: {time_text(waits.rows + waits.gradients)} of waiting "
                f"in a pass of {time_text(waits.compute)}"
            ),
            "backbone": (
                f"the links, by the backbone's parameters ({job.backbone}): busy "
                f"{time_text(waits.backbone)} longer than a pass of {time_text(waits.compute)}"
            ),
            "checkpoint": (
                f"the checkpoint: {time_text(self.checkpoint_seconds)} of writing every "
                f"{time_text(job.every)}"
            ),
        }[first]
        breaks = "breaks first is" if strain > 1 else "is nearest to breaking, and holds, is"
        return f"On {self.cluster.workers:,} workers what {breaks} {saying}."


def _plain(layers: dict[int, tuple[Exchange, ...]]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        str(layer): {
            exchange.name: {
                "bytes": exchange.bytes,
                "link_bytes": exchange.link_bytes,
                "busiest_bytes": exchange.busiest_bytes,
                "messages": exchange.messages,
            }
            for exchange in found
        }
        for layer, found in layers.items()
    }
