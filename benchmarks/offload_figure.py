"""The numbers and the figure of benchmarks/offload.py, made of its record.

Redrawn from the file alone: python benchmarks/offload_figure.py
"""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

ARMS = {
    "ram": ("#444444", "in memory"),
    "cached": ("#0072B2", "cache of 25 % over disk"),
    "disk": ("#56B4E9", "disk, no cache"),
    "sync": ("#D55E00", "disk, read when wanted"),
}
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""

PAIRS = [(arm, "none") for arm in ARMS] + [(arm, "ram") for arm in ARMS if arm != "ram"]

Cells = dict[str, dict[str, list[Any]]]


def ratio(cells: Cells, key: str, arm: str, other: str) -> tuple[float, float, float]:
    """Throughput of an arm over another's: the median over rounds, and its 95 % interval drawn from
    rounds with replacement."""
    taken = [np.array(cells[f"{key}/{each}"]["seconds"]) for each in (other, arm)]
    rounds_N = taken[0] / taken[1]
    drawn_DN = np.random.default_rng(0).choice(rounds_N, (2000, len(rounds_N)))
    low, high = np.quantile(np.median(drawn_DN, axis=1), [0.025, 0.975])
    return float(np.median(rounds_N)), float(low), float(high)


def disk_bound(cells: Cells, facts: dict[str, Any], key: str, arm: str) -> float:
    """Throughput over that in memory, were the disk's rate of rows all that limits it."""
    each = cells[f"{key}/{arm}"]
    reading = statistics.median(each["missed"]) / facts["disk"]["rows_per_second"]
    return min(1.0, statistics.median(cells[f"{key}/ram"]["seconds"]) / reading)


def keys(cells: Cells) -> list[str]:
    """Backbone, phase and batch, in the order measured."""
    return list(dict.fromkeys(key.rpartition("/")[0] for key in cells))


def summarize(cells: Cells, facts: dict[str, Any]) -> dict[str, float]:
    """Flat: name -> number."""
    summary = {f"disk_{name}": value for name, value in facts["disk"].items()}
    for key in keys(cells):
        name = key.replace("/", "_").replace(".", "_")
        for arm in ("none", *ARMS):
            each = cells[f"{key}/{arm}"]
            speed = each["tokens"][0] / statistics.median(each["seconds"])
            summary[f"{name}_{arm}_tokens_per_second"] = speed
        for arm, other in (*PAIRS, ("none_there", "none")):
            found = ratio(cells, key, arm, other)
            for part, value in zip(("", "_low", "_high"), found, strict=True):
                summary[f"{name}_{arm}_over_{other}{part}"] = value
        for arm in ("cached", "disk"):
            each = cells[f"{key}/{arm}"]
            summary[f"{name}_{arm}_bound"] = disk_bound(cells, facts, key, arm)
            summary[f"{name}_{arm}_wait_ms"] = 1e3 * statistics.median(each["waited"])
            summary[f"{name}_{arm}_miss_share"] = sum(each["missed"]) / sum(each["asked"])
            reading, asked = 1e6 * sum(each["reader_cpu_seconds"]), sum(each["asked"])
            summary[f"{name}_{arm}_cpu_us_per_row"] = reading / asked
            summary[f"{name}_{arm}_cpu_us_per_row_read"] = reading / max(1, sum(each["missed"]))
            summary[f"{name}_{arm}_bytes_read"] = statistics.median(each["bytes_read"])
    for backbone, each in facts.items():
        if isinstance(each, dict) and "limit" in each:
            name = backbone.replace(".", "_")
            for fact in ("peak_without_rows", "budget", "limit", "peak", "times_at_limit"):
                summary[f"{name}_{fact}"] = each[fact]
    first = facts.get("first_token_seconds")
    if first:
        for arm, values in first.items():
            summary[f"first_token_{arm}_seconds"] = statistics.median(values)
    return summary


def draw(cells: Cells, facts: dict[str, Any], record: Path) -> None:
    """Beside the record, as SVG and PNG: one panel a backbone and phase."""
    panels = list(dict.fromkeys(key.rpartition("/b")[0] for key in keys(cells)))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.1 * len(panels) + 0.6, 3.6), sharey=True, squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        batches = [key for key in keys(cells) if key.startswith(f"{panel}/")]
        for place, key in enumerate(batches):
            for offset, (arm, (colour, label)) in enumerate(ARMS.items()):
                x = place + 0.2 * (offset - 1.5)
                height, low, high = ratio(cells, key, arm, "none")
                axis.bar(x, height, 0.18, color=colour, label=None if place else label)
                axis.vlines(x, low, high, color="#777777", lw=0.8)
                if arm != "ram":
                    text = f"{ratio(cells, key, arm, 'ram')[0]:.2f}"
                    axis.text(x, 0.02, text, ha="center", fontsize=6, color="white", rotation=90)
                if arm in ("cached", "disk"):
                    in_memory = ratio(cells, key, "ram", "none")[0]
                    bound = disk_bound(cells, facts, key, arm) * in_memory
                    axis.hlines(bound, x - 0.1, x + 0.1, color="black", lw=1.2)
        axis.set_title(panel.replace("/", ", "), fontsize=9)
        axis.set_xticks(range(len(batches)), [key.rpartition("/b")[2] for key in batches])
        axis.set_xlabel("sequences")
        axis.axhline(1, color="#999999", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens/s, of those without memory")
    axes[0][0].set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", lw=1.2))
    labels.append("bound by the disk's rows/s")
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    for suffix in (".svg", ".png"):
        figure.savefig(record.with_suffix(suffix), dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    path = Path("results/offload.json")
    raw = json.loads(path.read_text())["raw"]
    draw(raw["cells"], raw["facts"], path)
