"""DeepSeek-V4.1's tables on a node of eight GPUs: in DRAM, on NVMe and in both, simulated.

    python recipes/debian_text.py --out runs/debian
    engram data runs/debian/*.jsonl --out runs/debian/deepseek --tokenizer tokenizer.json \
        --separator '<｜end▁of▁sentence｜>'
    python benchmarks/serving_plan.py --data runs/debian/deepseek

Loads of real text: prompts of 8,192 tokens with 64 more, prompts of 256 with 1,024 more, and the
latter one at a time. No table is allocated. Ceiling: the same node with rows that cost no time.
serving_steps.py checks the model of time against a machine that is there. Writes
results/serving_plan.json, .svg and .png; the last line printed is the summary.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from rich.console import Console

from engram_lm.analysis.figures import BLUE, GRID, VERMILION, save
from engram_lm.memory.ngrams_numba import CompiledAddresses
from engram_lm.model.memory_budget import memory_budget
from engram_lm.simulate.compute_time import Node, deepseek_v41
from engram_lm.simulate.row_trace import Lengths
from engram_lm.simulate.serve_plan import FREE, Load, ServePlan
from engram_lm.simulate.serving import Serving
from engram_lm.simulate.tiers import Tier, dram, nvme
from engram_lm.studies.record import Record
from engram_lm.train.served_text import served_trace, warm_lengths
from engram_lm.train.shards import Shards

WARM = 500_000
"""Tokens that tiers have been asked for before the load begins."""
SIZES = (1, 4, 16)
"""GB of DRAM before the disk."""
IOPS = (5e4, 2.5e5, 1e6, 2.5e6, 1e7)
AHEAD = 512 * 2**20
SINGLE = ("dram", "nvme", "dram4", "dram16")
"""Arms that one request at a time is served from."""


class Kind(NamedTuple):
    """One load: mean tokens, requests and how many of them at a time."""

    lengths: Lengths
    requests: int
    loop: int


KINDS = {
    "prefill": Kind(Lengths(prompt=8192, output=64), 32, 16),
    "decode": Kind(Lengths(prompt=256, output=1024), 96, 64),
    "single": Kind(Lengths(prompt=256, output=1024), 2, 1),
}
COLOURS = {"prefill": BLUE, "decode": VERMILION}
MARKERS = {"prefill": "o", "decode": "s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("runs/debian/deepseek"))
    arguments = parser.parse_args()
    record, console = Record("serving_plan"), Console(stderr=True)
    summary: dict[str, float] = {}
    raw: dict[str, Any] = {}
    shards = Shards(arguments.data)
    for kind in KINDS:
        plan = _plan(shards, kind)
        summary[f"{kind}_trace_gb"] = sum(plan.trace.rows) * plan.row_bytes / 1e9
        free = plan.run([FREE])
        summary[f"{kind}_free_tokens_per_second"] = free.tokens_per_second
        for name, (tiers, serving) in _arms().items():
            if kind == "single" and name not in SINGLE:
                continue
            console.print(f"serving {kind} from {name}")
            found = replace(plan, serving=serving).on(tiers, free)
            raw[f"{kind} {name}"] = found
            summary |= {f"{kind}_{name}_{key}": value for key, value in _short(found).items()}
    save(_figure(summary), Path("results"), "serving_plan")
    record.write(summary, raw, seeds=[0])
    print(json.dumps(summary))


def _arms() -> dict[str, tuple[list[Tier], Serving]]:
    plain, ahead = Serving(), Serving(ahead_bytes=AHEAD)
    arms = {"dram": ([dram()], plain), "nvme": ([nvme()], plain), "nvme_ahead": ([nvme()], ahead)}
    for size in SIZES:
        both = [replace(dram(), size=int(size * 1e9)), nvme()]
        arms[f"dram{size:g}"] = (both, plain)
    arms["dram4_ahead"] = ([replace(dram(), size=4 * 10**9), nvme()], ahead)
    for iops in IOPS:
        arms[f"iops{iops:g}"] = ([replace(nvme(), iops=iops, bandwidth=iops * 5600)], plain)
    return arms


def _plan(shards: Shards, kind: str) -> ServePlan:
    lengths, requests, loop = KINDS[kind]
    budget = memory_budget("deepseek-v4.1")
    specification = budget.memory.specification
    canonical = specification.canonical_map(shards.encoder.fast())
    load = Load(lengths=lengths.draw(requests, 0), warm=WARM, loop=loop)
    served = load.lengths.sum(1)
    texts = [*warm_lengths(WARM, int(served.max())), *served.tolist()]
    addresses = CompiledAddresses(specification, canonical)
    return ServePlan(
        trace=served_trace(shards.split("train"), addresses, texts),
        layers=specification.layers,
        row_bytes=budget.row_format.row_bytes,
        table_rows=sum(budget.rows.values()),
        backbone=deepseek_v41(),
        node=Node(),
        serving=Serving(),
        load=load,
    )


def _short(found: dict[str, Any]) -> dict[str, float]:
    hits = found["hit_ratio"]
    return {
        "ratio": found["ratio"],
        "tokens_per_second": found["tokens_per_second"],
        "output_per_second": found["output_per_second"],
        "hits": hits.get("dram", 0.0),
        "ahead": found["ahead_ratio"],
        "waited": found["waited_share"],
        "wait1_p50_us": found["waits"]["1"]["p50"] * 1e6,
        "wait1_p99_ms": found["waits"]["1"]["p99"] * 1e3,
        "wait14_p99_ms": found["waits"]["14"]["p99"] * 1e3,
        "disk_busy": found["busy"].get("nvme", 0.0),
        "memory_dollars": found["memory_dollars"],
        "dollars_per_million": found["dollars_per_million"],
    }


def _figure(summary: dict[str, float]) -> Figure:
    with matplotlib.rc_context({"font.size": 10, "svg.fonttype": "path"}):
        figure = Figure(figsize=(8.6, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for kind in COLOURS:
            style = {"color": COLOURS[kind], "marker": MARKERS[kind], "linewidth": 1.4}
            names = ["nvme", *(f"dram{size:g}" for size in SIZES), "dram"]
            ratios = [summary[f"{kind}_{name}_ratio"] for name in names]
            left.plot(range(len(names)), ratios, label=f"mostly {kind}", **style)
            ahead = {0: "nvme_ahead", 1 + SIZES.index(4): "dram4_ahead"}
            values = [summary[f"{kind}_{name}_ratio"] for name in ahead.values()]
            style |= {"linestyle": "none", "markerfacecolor": "white"}
            left.plot([*ahead], values, label="  and prompts read ahead", **style)
            style |= {"linestyle": "-", "markerfacecolor": COLOURS[kind]}
            right.plot(IOPS, [summary[f"{kind}_iops{i:g}_ratio"] for i in IOPS], **style)
        ticks = ["none", *(f"{size:g} GB" for size in SIZES), "all"]
        left.set_xticks(range(len(ticks)), ticks)
        left.set_xlabel("DRAM before one NVMe disk")
        left.set_ylabel("tokens/s over those without any wait")
        left.legend(frameon=False, fontsize=8.5, loc="lower right")
        right.set_xscale("log")
        right.set_xlabel("rows a second from disk, no DRAM")
        right.xaxis.set_major_formatter(FuncFormatter(_reads))
        for axes in (left, right):
            _dress(axes)
        return figure


def _dress(axes: Axes) -> None:
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _reads(value: float, _position: int = 0) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"


if __name__ == "__main__":
    main()
