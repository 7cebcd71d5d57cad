"""The demo's learning rate: both arms trained whole at each of the same rates.

    python recipes/learning_rate.py --rates 0.008 0.016 0.032 0.064

Every arm gets every rate once, so that neither is tuned more than the other; weights and data order
are those of seed 3, which the demo's results do not use. Trains in runs/learning-rate/RATE (goes on
where it was interrupted) and writes results/demo_learning_rate.json: validation loss in nats a
token. The last line printed is the summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from engram_lm import corpus
from engram_lm.precision import PRECISIONS, choose
from engram_lm.studies.demo import ARMS, make_runs
from engram_lm.studies.record import Record
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig
from engram_lm.train.journal import read_metrics
from engram_lm.train.turns import train

RATES = (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)


def trained(config: TrainConfig, out: Path) -> dict[str, dict[str, Any]]:
    """The last logged step of each arm, after training both in turn."""
    training = corpus.tokens("train", config.tokens + 1, seed=0)
    validation = corpus.tokens("validation", seed=0)
    runs = make_runs(config, out, training.ids, validation.ids)
    train(list(runs.values()), [f"{arm}, lr {config.lr:g}" for arm in runs])
    for run in runs.values():
        run.close()
    return {arm: read_metrics(run.out)[-1] for arm, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--tokens", type=int, default=TrainConfig.tokens)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    keep_freed_memory()
    precision = choose(arguments.precision).name
    record = Record("demo_learning_rate", precision=precision)
    summary: dict[str, float] = {"tokens": arguments.tokens}
    raw = []
    for rate in arguments.rates:
        config = TrainConfig(
            tokens=arguments.tokens, seed=arguments.seed, lr=rate, precision=precision
        )
        out = Path("runs/learning-rate") / f"{rate:g}"
        for arm, last in trained(config, out).items():
            summary[f"{arm.lower()}_lr{rate:g}_loss"] = last["validation_loss"]
            summary[f"{arm.lower()}_lr{rate:g}_busiest_expert"] = last["expert_load"]
            raw.append({"arm": arm, "lr": rate, **last})
            print(f"{arm}, lr {rate:g}: {last['validation_loss']:.4f} nats a token", flush=True)
    for arm in ARMS:
        losses = {rate: summary[f"{arm.lower()}_lr{rate:g}_loss"] for rate in arguments.rates}
        summary[f"{arm.lower()}_best_lr"] = min(losses, key=losses.__getitem__)
    record.write(summary, {"runs": raw}, seeds=[arguments.seed])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
