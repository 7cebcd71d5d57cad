"""Steps with tables on disk, predicted by the simulation and set beside those measured."""

from itertools import pairwise
from statistics import median
from typing import Any

from engram_lm.model.step_time import step_times
from engram_lm.model.tiers import PAGE, Queue, Tier

ROW = 256
LARGE, SMALL = 6144, 24
"""Rows of the requests that the disk's tier is told by."""


def check(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Cell -> seconds of a step, the median of those measured and as predicted.

    What is known: where the layers stand and how long the step takes with tables in memory, the
    store's rows a second, latency and CPU time on its own, and the rows that each cell's cache
    lacked. Nothing is fitted to a cell.
    """
    cells, machine = measured["cells"], measured["machine"]
    tiers = tiers_of(machine)
    found = {}
    for name, cell in cells.items():
        phase, _, arm = name.rpartition("/")
        if arm == "ram":
            continue
        base = cells[f"{phase}/ram"]
        started = median(base["asked"])
        reached = [median(values) for values in zip(*base["reached"], strict=True)]
        whole = median(base["seconds"])
        marks = [started, *reached, whole]
        compute = [b - a for a, b in pairwise(marks)]
        predicted = []
        for missed in cell["missed"]:
            rows_GK = [[cell["rows"] - rows, rows] for rows in missed]
            queues = [Queue(tier, ROW) for tier in tiers]
            begun = started
            if arm != "sync":
                begun += asking(cell["rows"], machine) * len(missed)
            times = step_times(
                begun, compute, rows_GK, queues, early=arm != "sync", taken=machine["taken"]
            )
            predicted.append(times.end)
        found[name] = {"measured": median(cell["seconds"]), "predicted": median(predicted)}
    return found


def tiers_of(machine: dict[str, float]) -> list[Tier]:
    """The cache's memory and the disk, of what the store does alone."""
    between = (machine[f"seconds_{LARGE}"] - machine[f"seconds_{SMALL}"]) / (LARGE - SMALL)
    latency = machine[f"seconds_{SMALL}"] - machine[f"asking_{SMALL}"] - (SMALL - 1) * between
    cpu = machine[f"cpu_{LARGE}"] / LARGE
    few = machine[f"cpu_{SMALL}"] - machine[f"asking_{SMALL}"]
    return [
        Tier(name="kept", cpu=machine["kept_cpu"]),
        Tier(
            name="disk",
            iops=1 / between,
            latency=max(latency, between),
            block=PAGE,
            cpu=cpu,
            request_cpu=max(0.0, few - SMALL * cpu),
        ),
    ]


def asking(rows: int, machine: dict[str, float]) -> float:
    """Seconds that the model's own thread takes to ask for so many rows."""
    few, many = machine[f"asking_{SMALL}"], machine[f"asking_{LARGE}"]
    return few + (many - few) * max(0, rows - SMALL) / (LARGE - SMALL)
