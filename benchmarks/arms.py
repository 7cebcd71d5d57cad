"""The demo's two models in training, for benchmarks that step them in turn."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram_lm import corpus
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.studies.demo import ARMS, make_model
from engram_lm.train.config import TrainConfig
from engram_lm.train.loop import Run
from engram_lm.train.text import wordnet_stream


@contextmanager
def both_arms(steps: int) -> Iterator[dict[str, Run]]:
    """Inside, a run of each arm that can take `steps` steps, with nothing but training in them."""
    config = TrainConfig(tokens=(steps + 1) * 4096, evaluate_every=10**6, checkpoint_every=10**6)
    tokenizer = corpus.tokenizer()
    canonical = CanonicalMap.from_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        runs = {
            name: Run(
                make_model(preset, canonical, 0),
                tokenizer,
                config,
                Path(directory) / preset,
                training=wordnet_stream("train", config.tokens + 1),
                validation=wordnet_stream("validation", 1000),
            )
            for name, preset in ARMS.items()
        }
        yield runs
        for run in runs.values():
            run.close()


def speeds_in_turn(runs: dict[str, Run], warm: int, counted: int) -> dict[str, list[float]]:
    """Tokens per second of each arm's counted steps."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(warm + counted):
        for name, run in runs.items():
            speed = run.step()["tokens_per_second"]
            if step >= warm:
                speeds[name].append(speed)
    return speeds
