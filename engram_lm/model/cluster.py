"""The machines that a model is trained on, and how: what a plan assumes, each with a default."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from engram_lm.errors import ConfigError


class RowState(NamedTuple):
    """Bytes that training keeps for a table: of each value, and of each row besides."""

    weight: int
    moments: int
    row: int
    gradient: int = 4
    """Summed, sent and kept in float32 whatever the table is."""

    def bytes(self, rows: int, dim: int) -> int:
        """Weights and moments of so many rows: what is kept, and what a checkpoint holds."""
        return rows * (dim * (self.weight + self.moments) + self.row)


OPTIMIZERS = {"adam": (8, 0), "rowwise": (0, 4)}
"""Bytes of float32 moments: two a value, or one a row."""
DTYPES = {"fp32": 4, "bf16": 2}
"""Of table rows; bfloat16 is rounded stochastically and keeps no float32 copy."""
ROW_STATES = {
    (optimizer, dtype): RowState(weight, *moments)
    for optimizer, moments in OPTIMIZERS.items()
    for dtype, weight in DTYPES.items()
}
BACKBONES = ("fully_shard", "ddp")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines, all alike. Bytes, seconds, FLOP/s. Defaults: H100 80 GB, 400 Gb/s each."""

    workers: int
    memory: float = 80e9
    link: float = 50e9
    """Of each worker to all others together, each way."""
    latency: float = 1e-5
    """Of a message; a worker's messages leave one after another."""
    flops: float = 989e12
    """At most, in the compute dtype (bfloat16)."""
    utilisation: float = 0.4
    """Share of it that the blocks reach."""
    disk: float = 20e9
    """Written by all workers together."""

    def __post_init__(self) -> None:
        _check_counts("cluster", self, "workers")
        _check_positive("cluster", self, "memory", "link", "flops", "disk")
        if not self.latency >= 0:
            raise ConfigError(f"cluster.latency={self.latency}: seconds, 0 or more")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"cluster.utilisation={self.utilisation}: a share above 0 up to 1")


@dataclass(frozen=True, kw_only=True)
class Job:
    """How it is trained."""

    tokens: int
    """Per step, of all workers."""
    context: int
    sequences: int = 4
    """Of one pass on one worker, at most; more are accumulated in several passes."""
    table_optimizer: str = "adam"
    table_dtype: str = "fp32"
    backbone: str = "fully_shard"
    free: float = 0.2
    """Share of memory left to what is not counted: activations within a block, logits, buffers."""
    every: float = 1800.0
    """Seconds between checkpoints."""
    slack: float = 0.05
    """Share of the time that waiting for links, or for a checkpoint, may take."""

    def __post_init__(self) -> None:
        _check_counts("job", self, "tokens", "context", "sequences")
        _check_positive("job", self, "every", "slack")
        if not 0 <= self.free < 1:
            raise ConfigError(f"job.free={self.free}: a share from 0 up to, not with, 1")
        choices: dict[str, Iterable[str]] = {
            "table_optimizer": OPTIMIZERS,
            "table_dtype": DTYPES,
            "backbone": BACKBONES,
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in set(accepted):
                raise ConfigError(
                    f"job.{name}={getattr(self, name)!r}: accepted are {', '.join(accepted)}"
                )
        if self.tokens % self.context:
            raise ConfigError(
                f"job.tokens={self.tokens}: whole sequences of context={self.context} are needed"
            )

    @property
    def state(self) -> RowState:
        """What is kept for the tables."""
        return ROW_STATES[self.table_optimizer, self.table_dtype]


def _check_counts(group: str, values: Any, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{group}.{name}={value!r}: a whole number, 1 or more")


def _check_positive(group: str, values: Any, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
            raise ConfigError(f"{group}.{name}={value!r}: above 0")
