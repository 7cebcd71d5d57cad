"""`engram budget`: print where parameters and FLOPs are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from engram_lm.cli.models import opening
from engram_lm.cli.settings import setting, settings
from engram_lm.errors import ConfigError

if TYPE_CHECKING:
    from engram_lm.model.budget import Component

HELP = "Print where parameters and FLOPs are."


def options(add: Callable[..., Any]) -> None:
    add(
        "--preset",
        help="nano-moe, nano-engram, dense_4b, moe_27b, engram_27b or engram_40b "
        "(default: nano-engram)",
    )
    add("--model", type=Path, help="directory of a saved model instead")
    add("--memory", help="a memory alone instead: paper, demo, deepseek-v4.1 or qwen4-exp")
    add("--rho", type=float, help="also its twin with this share of experts")
    add("--context", type=int, default=256, help="tokens attended to (default: %(default)s)")
    setting(add, "model.hidden_size=256")


def run(arguments: argparse.Namespace) -> None:
    if sum(x is not None for x in (arguments.preset, arguments.model, arguments.memory)) > 1:
        raise ConfigError("give one of --preset, --model and --memory")
    changes = settings(arguments.set, ("model",))["model"]
    if arguments.memory is None:
        _model(arguments, changes)
    elif arguments.rho is not None:
        raise ConfigError(f"rho={arguments.rho}: a memory alone has no twin")
    else:
        _memory(arguments, changes)


def _model(arguments: argparse.Namespace, changes: dict[str, Any]) -> None:
    from engram_lm.model.budget import ledger
    from engram_lm.model.config import EngramLMConfig
    from engram_lm.model.presets import configure, preset
    from engram_lm.model.twin import twin

    if arguments.context < 1:
        raise ConfigError(f"context={arguments.context}: at least 1")
    if arguments.model is not None:
        with opening(arguments.model):
            name, config = str(arguments.model), EngramLMConfig.from_pretrained(arguments.model)
    else:
        name = arguments.preset or "nano-engram"
        config = preset(name)
    config = configure(config, changes)
    ledgers = {name: ledger(config, arguments.context)}
    if arguments.rho is not None:
        ledgers[f"twin at rho {arguments.rho:g}"] = ledger(
            twin(config, arguments.rho), arguments.context
        )
    if arguments.json:
        first, *others = ({"name": key, **value.to_dict()} for key, value in ledgers.items())
        print(json.dumps({**first, "twin": others[0]} if others else first))
        return
    for key, value in ledgers.items():
        grid = _grid(key, value.components)
        grid.add_section()
        grid.add_row("P_tot, P_act", f"{value.p_tot:,}", f"{value.p_act:,}", f"{value.flops:,}")
        grid.add_row("with token embedding", f"{value.total:,}", "", "")
        Console().print(grid)
        rho = "none" if value.rho is None else f"{value.rho:.1%}"
        print(
            f"rho {rho}, tables {value.tables:,}, optimiser {value.optimizer_bytes / 1e6:,.1f} MB"
        )


def _memory(arguments: argparse.Namespace, changes: dict[str, Any]) -> None:
    from engram_lm.model.memory_budget import memory_budget

    budget = memory_budget(arguments.memory, changes)
    record = {"name": arguments.memory, **budget.to_dict()}
    if arguments.json:
        print(json.dumps(record))
        return
    Console().print(_grid(arguments.memory, budget.components))
    rows = " + ".join(f"{rows:,}" for rows in budget.rows.values())
    print(
        f"{rows} rows x {budget.memory.head_dim}, {record['row_bytes']} B a row, "
        f"{record['table_bytes'] / 2**30:,.2f} GiB; a token reads {record['rows_per_token']} rows, "
        f"{record['bytes_per_token']:,} B"
    )


def _grid(title: str, components: Sequence[Component]) -> Grid:
    grid = Grid("component", "total", "active", "FLOPs per token", title=title)
    for line in components:
        grid.add_row(line.name, f"{line.total:,}", f"{line.active:,}", f"{line.flops:,}")
    return grid
