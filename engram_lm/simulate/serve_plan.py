"""What serving with tables in tiers comes to, beside the same load with rows that cost no time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_lm.simulate.compute_time import Backbone, Node
from engram_lm.simulate.outcome import Outcome
from engram_lm.simulate.row_trace import RowTrace, requests_of
from engram_lm.simulate.serving import Serving, Simulation
from engram_lm.simulate.tiers import Tier

HOURS = 3 * 365 * 24
"""That memory is written off in."""
FREE = Tier(name="free")


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests and how they come: `rate` a second, or `loop` of them always under way."""

    lengths: npt.NDArray[np.int64]
    """(requests, 2): tokens of prompt and continuation."""
    warm: int
    """Tokens at the start of the trace that were asked for before."""
    rate: float | None = None
    loop: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """One load on one node. `on` says what it comes to with tiers."""

    trace: RowTrace
    layers: tuple[int, ...]
    row_bytes: int
    table_rows: int
    """Of all layers: what the last tier holds."""
    backbone: Backbone
    node: Node
    serving: Serving
    load: Load

    def run(self, tiers: Sequence[Tier]) -> Outcome:
        """The load served once. ConfigError for tiers that do not stack."""
        simulation = Simulation(
            trace=self.trace,
            layers=self.layers,
            row_bytes=self.row_bytes,
            tiers=tiers,
            backbone=self.backbone,
            node=self.node,
            serving=self.serving,
        )
        load = self.load
        if tiers != [FREE]:
            simulation.warm(load.warm)
        requests = requests_of(load.lengths, first=load.warm, rate=load.rate, seed=load.seed)
        return simulation.run(requests, loop=load.loop)

    def on(self, tiers: Sequence[Tier], free: Outcome | None = None) -> dict[str, Any]:
        """What serving comes to. free: the outcome with FREE alone, where it is known already."""
        free = free or self.run([FREE])
        found = self.run(tiers)
        memory = self.dollars(tiers)
        hour = self.node.dollars_hour + memory / HOURS
        ratio = free.seconds / found.seconds
        cpu = sum(tier.cpu * found.reads[tier.name] for tier in tiers) / found.seconds
        busy = {**found.busy, "the CPU that gathers rows": cpu}
        busiest = max(busy, key=lambda name: busy[name])
        layer = max(found.waits, key=lambda layer: sum(found.waits[layer]))
        waited = found.waited / found.seconds
        where = f", most of it before layer {layer}" if waited else ""
        return {
            **found.to_dict(),
            "ratio": ratio,
            "memory_dollars": memory,
            "dollars_per_million": hour / 3600 / found.tokens_per_second * 1e6,
            "verdict": (
                f"{ratio:.1%} of the speed with rows that cost no time; {waited:.1%} of the time "
                f"waits for rows{where}; busiest is {busiest}, {busy[busiest]:.0%} of it."
            ),
        }

    def dollars(self, tiers: Sequence[Tier]) -> float:
        """What the bytes that rows take in each tier cost to buy."""
        table = self.table_rows * self.row_bytes
        return sum(tier.dollars * (tier.size or table) / 1e9 for tier in tiers)


def plain(tier: Tier) -> dict[str, Any]:
    """Its fields, None for what has no limit, as JSON knows no infinity."""
    return {name: None if value == inf else value for name, value in asdict(tier).items()}
