"""`engram plan`: what training with sharded tables takes on many workers, and what breaks first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from engram_lm.cli.models import opening
from engram_lm.cli.settings import changed_fields, setting, settings
from engram_lm.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from engram_lm.model.config import EngramLMConfig
    from engram_lm.model.plan import Plan
    from engram_lm.model.row_profile import Profile

HELP = "Print what training takes on many workers, and what breaks first."
BATCHES = 8
"""Worker batches of each size that are drawn from --data."""


def options(add: Callable[..., Any]) -> None:
    add("--preset", help="engram_27b, engram_40b or nano-engram (default: engram_27b)")
    add("--model", type=Path, help="directory of a saved model instead")
    add("--workers", default="64", help="or several numbers, as 64,128,256 (default: %(default)s)")
    add("--tokens", type=int, default=1280 * 4096, help="a step, of all (default: %(default)s)")
    add("--memory", type=float, default=80.0, help="GB of each worker (default: %(default)s)")
    add("--link", type=float, default=50.0, help="GB/s of each, each way (default: %(default)s)")
    add("--data", type=Path, help="of `engram data`: count its n-grams (default: Zipf's law)")
    setting(add, "cluster.latency=0.00001, job.table_optimizer=rowwise, job.context=4096")


def run(arguments: argparse.Namespace) -> None:
    from engram_lm.model.cluster import Cluster, Job
    from engram_lm.model.plan import Plan, Sizes
    from engram_lm.model.row_profile import ZipfProfile

    changes = settings(arguments.set, ("cluster", "job", "model"))
    counts = _workers(arguments.workers)
    for name in {"workers", "memory", "link"} & set(changes["cluster"]):
        raise ConfigError(f"--set cluster.{name}: it has an option of its own, --{name}")
    cluster = Cluster(workers=1, memory=arguments.memory * 1e9, link=arguments.link * 1e9)
    cluster = changed_fields("cluster", cluster, changes["cluster"])
    name, config, canonical, split = _model(arguments, changes["model"])
    context = changes["job"].pop("context", config.max_position_embeddings)
    job = Job(tokens=arguments.tokens, context=context)
    job = changed_fields("job", job, changes["job"])
    sizes = Sizes.of(config, job.context)
    profile: Profile
    if split is None:
        profile = ZipfProfile(sizes.memory.specification)
        law = " and ".join(f"{exponent:.2f}" for exponent in profile.exponents)
        source = f"n-grams by Zipf's law with exponents {law}: assumed, --data measures them"
    else:
        profile, source = _measured(config, canonical, split, job, counts, arguments.data)
    first = Plan(sizes=sizes, profile=profile, cluster=cluster, job=job)
    plans = [first.on(workers) for workers in counts]
    if not arguments.json:
        _show(name, plans, source)
    record = {
        "command": "plan",
        "name": name,
        "job": asdict(job),
        "cluster": {key: value for key, value in asdict(cluster).items() if key != "workers"},
        "profile": source,
        "plans": [plan.to_dict() for plan in plans],
    }
    print(json.dumps(record))


def _workers(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise ConfigError(f"--workers {text}: whole numbers, 1 or more, as 64 or 64,128,256")
    return counts


def _model(
    arguments: argparse.Namespace, changes: dict[str, Any]
) -> tuple[str, EngramLMConfig, Any, Any]:
    """Its name and configuration, and with --data the canonical map and the training split."""
    from engram_lm.model.config import EngramLMConfig
    from engram_lm.model.presets import configure, for_vocabulary, preset
    from engram_lm.train.shards import Shards

    if arguments.preset is not None and arguments.model is not None:
        raise ConfigError("give one of --preset and --model")
    if arguments.model is None:
        name = arguments.preset or "engram_27b"
        config = preset(name)
    else:
        name = str(arguments.model)
        with opening(arguments.model):
            config = EngramLMConfig.from_pretrained(arguments.model)
    config = configure(config, changes)
    if arguments.data is None or config.memory_config is None:
        return name, config, None, None
    shards = Shards(arguments.data)
    encoder = shards.encoder
    if arguments.model is None:
        # As `engram train --data` makes it: a preset takes the vocabulary of its data.
        config = for_vocabulary(
            config,
            token_ids=encoder.token_ids,
            separator_id=encoder.separator_id,
            padding_id=encoder.padding_id,
        )
    assert config.memory_config is not None
    if config.vocab_size < encoder.token_ids:
        raise MismatchError(
            f"{arguments.data}: its tokenizer has {encoder.token_ids} token ids, the model "
            f"{config.vocab_size}"
        )
    specification, ids = config.memory_config.specification, config.vocab_size
    canonical = specification.model_map(specification.canonical_map(encoder.fast(), ids), ids)
    return name, config, canonical, shards.split("train")


def _measured(
    config: EngramLMConfig, canonical: Any, split: Any, job: Any, counts: list[int], path: Path
) -> tuple[Profile, str]:
    from engram_lm.memory.ngrams import Addresses
    from engram_lm.train.row_samples import sampled_profile

    assert config.memory_config is not None
    addresses = Addresses(config.memory_config.specification, canonical)
    windows = (len(split) - 1) // job.context
    most = max(1, min(job.sequences, windows))
    sizes = {most, *(2**power for power in range(most.bit_length()))}
    profile = sampled_profile(
        split, addresses, context=job.context, sequences=sizes, batches=BATCHES
    )
    source = (
        f"n-grams counted in {path}, in up to {BATCHES} batches of "
        f"{' '.join(f'{size:,}' for size in profile.sizes)} tokens"
    )
    if most < job.sequences:
        source += "; continued beyond"
    return profile, source


def _show(name: str, plans: Sequence[Plan], source: str) -> None:
    first, console = plans[0], Console()
    cluster, job = first.cluster, first.job
    console.print(
        f"[bold]engram plan: {name}[/bold], {job.tokens:,} tokens a step in sequences of "
        f"{job.context:,}, {sum(first.sizes.rows.values()):,} rows of "
        f"{first.sizes.memory.head_dim} ({job.table_optimizer}, {job.table_dtype}), backbone under "
        f"{job.backbone}",
        highlight=False,
    )
    console.print(
        f"Assumed: {cluster.memory / 1e9:g} GB a worker, {job.free:.0%} of it left free; links of "
        f"{cluster.link / 1e9:g} GB/s each way, {cluster.latency * 1e6:g} us a message; "
        f"{cluster.flops / 1e12:g} TFLOP/s at {cluster.utilisation:.0%}; activations checkpointed; "
        f"{cluster.disk / 1e9:g} GB/s to disk, written every {job.every / 60:g} min; {source}.",
        highlight=False,
    )
    console.print(_overview(plans))
    console.print(_exchanges(first))
    console.print(_row_states(first))
    for plan in plans:
        console.print(plan.verdict, highlight=False)
    fewest = "no number" if first.fewest is None else f"{first.fewest:,}"
    late = "on no number of them" if first.late is None else f"from about {first.late:,} on"
    console.print(
        f"Fewest workers on which memory suffices: {fewest}. Rows come too late {late}.",
        highlight=False,
    )


def _overview(plans: Sequence[Plan]) -> Grid:
    grid = Grid("of the worker with most", *(f"{p.cluster.workers:,} workers" for p in plans))
    for column in grid.columns[1:]:
        column.justify = "right"
    each = [_lines(plan) for plan in plans]
    for part in each[0]:
        for label in each[0][part]:
            grid.add_row(label, *(lines[part][label] for lines in each))
        grid.add_section()
    return grid


def _lines(plan: Plan) -> dict[str, dict[str, str]]:
    """Section -> line -> what it says of one plan."""
    from engram_lm.model.units import size_text, time_text

    waits, found = plan.waits, plan.exchanges()
    busiest = {
        kind: sum(layers[index].busiest_bytes for layers in found.values())
        for index, kind in enumerate(("counts", "ids", "rows", "gradients"))
    }
    unmerged = sum(rows.busiest_bytes for _, _, rows, _ in plan.exchanges(merged=False).values())
    messages = sum(exchange.messages for layers in found.values() for exchange in layers)
    arrivals = {}
    for layer, seconds in waits.before.items():
        arrivals[f"layer {layer} needs rows at"] = time_text(seconds)
        arrivals[f"  layer {layer} has them at"] = time_text(waits.arrive[layer])
    return {
        "work": {
            "passes a step": f"{plan.passes:,}",
            "tokens a pass, mean": f"{plan.pass_tokens:,.0f}",
            **{f"rows of layer {layer}": f"{rows:,}" for layer, rows in plan.shard.items()},
        },
        "memory": {
            **{part: size_text(size) for part, size in plan.memory.items()},
            "memory in all": size_text(sum(plan.memory.values())),
        },
        "links": {
            **{f"{kind} a pass": size_text(size) for kind, size in busiest.items()},
            "rows a pass, not merged": size_text(unmerged),
            "backbone a pass": size_text(plan.backbone_bytes),
            "messages a pass, to others": f"{messages // plan.cluster.workers:,}",
        },
        "time": {
            **arrivals,
            "a pass computes for": time_text(waits.compute),
            "  and waits for rows": time_text(waits.rows + waits.gradients),
            "a step takes": time_text(plan.step_seconds),
            "a checkpoint": size_text(plan.checkpoint_bytes),
            "  takes": time_text(plan.checkpoint_seconds),
        },
        "strain": {f"strain: {part}": f"{strain:,.2f}" for part, strain in plan.strain.items()},
    }


def _exchanges(plan: Plan) -> Grid:
    from engram_lm.model.units import size_text

    grid = Grid(title=f"All-to-Alls of one pass, {plan.cluster.workers:,} workers together")
    grid.add_column("layer")
    grid.add_column("what")
    for heading in ("merged", "over links", "unmerged", "over links", "messages"):
        grid.add_column(heading, justify="right")
    unmerged = plan.exchanges(merged=False)
    for layer, found in plan.exchanges().items():
        for one, other in zip(found, unmerged[layer], strict=True):
            sizes = (one.bytes, one.link_bytes, other.bytes, other.link_bytes)
            grid.add_row(str(layer), one.name, *map(size_text, sizes), f"{one.messages:,}")
    return grid


def _row_states(plan: Plan) -> Grid:
    from engram_lm.model.cluster import ROW_STATES
    from engram_lm.model.units import size_text

    grid = Grid(title="Tables under each row optimiser: weights and moments")
    grid.add_column("table_optimizer, table_dtype")
    for heading in ("a value", "a row besides", "all workers", "a worker"):
        grid.add_column(heading, justify="right")
    dim, rows = plan.sizes.memory.head_dim, sum(plan.sizes.rows.values())
    for names, state in ROW_STATES.items():
        kept = (state.bytes(count, dim) for count in (rows, sum(plan.shard.values())))
        sizes = (state.weight + state.moments, state.row, *kept)
        grid.add_row(", ".join(names), *map(size_text, sizes))
    return grid
