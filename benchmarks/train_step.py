"""Training speed of the Engram model beside its MoE twin, step by step in turn.

    python benchmarks/train_step.py

The arms take turns within one process, so that the machine's drift falls on both; the ratio of
medians is what counts. Ceiling: the twin itself, because both have equal FLOPs. Some more steps are
taken with a stopwatch at each part. Writes results/train_step.json; the last line printed is its
summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import statistics
from collections import defaultdict

import torch
from arms import both_arms, speeds_in_turn
from step_parts import watched

from engram_lm.studies.demo import ARMS
from engram_lm.studies.record import Record
from engram_lm.train.allocator import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="counted steps of each arm")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    keep_freed_memory()
    record, warm, timed = Record("train_step", precision="auto"), 3, 10
    with both_arms(warm + arguments.steps + timed) as runs:
        speeds = speeds_in_turn(runs, warm, arguments.steps)
        parts: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ARMS}
        for _ in range(timed):
            for name, run in runs.items():
                with watched(run) as milliseconds:
                    run.step()
                for part, value in milliseconds.items():
                    parts[name][part].append(value)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    pairs = [e / m for e, m in zip(speeds["Engram"], speeds["MoE"], strict=True)]
    summary = {
        "moe_tokens_per_second": medians["MoE"],
        "engram_tokens_per_second": medians["Engram"],
        "ratio_of_medians": medians["Engram"] / medians["MoE"],
        "median_ratio_of_pairs": statistics.median(pairs),
    }
    for name, each in parts.items():
        for part, values in each.items():
            summary[f"{name.lower()}_ms_{part}"] = statistics.median(values)
    raw = {"tokens_per_second": speeds, "milliseconds": parts}
    record.write(summary, raw, seeds=[0])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
