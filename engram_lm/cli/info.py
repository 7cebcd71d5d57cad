"""`engram info`: what a directory holds, and whether it is whole."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from engram_lm.errors import DataError

HELP = "Say what a saved model or memory pack holds and whether it is whole (exit status 1 if not)."


def options(add: Callable[..., Any]) -> None:
    add("directory", type=Path, metavar="DIR", help="where save_pretrained or save_pack wrote")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.directory.is_dir():
        raise DataError(f"{arguments.directory}: no such directory")
    from engram_lm.cli.settings import prepare
    from engram_lm.model.contents import Contents, read

    prepare(None)
    contents: Contents = read(arguments.directory)
    if arguments.json:
        print(json.dumps(contents.to_dict()))
        return 0 if contents.whole else 1
    console = Console()
    facts = Grid("", Column("", overflow="fold"), show_header=False, title=contents.directory)
    for name, value in {**contents.model, **_memory(contents.memory)}.items():
        facts.add_row(name.replace("_", " "), _words(value))
    facts.add_row("tokenizer", contents.tokenizer)
    console.print(facts)
    files = Grid("file", "bytes", "state")
    for file in contents.files:
        files.add_row(file.name, "" if file.bytes is None else f"{file.bytes:,}", file.state)
    console.print(files)
    for problem in contents.problems:
        print(problem)
    print("whole" if contents.whole else f"not whole, problems: {len(contents.problems)}")
    return 0 if contents.whole else 1


def _memory(memory: dict[str, Any] | None) -> dict[str, Any]:
    return {f"memory {name}": value for name, value in (memory or {}).items()}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_words(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
