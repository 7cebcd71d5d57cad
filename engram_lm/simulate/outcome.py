"""What a simulation of serving has counted, and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(kw_only=True)
class Outcome:
    """What was served. Seconds are simulated ones."""

    seconds: float = 0.0
    compute: float = 0.0
    slowed: float = 0.0
    """Seconds by which reading held compute up."""
    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    asked: int = 0
    """Rows, repeats included."""
    distinct: int = 0
    """Rows left when those of a step are merged."""
    ahead_hits: int = 0
    """Of these: read before their step."""
    reads: dict[str, int] = field(default_factory=dict)
    """Tier -> of these: read there in their step."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Tier -> moved by them and by looking ahead."""
    busy: dict[str, float] = field(default_factory=dict)
    """Tier -> share of the time that its queue worked."""
    waits: dict[int, list[float]] = field(default_factory=dict)
    """Layer -> seconds waited in each step."""
    first_token: list[float] = field(default_factory=list)
    """Seconds from each request's arrival to its first token."""
    next_token: list[float] = field(default_factory=list)
    """Mean seconds between tokens of each request that has several."""

    @property
    def tokens_per_second(self) -> float:
        """Computed ones, of prompts and continuations."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def waited(self) -> float:
        return sum(map(sum, self.waits.values()))

    def to_dict(self) -> dict[str, Any]:
        distinct = max(self.distinct, 1)
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "tokens_per_second": self.tokens_per_second,
            "output_per_second": self.output_tokens / self.seconds,
            "compute_share": self.compute / self.seconds,
            "waited_share": self.waited / self.seconds,
            "slowed_share": self.slowed / self.seconds,
            "rows_asked": self.asked,
            "rows_distinct": self.distinct,
            "hit_ratio": {name: count / distinct for name, count in self.reads.items()},
            "ahead_ratio": self.ahead_hits / distinct,
            "bytes": self.bytes,
            "busy": self.busy,
            "waits": {str(layer): quantiles(waits) for layer, waits in self.waits.items()},
            "first_token": quantiles(self.first_token),
            "next_token": quantiles(self.next_token),
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and mean; zeros of nothing."""
    found = np.array(values or [0.0])
    return {
        "p50": float(np.median(found)),
        "p99": float(np.quantile(found, 0.99)),
        "mean": float(found.mean()),
    }
