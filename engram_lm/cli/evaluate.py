"""`engram eval`: tasks of lm-evaluation-harness on a saved model, with memory and without."""

import argparse
import json
import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from engram_lm.cli.settings import opening, prepare
from engram_lm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from engram_lm.evaluate.harness import Score

HELP = "Run tasks of lm-evaluation-harness on a saved model, with memory, without, or both."
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
COLUMNS = {"on": ("on",), "off": ("off",), "both": ("on", "off")}


def options(add: Callable[..., Any]) -> None:
    add("directory", type=Path, metavar="DIR", help="where save_pretrained wrote")
    add("--tasks", required=True, help="names of tasks or groups, or task files: a,b")
    add("--include", type=Path, metavar="DIR", help="a directory of task files of your own")
    add("--limit", type=int, help="documents of each task (default: all)")
    add("--batch-size", type=int, default=8, help="requests read at once (default: %(default)s)")
    add("--shots", type=int, help="examples before each question (default: as the task says)")
    add(
        "--memory",
        choices=tuple(COLUMNS),
        default="on",
        help="off: the backbone alone; both: two columns (default: %(default)s)",
    )
    add("--out", type=Path, metavar="FILE", help="write the scores there, as JSON")


def run(arguments: argparse.Namespace) -> None:
    prepare(None)
    model, tokenizer = _opened(arguments.directory)
    has_memory = getattr(model.config, "memory", None) is not None
    if arguments.memory != "on" and not has_memory:
        raise ConfigError(f"memory={arguments.memory!r}: this model has none")
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise DataError(f"{arguments.out}: no such directory as {arguments.out.parent}")
    from engram_lm.evaluate.harness import Harness

    names = [name for name in arguments.tasks.split(",") if name]
    with Console(stderr=True).status("reading the tasks"):
        harness = Harness(names, include=arguments.include, shots=arguments.shots)
    scores = {
        column: harness.scores(
            model,
            tokenizer,
            memory=column == "on",
            limit=arguments.limit,
            batch=arguments.batch_size,
        )
        for column in COLUMNS[arguments.memory]
    }
    record = {
        "command": "eval",
        "model": str(arguments.directory),
        "tasks": names,
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "memory": arguments.memory if has_memory else None,
        "scores": _rows(scores),
    }
    if arguments.out is not None:
        _write(arguments.out, record)
    if arguments.json:
        print(json.dumps(record))
    else:
        _show(record)


def _opened(directory: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with opening(directory):
        if not any((directory / name).is_file() for name in TOKENIZERS):
            raise DataError(
                f"{directory}: no tokenizer; tokenizer.save_pretrained puts it beside the model"
            )
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
    return model, tokenizer


def _rows(columns: "dict[str, list[Score]]") -> list[dict[str, Any]]:
    """A record a metric; the same ones in every column."""
    rows = []
    for scores in zip(*columns.values(), strict=True):
        first = scores[0]
        row: dict[str, Any] = {
            "task": first.task,
            "metric": first.metric,
            "shots": first.shots,
            "documents": first.documents,
            "higher_is_better": first.higher_is_better,
        }
        for column, score in zip(columns, scores, strict=True):
            row |= {f"{column}_value": score.value, f"{column}_stderr": score.stderr}
        if len(columns) == 2:
            row["difference"] = row["on_value"] - row["off_value"]
        rows.append(row)
    return rows


def _show(record: dict[str, Any]) -> None:
    columns = COLUMNS[record["memory"] or "on"]
    titles = [f"memory {column}" for column in columns] if record["memory"] else ["value"]
    grid = Grid(Column("task", overflow="fold"), title=record["model"], box=SIMPLE_HEAD)
    for title in ["shots", "of", *titles, *(["on - off"] if len(columns) == 2 else [])]:
        grid.add_column(title, justify="right")
    for task, rows in groupby(record["scores"], lambda row: row["task"]):
        scores = list(rows)
        grid.add_row(task, _count(scores[0]["shots"]), _count(scores[0]["documents"]))
        for row in scores:
            better = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
            cells = [_value(row[f"{column}_value"], row[f"{column}_stderr"]) for column in columns]
            if len(columns) == 2:
                cells.append(f"{row['difference']:+.4f}")
            grid.add_row(f"  {row['metric']}{better}", "", "", *cells)
    Console().print(grid)


def _value(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f}\n± {stderr:.4f}"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _write(path: Path, record: dict[str, Any]) -> None:
    """Aside first, so that the file is whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, path)
