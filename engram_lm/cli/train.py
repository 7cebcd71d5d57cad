"""`engram train`: train one model on the WordNet corpus, or on token shards."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from engram_lm.cli.models import opening
from engram_lm.cli.settings import overcommits, prepare, setting, settings, train_config
from engram_lm.errors import ConfigError

HELP = "Train one model on the WordNet corpus, or on what `engram data` made."


def options(add: Callable[..., Any]) -> None:
    add("--preset", help="nano-moe or nano-engram (default: nano-engram)")
    add("--from", type=Path, dest="origin", metavar="DIR", help="start from this saved model")
    add("--out", type=Path, required=True, help="directory; goes on if it holds a checkpoint")
    add("--data", type=Path, help="directory of `engram data` (default: the WordNet corpus)")
    add("--tokens", type=int, default=1_100_000, help="to train on (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and data order (default: %(default)s)")
    add("--threads", type=int, help="processor threads (default: all cores)")
    add("--device", default="cpu", help="cpu, or cuda where there is one (default: %(default)s)")
    setting(add, "train.lr=0.002, model.hidden_size=256")


def run(arguments: argparse.Namespace) -> None:
    from engram_lm.model.presets import configure, for_vocabulary, preset
    from engram_lm.model.units import size_text
    from engram_lm.precision import choose
    from engram_lm.train import initial, memory_needed, text
    from engram_lm.train.allocator import keep_freed_memory
    from engram_lm.train.batches import check_step
    from engram_lm.train.config import TrainConfig
    from engram_lm.train.journal import read_metrics
    from engram_lm.train.loop import Run
    from engram_lm.train.turns import train
    from engram_lm.train.workers import Workers

    changes = settings(arguments.set, ("train", "model", "machine"))
    overcommit = overcommits(changes["machine"])
    torch = prepare(arguments.threads)
    keep_freed_memory()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': this machine has none; accepted here is cpu")
    if arguments.device not in ("cpu", "cuda"):
        raise ConfigError(f"device={arguments.device!r}: accepted are cpu and cuda")
    if arguments.origin is not None and (arguments.preset or changes["model"]):
        raise ConfigError("--from: a saved model is as it is; --preset and model.* are not taken")
    name = arguments.preset or "nano-engram"
    workers = Workers.join(arguments.device)
    # A mistake in what all workers were given is told once, by main.
    with workers.main_first("the settings"):
        given = {"tokens": arguments.tokens, "seed": arguments.seed}
        config = train_config(TrainConfig(), given | changes["train"])
        model_config = preset(name)
    if arguments.data is None:
        found = text.wordnet(config.tokens + 1, workers)
    else:
        found = text.token_shards(arguments.data, workers)
    tokenizer, encoder = found.tokenizer, found.encoder
    saved = None
    with workers.main_first("what belongs together"):
        check_step(found.training, config, workers)
        if arguments.origin is not None:
            name = str(arguments.origin)
            with opening(arguments.origin):
                saved = initial.read(arguments.origin, tokenizer)
        else:
            if encoder is not None:
                model_config = for_vocabulary(
                    model_config,
                    token_ids=encoder.token_ids,
                    separator_id=encoder.separator_id,
                    padding_id=encoder.padding_id,
                )
            if model_config.memory is not None and config.table_dtype != "fp32":
                changes["model"].setdefault("table_dtype", config.table_dtype)
            model_config = configure(model_config, changes["model"])
            initial.check_vocabulary(model_config, tokenizer)
        wanted = model_config if saved is None else saved.config
        # Before any of it is taken. What another precision would save is little.
        counted = replace(config, precision=choose(config.precision, workers.device).name)
        memory = memory_needed.needed(wanted, counted, workers)
        if workers.main and not overcommit:
            memory_needed.check(memory, workers, name)
    if saved is not None:
        model = initial.load(saved, workers)
    else:
        model = initial.fresh(model_config, tokenizer, workers, config.seed)
    run = Run(
        model,
        tokenizer,
        config,
        arguments.out,
        training=found.training,
        validation=found.validation,
        workers=workers,
        origin=None if saved is None else saved.sha256,
    )
    if workers.main and not arguments.json:
        print(
            f"engram train: {name}, step {run.step_number} of {config.steps}, into {arguments.out}"
        )
    if workers.main:
        print(
            f"precision {run.precision}, {torch.get_num_threads()} threads, about "
            f"{size_text(memory.total)} of memory",
            file=sys.stderr,
        )
    train([run], [name])
    run.close()
    workers.close()
    if not workers.main:
        return
    last = read_metrics(arguments.out)[-1]
    print(json.dumps({"command": "train", "preset": name, "precision": run.precision.name, **last}))
