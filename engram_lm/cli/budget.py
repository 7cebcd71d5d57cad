"""`engram budget`: print where parameters and FLOPs are."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from engram_lm.cli.settings import opening, setting, settings
from engram_lm.errors import ConfigError

HELP = "Print where parameters and FLOPs are."


def options(add: Callable[..., Any]) -> None:
    add("--preset", default="nano-engram", help="nano-moe or nano-engram (default: %(default)s)")
    add("--model", type=Path, help="directory of a saved model instead")
    add("--rho", type=float, help="also its twin with this share of experts")
    add("--context", type=int, default=256, help="tokens attended to (default: %(default)s)")
    setting(add, "model.hidden_size=256")


def run(arguments: argparse.Namespace) -> None:
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
        name, config = arguments.preset, preset(arguments.preset)
    config = configure(config, settings(arguments.set, ("model",))["model"])
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
        grid = Grid("component", "total", "active", "FLOPs per token", title=key)
        for line in value.components:
            grid.add_row(line.name, f"{line.total:,}", f"{line.active:,}", f"{line.flops:,}")
        grid.add_section()
        grid.add_row("P_tot, P_act", f"{value.p_tot:,}", f"{value.p_act:,}", f"{value.flops:,}")
        Console().print(grid)
        rho = "none" if value.rho is None else f"{value.rho:.1%}"
        print(
            f"rho {rho}, tables {value.tables:,}, optimiser {value.optimizer_bytes / 1e6:,.1f} MB"
        )
