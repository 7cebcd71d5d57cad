"""The demo's two arms with several seeds: how much of the difference is the seed.

    python recipes/demo_seeds.py --seeds 0 1 2

Trains into runs/demo-seeds/PRECISION/SEED (about ten minutes a seed on two cores; goes on where it
was interrupted) and writes results/demo_PRECISION.json: fp32 or bf16, by default the one that suits
this machine. A seed sets the initial weights and the data's order; both arms of a seed see the same
tokens in the same order. Means, standard deviations over seeds, and half the width of the mean's 95
% interval by Student's t. The last line printed is the summary. Faster with tcmalloc preloaded:
docs/speed.md.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from engram_lm.analysis.student import spread
from engram_lm.precision import PRECISIONS, choose
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
    "minutes",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=TrainConfig.tokens)
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    arguments = parser.parse_args()
    precision = choose(arguments.precision).name
    torch.set_flush_denormal(True)
    keep_freed_memory()
    record = Record(f"demo_{precision}", precision)
    found: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        config = TrainConfig(tokens=arguments.tokens, seed=seed, precision=precision)
        out = Path("runs/demo-seeds") / precision / str(seed)
        command = f"engram demo --seed {seed} --set train.precision={precision}"
        begun = time.perf_counter()
        results = demo(config, out, Console(stderr=True), command)
        numbers = summary(results)
        numbers["minutes"] = (time.perf_counter() - begun) / 60
        numbers["difference_bpb"] = numbers["engram_bpb"] - numbers["moe_bpb"]
        speeds = numbers["engram_tokens_per_second"], numbers["moe_tokens_per_second"]
        numbers["speed_ratio"] = speeds[0] / speeds[1]
        found[str(seed)] = numbers
        print(json.dumps({key: numbers[key] for key in MEASURES}), flush=True)
    flat: dict[str, float] = {"seeds": len(found)}
    for name in MEASURES:
        values = [numbers[name] for numbers in found.values()]
        flat |= {f"{name}_{what}": value for what, value in spread(values).items()}
    record.write(flat, found, seeds=arguments.seeds)
    print(json.dumps(flat))


if __name__ == "__main__":
    main()
