"""What serving rows has cost: counts and waits of one layer, as a dict and as Prometheus text."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engram_lm.memory.rows import TierCounts


@dataclass(frozen=True, kw_only=True)
class LayerMetrics:
    """Of one layer since its rows were opened. Seconds; rows; bytes."""

    asked: int
    """Rows, repeats included."""
    unique: int
    """Of these: asked of the stores, each once in a request."""
    tiers: tuple[TierCounts, ...]
    """The stores that count, the fastest first."""
    requests: int
    """One for each forward pass."""
    wait_seconds: float
    """That the model has stood still for rows of this layer."""
    wait_p50: float
    """Half of the last requests waited no longer."""
    wait_p99: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "tiers": [tier._asdict() for tier in self.tiers]}


def prometheus(metrics: Mapping[int, LayerMetrics]) -> str:
    """The text exposition format, version 0.0.4: counters, and a summary of waits."""
    return "".join(f"{line}\n" for line in _lines(metrics))


def _lines(metrics: Mapping[int, LayerMetrics]) -> Iterator[str]:
    for name, field, help in (
        ("engram_rows_asked_total", "asked", "Rows asked for, repeats included."),
        ("engram_rows_unique_total", "unique", "Rows asked of the stores, each once a request."),
    ):
        yield from _head(name, "counter", help)
        for layer, each in metrics.items():
            yield f'{name}{{layer="{layer}"}} {getattr(each, field)}'
    for name, field, help in (
        ("engram_tier_rows_asked_total", "asked", "Rows asked of one store."),
        ("engram_tier_rows_hit_total", "hits", "Of these: answered by it."),
        ("engram_tier_read_bytes_total", "bytes_read", "Bytes that it read from a device."),
    ):
        yield from _head(name, "counter", help)
        for layer, each in metrics.items():
            for tier in each.tiers:
                yield f'{name}{{layer="{layer}",tier="{tier.name}"}} {getattr(tier, field)}'
    name = "engram_row_wait_seconds"
    yield from _head(name, "summary", "Time that the model waits for rows in a forward pass.")
    for layer, each in metrics.items():
        yield f'{name}{{layer="{layer}",quantile="0.5"}} {each.wait_p50!r}'
        yield f'{name}{{layer="{layer}",quantile="0.99"}} {each.wait_p99!r}'
        yield f'{name}_sum{{layer="{layer}"}} {each.wait_seconds!r}'
        yield f'{name}_count{{layer="{layer}"}} {each.requests}'


def _head(name: str, kind: str, help: str) -> Iterator[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"
