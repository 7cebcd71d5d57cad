"""`engram plan serve`: requests on a node whose tables lie in tiers, simulated step by step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from engram_lm.cli.settings import changed_fields, setting, settings
from engram_lm.errors import ConfigError

if TYPE_CHECKING:
    from engram_lm.config import MemoryConfig
    from engram_lm.simulate.compute_time import Backbone
    from engram_lm.simulate.row_trace import RowTrace
    from engram_lm.simulate.serve_plan import ServePlan
    from engram_lm.simulate.tiers import Tier

HELP = "Simulate serving with tables in tiers: hits, waits, tokens a second, cost."
DEEPSEEK = "deepseek-v4.1"
LOOP = 16
"""Requests under way where nothing is said."""


def options(add: Callable[..., Any]) -> None:
    add("--preset", default=DEEPSEEK, help="or one of `engram budget` (default: %(default)s)")
    add(
        "--tiers",
        default="dram:32GB,nvme",
        help="of hbm, dram, nvme and remote; with bytes, all but the last (default: %(default)s)",
    )
    add("--data", type=Path, help="of `engram data`: its text is served (default: Zipf's law)")
    add("--requests", type=int, default=64, help="that are served (default: %(default)s)")
    add("--warm", type=int, default=2**16, help="tokens served before them (default: %(default)s)")
    add("--loop", type=int, help=f"requests always under way (default: {LOOP})")
    add("--rate", type=float, help="requests that arrive a second, at random, instead")
    add("--seed", type=int, default=0, help="of texts, lengths, arrivals (default: %(default)s)")
    setting(add, "load.prompt=2048, serving.ahead_bytes=67108864, node.flops=1e15, nvme.iops=1e6")


def run(arguments: argparse.Namespace) -> None:
    from engram_lm.simulate.compute_time import Node
    from engram_lm.simulate.row_trace import Lengths
    from engram_lm.simulate.serve_plan import Load, ServePlan, plain
    from engram_lm.simulate.serving import Serving
    from engram_lm.simulate.tiers import TIERS

    changes = settings(arguments.set, ("load", "serving", "node", *TIERS))
    _check(arguments)
    tiers = _tiers(arguments.tiers, changes)
    lengths = changed_fields("load", Lengths(), changes["load"])
    serving = changed_fields("serving", Serving(), changes["serving"])
    node = changed_fields("node", Node(), changes["node"])
    memory, row_bytes, backbone = _model(arguments.preset, lengths.prompt)
    specification = memory.specification
    load = Load(
        lengths=lengths.draw(arguments.requests, arguments.seed),
        warm=arguments.warm,
        rate=arguments.rate,
        loop=None if arguments.rate is not None else arguments.loop or LOOP,
        seed=arguments.seed,
    )
    trace, source = _trace(arguments, memory, load)
    plan = ServePlan(
        trace=trace,
        layers=specification.layers,
        row_bytes=row_bytes,
        table_rows=sum(specification.table_rows(layer) for layer in specification.layers),
        backbone=backbone,
        node=node,
        serving=serving,
        load=load,
    )
    found = plan.on(tiers)
    if not arguments.json:
        _show(arguments.preset, plan, tiers, source, found)
    record = {
        "command": "plan serve",
        "name": arguments.preset,
        "trace": source,
        "tiers": [plain(tier) for tier in tiers],
        "node": asdict(node),
        "serving": asdict(serving),
        "load": {**asdict(lengths), "rate": load.rate, "loop": load.loop, "warm": load.warm},
        **found,
    }
    print(json.dumps(record))


def _check(arguments: argparse.Namespace) -> None:
    if arguments.loop is not None and arguments.rate is not None:
        raise ConfigError("give one of --loop and --rate")
    for name, least in (("requests", 1), ("warm", 0), ("loop", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: {least} or more")
    if arguments.rate is not None and not 0 < arguments.rate < float("inf"):
        raise ConfigError(f"--rate {arguments.rate}: requests a second, above 0")


def _tiers(text: str, changes: dict[str, Any]) -> list[Tier]:
    from dataclasses import replace

    from engram_lm.model.units import bytes_of
    from engram_lm.simulate.tiers import TIERS

    found = []
    for part in text.split(","):
        name, colon, size = part.partition(":")
        if name not in TIERS:
            raise ConfigError(f"--tiers {text}: {name!r} is none of {', '.join(TIERS)}")
        tier = changed_fields(name, TIERS[name](), changes[name])
        found.append(replace(tier, size=bytes_of(f"--tiers {name}", size) if colon else None))
    for name in set(TIERS) - {tier.name for tier in found}:
        if changes[name]:
            raise ConfigError(f"--set {name}.{next(iter(changes[name]))}: no such tier in {text}")
    return found


def _model(name: str, context: int) -> tuple[MemoryConfig, int, Backbone]:
    """Its memory, the bytes of a row, and its blocks."""
    import torch

    from engram_lm.memory.rows import RowFormat
    from engram_lm.model import memory_budget
    from engram_lm.model.presets import PRESETS, preset
    from engram_lm.simulate import compute_time

    if name == DEEPSEEK:
        budget = memory_budget.deepseek_v41()
        return budget.memory, budget.row_format.row_bytes, compute_time.deepseek_v41()
    if name.replace("_", "-") not in PRESETS:
        raise ConfigError(f"preset={name!r}: accepted are {DEEPSEEK}, {', '.join(PRESETS)}")
    config = preset(name)
    memory = config.memory_config
    if memory is None:
        raise ConfigError(f"preset={name!r}: a model without memory has no rows to plan for")
    row = RowFormat(dtype=torch.bfloat16, dim=memory.head_dim)
    return memory, row.row_bytes, compute_time.Backbone.of(config, context)


def _trace(arguments: argparse.Namespace, memory: MemoryConfig, load: Any) -> tuple[RowTrace, str]:
    from engram_lm.model.row_profile import EXPONENTS
    from engram_lm.simulate.row_trace import RowTrace

    lengths = [*([load.warm] if load.warm else []), *load.lengths.sum(1).tolist()]
    if arguments.data is None:
        law = " and ".join(f"{exponent:.2f}" for exponent in EXPONENTS)
        source = f"n-grams by Zipf's law with exponents {law}: assumed, --data measures them"
        trace = RowTrace.of_zipf(memory.specification, sum(lengths), seed=arguments.seed)
        return trace, source
    from engram_lm.memory.ngrams import Addresses
    from engram_lm.train.served_text import served_trace, warm_lengths
    from engram_lm.train.shards import Shards

    shards = Shards(arguments.data)
    specification = memory.specification
    addresses = Addresses(specification, specification.canonical_map(shards.encoder.fast()))
    texts = [*warm_lengths(load.warm, int(load.lengths.sum(1).max())), *lengths[bool(load.warm) :]]
    trace = served_trace(shards.split("train"), addresses, texts, seed=arguments.seed)
    return trace, f"text of {arguments.data}"


def _show(
    name: str, plan: ServePlan, tiers: Sequence[Tier], source: str, found: dict[str, Any]
) -> None:
    from engram_lm.model.units import size_text, time_text

    console, node, load = Console(), plan.node, plan.load
    comes = f"{load.rate:g} a second" if load.rate else f"{load.loop} at a time"
    table = plan.table_rows * plan.row_bytes
    console.print(
        f"[bold]engram plan serve: {name}[/bold], {plan.table_rows:,} rows of {plan.row_bytes} "
        f"bytes ({size_text(table)}), {len(load.lengths):,} requests, {comes}, of "
        f"{load.lengths[:, 0].mean():,.0f} tokens and {load.lengths[:, 1].mean():,.0f} more",
        highlight=False,
    )
    console.print(
        f"Assumed: {node.flops / 1e12:,.0f} TFLOP/s at {node.utilisation:.0%}, "
        f"{size_text(node.bandwidth)}/s of weights at {node.streaming:.0%}, "
        f"{time_text(node.overhead)} a block besides; steps of {plan.serving.step_tokens:,} tokens "
        f"at most; {size_text(plan.serving.ahead_bytes)} read ahead; tiers warm from "
        f"{load.warm:,} tokens; {source}.",
        highlight=False,
    )
    console.print(_tier_grid(plan, tiers, found))
    console.print(_time_grid(found))
    console.print(found["verdict"], highlight=False)


def _tier_grid(plan: ServePlan, tiers: Sequence[Tier], found: dict[str, Any]) -> Grid:
    from engram_lm.model.units import size_text, time_text

    grid = Grid("tier")
    headings = ("rows", "latency", "rows/s at most", "reads", "bytes/s", "busy", "costs")
    for heading in headings:
        grid.add_column(heading, justify="right")
    for tier in tiers:
        size = tier.size or plan.table_rows * plan.row_bytes
        grid.add_row(
            tier.name,
            size_text(size),
            time_text(tier.latency),
            f"{1 / tier.row_seconds(plan.row_bytes):,.3g}",
            f"{found['hit_ratio'][tier.name]:.1%}",
            size_text(found["bytes"][tier.name] / found["seconds"]),
            f"{found['busy'][tier.name]:.1%}",
            f"${tier.dollars * size / 1e9:,.0f}",
        )
    if found["ahead_ratio"]:
        grid.add_row("read ahead", "", "", "", f"{found['ahead_ratio']:.1%}", "", "", "")
    return grid


def _time_grid(found: dict[str, Any]) -> Grid:
    from engram_lm.model.units import time_text

    grid = Grid("what", "mean", "p50", "p99")
    for column in grid.columns[1:]:
        column.justify = "right"
    lines = {f"wait of layer {layer}": waits for layer, waits in found["waits"].items()}
    lines |= {"first token": found["first_token"], "each next one": found["next_token"]}
    for label, times in lines.items():
        grid.add_row(label, *(time_text(times[key]) for key in ("mean", "p50", "p99")))
    grid.add_section()
    merged = 1 - found["rows_distinct"] / found["rows_asked"]
    for label, text in {
        "steps": f"{found['steps']:,}",
        "rows merged within a step": f"{merged:.1%}",
        "tokens a second": f"{found['tokens_per_second']:,.0f}",
        "  of continuations": f"{found['output_per_second']:,.0f}",
        "memory": f"${found['memory_dollars']:,.0f}",
        "a million tokens": f"${found['dollars_per_million']:.4f}",
    }.items():
        grid.add_row(label, text)
    return grid
