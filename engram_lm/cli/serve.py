"""`engram serve`: a model behind the OpenAI interface, memory packs chosen by the model's name."""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engram_lm.cli.models import memory_options, memory_places, open_model, open_tokenizer, opening
from engram_lm.cli.settings import prepare
from engram_lm.errors import ConfigError

HELP = "Serve a model to OpenAI clients."
NEEDED = ("fastapi", "openai", "pydantic", "uvicorn")


def options(add: Callable[..., Any]) -> None:
    add("model", type=Path, help="directory: ours, attached, or any decoder that packs fit")
    add("--name", help="for clients (default: the directory's)")
    add(
        "--pack",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a memory pack; clients ask for MODEL/NAME, or MODEL/NAME+NAME for several",
    )
    add("--host", default="127.0.0.1", help="(default: %(default)s)")
    add("--port", type=int, default=8000, help="(default: %(default)s)")
    memory_options(add)
    add(
        "--batch",
        type=int,
        default=8,
        help="requests that are generated together at most (default: %(default)s)",
    )
    add("--threads", type=int, help="processor threads (default: all cores)")


def run(arguments: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is not installed: pip install 'engram-lm[serve]'")
    packs = [_pack(given) for given in arguments.pack]
    if arguments.batch < 1:
        raise ConfigError(f"--batch {arguments.batch}: at least 1")
    import uvicorn
    from rich.console import Console

    from engram_lm.model.attach import attach
    from engram_lm.model.pretrained import MemoryPreTrained
    from engram_lm.serving.openai_server import OneModel, server

    prepare(arguments.threads)
    name = arguments.name or arguments.model.resolve().name
    places = {}
    if arguments.memory == "disk" or arguments.memory_budget is not None:
        places = memory_places(arguments)
    with opening(arguments.model):
        model = open_model(arguments.model, places)
        tokenizer = open_tokenizer(arguments.model)
    if places and not packs and not isinstance(model, MemoryPreTrained):
        raise ConfigError(f"--memory {arguments.memory}: this model has no memory, and no pack")
    if packs and not isinstance(model, MemoryPreTrained):
        attach(model, None, None)
    elif packs and not hasattr(model, "load_pack"):
        raise ConfigError(f"{type(model).__name__}: packs are for other families' decoders")
    for pack, directory in packs:
        model.load_pack(pack, directory, **places)
    models = OneModel(name, model.eval(), tokenizer)
    where = f"http://{arguments.host}:{arguments.port}/v1"
    Console(stderr=True).print(f"serving {', '.join(models.names)} at {where}")
    application = server(models, arguments.batch)
    uvicorn.run(application, host=arguments.host, port=arguments.port, log_level="warning")


def _pack(given: str) -> tuple[str, Path]:
    name, equals, directory = given.partition("=")
    if not name or not equals or not directory or "/" in name or "+" in name:
        raise ConfigError(f"--pack {given}: NAME=DIR is needed, a name without / and +")
    return name, Path(directory)
