"""What the allocator and denormal numbers cost a training step, in processes that take turns.

    python benchmarks/allocators.py --tcmalloc /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4

Cases: glibc as it is; glibc told to keep freed memory (train/allocator.py), which is what `engram
train` does; tcmalloc, preloaded; and the second again with denormals not flushed. Each process
trains both arms of the demo in turn. Ceiling: the fastest case. Writes results/allocators.json; the
last line printed is its summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from arms import both_arms, speeds_in_turn

from engram_lm.studies.demo import ARMS
from engram_lm.studies.record import Record
from engram_lm.train.allocator import keep_freed_memory

CASES = ("glibc", "glibc_kept", "tcmalloc", "glibc_kept_denormals")
WARM, COUNTED = 2, 5

Speeds = dict[str, list[float]]


def measure(case: str) -> Speeds:
    """Tokens per second of each arm's counted steps, in this process."""
    torch.set_flush_denormal(case != "glibc_kept_denormals")
    if case.startswith("glibc_kept"):
        keep_freed_memory()
    with both_arms(WARM + COUNTED) as runs:
        return speeds_in_turn(runs, WARM, COUNTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tcmalloc", type=Path, required=True, help="the library to preload")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each case")
    parser.add_argument("--case", choices=CASES, help="measure this one, here")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(arguments.case)))
        return
    record = Record("allocators", precision="auto")
    speeds: dict[str, Speeds] = {case: {name: [] for name in ARMS} for case in CASES}
    for _ in range(arguments.rounds):
        for case in CASES:
            preload = {"LD_PRELOAD": str(arguments.tcmalloc)} if case == "tcmalloc" else {}
            found = subprocess.run(
                [sys.executable, *sys.argv, "--case", case],
                env={**os.environ, **preload},
                check=True,
                stdout=subprocess.PIPE,
            )
            for name, values in json.loads(found.stdout.splitlines()[-1]).items():
                speeds[case][name] += values
    summary: dict[str, float] = {}
    for name in ARMS:
        medians = {case: statistics.median(speeds[case][name]) for case in CASES}
        for case, median in medians.items():
            summary[f"{name.lower()}_{case}_tokens_per_second"] = median
            summary[f"{name.lower()}_{case}_over_glibc"] = median / medians["glibc"]
    record.write(summary, {"tokens_per_second": speeds}, seeds=[0])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
