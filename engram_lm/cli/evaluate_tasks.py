"""Tasks of lm-evaluation-harness, as `engram eval` asks for them and shows them."""

import argparse
import statistics
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

if TYPE_CHECKING:
    from engram_lm.evaluate.harness import Harness, Score


def names(arguments: argparse.Namespace) -> list[str]:
    """As they were given."""
    return [name for name in (arguments.tasks or "").split(",") if name]


def harness(arguments: argparse.Namespace, shots: int | None) -> "Harness":
    """With the tasks loaded."""
    from engram_lm.evaluate.harness import Harness

    with Console(stderr=True).status("reading the tasks"):
        return Harness(names(arguments), include=arguments.include, shots=shots)


def rows(columns: "dict[str, list[list[Score]]]") -> list[dict[str, Any]]:
    """A record a metric; the same ones in every column, of which each has a list a model.

    Values and lm_eval's standard errors are means over the models; sd: of the values, over them.
    """
    found = []
    for each in zip(*(zip(*models, strict=True) for models in columns.values()), strict=True):
        first = each[0][0]
        row: dict[str, Any] = {
            "task": first.task,
            "metric": first.metric,
            "shots": first.shots,
            "documents": first.documents,
            "higher_is_better": first.higher_is_better,
        }
        for column, scores in zip(columns, each, strict=True):
            values = [score.value for score in scores]
            errors = [score.stderr for score in scores if score.stderr is not None]
            row[f"{column}_value"] = statistics.fmean(values)
            row[f"{column}_stderr"] = statistics.fmean(errors) if errors else None
            row[f"{column}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        if len(columns) == 2:
            row["difference"] = row["on_value"] - row["off_value"]
        found.append(row)
    return found


def show(record: dict[str, Any], columns: tuple[str, ...]) -> None:
    """A table: a line a metric."""
    titles = [f"memory {column}" for column in columns] if record["memory"] else ["value"]
    seeds = len(record["models"])
    grid = Grid(
        Column("task", overflow="fold"),
        title=", ".join(record["models"]),
        box=SIMPLE_HEAD,
        caption="±: lm_eval's standard error, over documents"
        + (f"; means of {seeds} seeds, sd: standard deviation over them" if seeds > 1 else ""),
    )
    for title in ["shots", "of", *titles, *(["on - off"] if len(columns) == 2 else [])]:
        grid.add_column(title, justify="right")
    for task, of_task in groupby(record["scores"], lambda row: row["task"]):
        scores = list(of_task)
        grid.add_row(task, _count(scores[0]["shots"]), _count(scores[0]["documents"]))
        for row in scores:
            better = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
            cells = [_value(row, column) for column in columns]
            if len(columns) == 2:
                cells.append(f"{row['difference']:+.4f}")
            grid.add_row(f"  {row['metric']}{better}", "", "", *cells)
    Console().print(grid)


def _value(row: dict[str, Any], column: str) -> str:
    value, stderr, sd = (row[f"{column}_{part}"] for part in ("value", "stderr", "sd"))
    lines = [f"{value:.4f}"]
    if stderr is not None:
        lines.append(f"± {stderr:.4f}")
    if sd is not None:
        lines.append(f"sd {sd:.4f}")
    return "\n".join(lines)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
