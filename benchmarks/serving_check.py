"""Steps with tables on disk, predicted by the simulation and set beside those measured.

    python benchmarks/offload.py
    python benchmarks/serving_check.py

Reads results/offload.json: what it knows of a cell are the steps with the table in memory and the
rows that were missed; of the machine, the disk alone. Nothing is fitted to a cell. Ceiling: a ratio
of one. Writes results/serving_check.json; the last line printed is its summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from engram_lm.simulate.step_time import step_times
from engram_lm.simulate.tiers import PAGE, Queue, Tier
from engram_lm.studies.record import Record

LARGE, SMALL = 6144, 24
"""Rows of the requests that serving_steps.py tells a machine by."""


class Machine(NamedTuple):
    """What a store on disk does alone."""

    kept: Tier
    disk: Tier
    asking: float
    """Seconds in which the model's own thread asks for a layer's rows,"""
    asking_row: float
    """and for each row besides."""
    taken: float
    """Seconds that compute loses for each CPU second of reading."""


class Cell(NamedTuple):
    """Steps of one arm. rows: of a layer and step; missed: of each step, each layer's."""

    seconds: list[float]
    rows: float
    missed: list[list[float]]


class Base(NamedTuple):
    """Steps with the tables in memory: when rows had been asked for, layers reached, all done."""

    asked: float
    reached: list[float]
    seconds: float


def check(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of what serving_steps.py measured: cell -> seconds of a step, the median measured and the
    median predicted."""
    cells, machine = measured["cells"], _machine(measured["machine"])
    found = {}
    for name, cell in cells.items():
        phase, _, arm = name.rpartition("/")
        if arm == "ram":
            continue
        base = cells[f"{phase}/ram"]
        found[name] = _predicted(
            Cell(cell["seconds"], cell["rows"], cell["missed"]),
            Base(median(base["asked"]), _medians(base["reached"]), median(base["seconds"])),
            machine,
            early=arm != "sync",
        )
    return found


def check_offload(raw: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The same of the raw part of results/offload.json; `sync` counts no rows and is left out."""
    cells, machine = raw["cells"], _offload_machine(raw["facts"]["disk"])
    found = {}
    for name, cell in cells.items():
        phase, _, arm = name.rpartition("/")
        if arm not in ("cached", "disk"):
            continue
        base = cells[f"{phase}/ram"]
        layers = len(base["begins"][0])
        missed = [[float(rows) / layers] * layers for rows in cell["missed"]]
        found[name] = _predicted(
            Cell(cell["seconds"], median(cell["unique"]) / layers, missed),
            Base(0.0, _medians(base["begins"]), median(base["seconds"])),
            machine,
            early=True,
        )
    return found


def _medians(values: list[list[float]]) -> list[float]:
    return [median(each) for each in zip(*values, strict=True)]


def _predicted(cell: Cell, base: Base, machine: Machine, *, early: bool) -> dict[str, float]:
    compute = [b - a for a, b in pairwise([base.asked, *base.reached, base.seconds])]
    ends = []
    for missed in cell.missed:
        rows_GK = [[round(max(0.0, cell.rows - rows)), round(rows)] for rows in missed]
        asking = (machine.asking + machine.asking_row * cell.rows) * len(missed) if early else 0.0
        times = step_times(
            base.asked + asking,
            compute,
            rows_GK,
            [Queue(tier, 1) for tier in (machine.kept, machine.disk)],
            early=early,
            taken=machine.taken,
        )
        ends.append(times.end)
    return {"measured": median(cell.seconds), "predicted": median(ends)}


def _machine(told: Mapping[str, float]) -> Machine:
    between = (told[f"seconds_{LARGE}"] - told[f"seconds_{SMALL}"]) / (LARGE - SMALL)
    asking_row = (told[f"asking_{LARGE}"] - told[f"asking_{SMALL}"]) / (LARGE - SMALL)
    asking = told[f"asking_{SMALL}"]
    return Machine(
        kept=Tier(name="kept", cpu=told["kept_cpu"]),
        disk=_disk(
            between,
            few=told[f"seconds_{SMALL}"] - asking,
            few_cpu=told[f"cpu_{SMALL}"] - asking,
            cpu=told[f"cpu_{LARGE}"] / LARGE,
        ),
        asking=asking - SMALL * asking_row,
        asking_row=asking_row,
        taken=told["taken"],
    )


def _offload_machine(told: Mapping[str, float]) -> Machine:
    """Asking and what compute loses are not measured there: nothing, and even shares."""
    disk = _disk(
        1 / told["rows_per_second"],
        few=told["ms_24_rows"] * 1e-3,
        few_cpu=told["cpu_us_per_row_of_24"] * SMALL * 1e-6,
        cpu=told["cpu_us_per_row"] * 1e-6,
    )
    taken = 1 / (os.cpu_count() or 1)
    return Machine(Tier(name="kept"), disk, asking=0.0, asking_row=0.0, taken=taken)


def _disk(between: float, *, few: float, few_cpu: float, cpu: float) -> Tier:
    """From seconds between rows of a large request, and seconds and CPU seconds of a small one."""
    return Tier(
        name="disk",
        iops=1 / between,
        latency=max(few - (SMALL - 1) * between, between),
        block=PAGE,
        cpu=cpu,
        request_cpu=max(0.0, few_cpu - SMALL * cpu),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--offload", type=Path, default=Path("results/offload.json"))
    arguments = parser.parse_args()
    record = Record("serving_check")
    found = check_offload(json.loads(arguments.offload.read_text())["raw"])
    summary = {}
    for cell, seconds in found.items():
        name = cell.replace("/", "_")
        summary[f"{name}_ms"] = seconds["measured"] * 1e3
        summary[f"{name}_predicted_ms"] = seconds["predicted"] * 1e3
        summary[f"{name}_predicted_over_measured"] = seconds["predicted"] / seconds["measured"]
    record.write(summary, found, seeds=[0])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
