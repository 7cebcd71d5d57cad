"""What serving rows costs, as a table in a terminal, once or live."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table as Grid

from engram_lm.memory.metrics import LayerMetrics
from engram_lm.memory.served import ServedTables
from engram_lm.model.units import size_text, time_text

REFRESHES = 4.0
"""A second, while live."""


def metrics_table(metrics: Mapping[int, LayerMetrics]) -> Grid:
    """A line for each layer."""
    grid = Grid(title="rows")
    for column in ("layer", "asked", "unique", "found in", "read", "passes", "wait p50", "p99"):
        grid.add_column(column, justify="left" if column == "found in" else "right")
    for layer, each in metrics.items():
        # Of what the first was asked: rows of a token guessed wrongly were read as well.
        asked = each.tiers[0].asked if each.tiers else 0
        found = ", ".join(f"{tier.name} {_share(tier.hits, asked)}" for tier in each.tiers)
        grid.add_row(
            str(layer),
            f"{each.asked:,}",
            _share(each.unique, each.asked),
            found or "memory",
            size_text(sum(tier.bytes_read for tier in each.tiers)),
            f"{each.requests:,}",
            time_text(each.wait_p50),
            time_text(each.wait_p99),
        )
    return grid


@contextmanager
def watch(served: ServedTables, console: Console) -> Iterator[None]:
    """Inside, the table of these stores is drawn anew a few times a second."""
    with Live(
        get_renderable=lambda: metrics_table(served.metrics()),
        console=console,
        refresh_per_second=REFRESHES,
    ):
        yield


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
