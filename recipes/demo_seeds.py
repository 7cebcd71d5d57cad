"""The demo's two arms with several seeds: how much of the difference is the seed.

    python recipes/demo_seeds.py --seeds 0 1 2

Trains into runs/demo-seeds/SEED (about ten minutes a seed on two cores; goes on where it was
interrupted) and writes results/demo.json. A seed sets the initial weights and the data's order;
both arms of a seed see the same tokens in the same order. The last line printed is the summary.
Faster with tcmalloc preloaded: docs/speed.md.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from engram_lm.studies.demo import demo, summary
from engram_lm.studies.record import Record
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig

MEASURES = (
    "moe_loss",
    "engram_loss",
    "engram_memory_off_loss",
    "difference_loss",
    "moe_bpb",
    "engram_bpb",
    "engram_memory_off_bpb",
    "difference_bpb",
    "moe_tokens_per_second",
    "engram_tokens_per_second",
    "speed_ratio",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=TrainConfig.tokens)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    keep_freed_memory()
    record = Record("demo")
    found: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        config = TrainConfig(tokens=arguments.tokens, seed=seed)
        out = Path("runs/demo-seeds") / str(seed)
        results = demo(config, out, Console(stderr=True), f"engram demo --seed {seed}")
        numbers = summary(results)
        numbers["difference_bpb"] = numbers["engram_bpb"] - numbers["moe_bpb"]
        speeds = numbers["engram_tokens_per_second"], numbers["moe_tokens_per_second"]
        numbers["speed_ratio"] = speeds[0] / speeds[1]
        found[str(seed)] = numbers
        print(json.dumps({key: numbers[key] for key in MEASURES}), flush=True)
    flat: dict[str, float] = {"seeds": len(found)}
    for name in MEASURES:
        values = [numbers[name] for numbers in found.values()]
        flat[f"{name}_mean"] = statistics.mean(values)
        flat[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    record.write(flat, found, seeds=arguments.seeds)
    print(json.dumps(flat))


if __name__ == "__main__":
    main()
