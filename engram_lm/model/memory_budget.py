"""What a memory alone costs: values, bytes, and what it adds to the decoder that it is put into.

Presets are those of the paper, the public demo and the released models, each with the decoder's
width and streams and with rows as they are published. Nothing is allocated.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from engram_lm import config
from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError
from engram_lm.memory.rows import RowFormat
from engram_lm.model.budget import Component, memory_components
from engram_lm.model.presets import changed


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """A memory, the decoder around it, and how a value of a row is written. Raises ConfigError."""

    memory: MemoryConfig
    hidden_size: int
    streams: int = 4
    dtype: torch.dtype = torch.bfloat16
    scale_group: int | None = None
    """Values that share one ue8m0 scale byte; None: no scales."""

    def __post_init__(self) -> None:
        for name, value in (("hidden_size", self.hidden_size), ("streams", self.streams)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"model.{name}={value!r}: 1 or more")

    @property
    def rows(self) -> dict[int, int]:
        """Layer -> rows of its whole table."""
        specification = self.memory.specification
        return {layer: specification.table_rows(layer) for layer in specification.layers}

    @property
    def row_format(self) -> RowFormat:
        return RowFormat(dtype=self.dtype, dim=self.memory.head_dim, scale_group=self.scale_group)

    @property
    def rows_per_token(self) -> int:
        """Rows that one token reads in all layers."""
        return len(self.rows) * self.memory.specification.heads_per_layer

    @property
    def components(self) -> tuple[Component, ...]:
        """The lines that this memory adds to a model's ledger."""
        return memory_components(self.memory, self.hidden_size, self.streams)

    def to_dict(self) -> dict[str, Any]:
        """Counts are of values and rows, bytes are bytes."""
        row_bytes, components = self.row_format.row_bytes, self.components
        return {
            "tables": sum(self.rows.values()) * self.memory.head_dim,
            "active": sum(component.active for component in components),
            "flops_per_token": sum(component.flops for component in components),
            "rows": {str(layer): rows for layer, rows in self.rows.items()},
            "row_bytes": row_bytes,
            "table_bytes": sum(self.rows.values()) * row_bytes,
            "rows_per_token": self.rows_per_token,
            "bytes_per_token": self.rows_per_token * row_bytes,
            "hidden_size": self.hidden_size,
            "streams": self.streams,
            "components": [asdict(component) for component in components],
        }


def paper() -> MemoryBudget:
    """Engram-27B's, in bfloat16."""
    return MemoryBudget(memory=config.paper(), hidden_size=2_560)


def demo() -> MemoryBudget:
    """The public demo's, in bfloat16."""
    return MemoryBudget(memory=config.demo(), hidden_size=1_024)


def deepseek_v41() -> MemoryBudget:
    """DeepSeek-V4.1-Flash's: e4m3 values, a scale byte for 32 of them, 264 bytes a row."""
    return MemoryBudget(
        memory=config.deepseek_v41(),
        hidden_size=5_120,
        dtype=torch.float8_e4m3fn,
        scale_group=32,
    )


def qwen4_exp() -> MemoryBudget:
    """Qwen3.8-Flash-Next's: one table, bfloat16."""
    return MemoryBudget(memory=config.qwen4_exp(), hidden_size=2_560)


MEMORIES = {
    "paper": paper,
    "demo": demo,
    "deepseek-v4.1": deepseek_v41,
    "qwen4-exp": qwen4_exp,
}


def memory_budget(name: str, changes: dict[str, Any] | None = None) -> MemoryBudget:
    """A preset with some fields changed: hidden_size, streams, memory.head_dim and the like.

    ConfigError with what is accepted.
    """
    if name not in MEMORIES:
        raise ConfigError(f"memory={name!r}: accepted are {', '.join(MEMORIES)}")
    budget = MEMORIES[name]()
    record: dict[str, Any] = {
        "hidden_size": budget.hidden_size,
        "streams": budget.streams,
        "memory": budget.memory.to_dict(),
    }
    record = changed(record, changes or {})
    record["memory"] = MemoryConfig.from_dict(record["memory"])
    return replace(budget, **record)
