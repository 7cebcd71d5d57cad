"""Training speed of the Engram model beside its MoE twin, step by step in turn.

    python benchmarks/train_step.py

The arms take turns within one process, so that the machine's drift falls on both; the ratio of
medians is what counts. Ceiling: the twin itself, because both have equal FLOPs. Writes
results/train_step.json; the last line printed is its summary.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from engram_lm.memory.canonical import CanonicalMap
from engram_lm.studies.demo import ARMS, make_model
from engram_lm.studies.record import Record
from engram_lm.train import corpus
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig
from engram_lm.train.loop import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="counted steps of each arm")
    arguments = parser.parse_args()
    keep_freed_memory()
    record, warm = Record("train_step"), 3
    config = TrainConfig(
        tokens=(arguments.steps + warm + 1) * 4096, evaluate_every=10**6, checkpoint_every=10**6
    )
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
    record.write(summary, {"tokens_per_second": speeds}, seeds=[0])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
