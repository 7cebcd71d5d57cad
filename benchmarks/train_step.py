"""Training speed of the Engram model beside its MoE twin, step by step in turn.

    python benchmarks/train_step.py

The arms take turns within one process, so that the machine's drift falls on both; the ratio of
medians is what counts. Ceiling: the twin itself, because both have equal FLOPs. Some more steps are
taken with a stopwatch at each part. Writes results/train_step.json; the last line printed is its
summary.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from step_parts import watched

from engram_lm.memory.canonical import CanonicalMap
from engram_lm.studies.demo import ARMS, make_model
from engram_lm.studies.record import Record
from engram_lm.train import corpus
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig
from engram_lm.train.loop import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="counted steps of each arm")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    keep_freed_memory()
    record, warm, timed = Record("train_step"), 3, 10
    steps = warm + arguments.steps + timed
    config = TrainConfig(tokens=(steps + 1) * 4096, evaluate_every=10**6, checkpoint_every=10**6)
    tokenizer = corpus.tokenizer()
    canonical = CanonicalMap.from_tokenizer(tokenizer)
    speeds: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as directory:
        runs = {
            name: Run(
                make_model(preset, canonical, 0),
                tokenizer,
                config,
                Path(directory) / preset,
                training=corpus.stream("train", config.tokens + 1),
                validation=corpus.stream("validation", 1000),
            )
            for name, preset in ARMS.items()
        }
        for step in range(warm + arguments.steps):
            for name, run in runs.items():
                speed = run.step()["tokens_per_second"]
                if step >= warm:
                    speeds[name].append(speed)
        parts: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ARMS}
        for _ in range(timed):
            for name, run in runs.items():
                with watched(run) as milliseconds:
                    run.step()
                for part, value in milliseconds.items():
                    parts[name][part].append(value)
        for run in runs.values():
            run.close()
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
