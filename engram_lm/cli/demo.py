"""`engram demo`: train a MoE and its Engram twin on WordNet; write a report."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from engram_lm.cli.settings import overcommits, prepare, setting, settings, train_config

HELP = "Train a MoE and its Engram twin on WordNet; write a report."


def options(add: Callable[..., Any]) -> None:
    add("--out", type=Path, default=Path("runs/demo"), help="directory (default: %(default)s)")
    add("--tokens", type=int, default=1_100_000, help="per arm (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and data order (default: %(default)s)")
    add("--threads", type=int, help="processor threads (default: all cores)")
    setting(add, "train.lr=0.002")


def run(arguments: argparse.Namespace) -> None:
    from engram_lm.model.presets import preset
    from engram_lm.precision import choose
    from engram_lm.studies.demo import ARMS, demo, summary
    from engram_lm.train import memory_needed
    from engram_lm.train.allocator import keep_freed_memory
    from engram_lm.train.config import TrainConfig
    from engram_lm.train.memory_needed import Needed
    from engram_lm.train.workers import Workers

    changes = settings(arguments.set, ("train", "machine"))
    train, overcommit = changes["train"], overcommits(changes["machine"])
    prepare(arguments.threads)
    keep_freed_memory()
    config = train_config(TrainConfig(tokens=arguments.tokens, seed=arguments.seed), train)
    if not overcommit:
        counted = replace(config, precision=choose(config.precision).name)
        # Both arms are in memory at once; their steps are taken in turn.
        moe, engram = (memory_needed.needed(preset(arm), counted) for arm in ARMS.values())
        memory = Needed(
            process=engram.process,
            weights=moe.weights + engram.weights,
            gradients=moe.gradients + engram.gradients,
            moments=moe.moments + engram.moments,
            activations=max(moe.activations, engram.activations),
        )
        memory_needed.check(memory, Workers(), "both arms of the demo")
    console = Console(stderr=arguments.json)
    console.print(
        f"engram demo: a MoE and its Engram twin, {config.steps} steps each of "
        f"{config.batch * config.context} tokens of WordNet, into {arguments.out}"
    )
    command = "engram " + shlex.join(sys.argv[1:])
    results = demo(config, arguments.out, console, command)
    grid = Grid("", "loss, nats per token", "bits per byte", "tokens/s")
    speeds = {arm.name: f"{arm.log.tokens_per_second:,.0f}" for arm in results.arms}
    for name, losses in results.losses.items():
        grid.add_row(name, f"{losses.loss:.4f}", f"{losses.bpb:.4f}", speeds.get(name, ""))
    console.print(grid)
    console.print(f"report: {(arguments.out / 'report.html').resolve()}", soft_wrap=True)
    print(json.dumps(summary(results)))
