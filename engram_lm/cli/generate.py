"""`engram generate`: continue a text, streamed."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram_lm.cli.models import memory_options, memory_places, open_model, open_tokenizer, opening
from engram_lm.cli.settings import prepare
from engram_lm.errors import ConfigError, DataError

HELP = "Continue a text, streamed."


def options(add: Callable[..., Any]) -> None:
    add(
        "--model",
        type=Path,
        default=Path("runs/demo/nano-engram/model"),
        help="directory (default: %(default)s)",
    )
    add("--prompt", required=True, help="text to continue; - reads it from standard input")
    add("--tokens", type=int, default=64, help="most new tokens (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    memory_options(add, "off")
    add("--tables", type=Path, help="directory of packed tables to read them from (`engram pack`)")


def run(arguments: argparse.Namespace) -> None:
    from contextlib import nullcontext

    from rich.console import Console
    from transformers import TextStreamer

    from engram_lm.model.metrics_table import metrics_table

    torch = prepare(None)
    if arguments.tokens < 1 or arguments.temperature < 0:
        raise ConfigError(
            f"tokens={arguments.tokens}, temperature={arguments.temperature}: "
            "at least 1, and 0 or more"
        )
    with opening(arguments.model):
        places = memory_places(arguments) | {"tables": arguments.tables}
        model = open_model(arguments.model, places).eval()
        if not hasattr(model.config, "memory_config"):
            raise DataError(f"{arguments.model}: a {model.config.model_type!r} without memory")
        tokenizer = open_tokenizer(arguments.model)
    if arguments.memory == "off" and model.config.memory is None:
        raise ConfigError("memory='off': this model has none")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*begin, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise DataError(f"prompt={prompt!r}: no tokens, and the tokenizer has none to begin with")
    torch.manual_seed(arguments.seed)
    streamer = None if arguments.json else TextStreamer(tokenizer, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0}
    with model.base_model.without_memory() if arguments.memory == "off" else nullcontext():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=arguments.tokens,
            streamer=streamer,
            **(sampling if arguments.temperature > 0 else {"do_sample": False}),
        )
    new = out[0, len(ids) :].tolist()
    served = model.base_model.served
    if served is not None and not arguments.json:
        Console(stderr=True).print(metrics_table(served.metrics()))
    if arguments.json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        record = {"prompt": prompt, "text": text, "token_ids": new, "memory": arguments.memory}
        if served is not None:
            layers = {layer: each.to_dict() for layer, each in served.metrics().items()}
            record["metrics"] = layers
        print(json.dumps(record))
