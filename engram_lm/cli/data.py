"""`engram data`: turn your own text into token shards."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

HELP = "Turn text, JSONL, Parquet or a Hugging Face data set into token shards to train on."


def options(add: Callable[..., Any]) -> None:
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="FILE.txt or .md (one document), .jsonl, .parquet, a directory of them, or hf:NAME",
    )
    add("--out", type=Path, required=True, help="directory; goes on if it was interrupted")
    add("--tokenizer", type=Path, required=True, help="tokenizer.json, or a directory with one")
    add("--separator", help="token before each document (default: the tokenizer's eos_token)")
    add("--field", default="text", help="that holds the document (default: %(default)s)")
    add("--config", help="of hf:NAME")
    add("--split", default="train", help="of hf:NAME (default: %(default)s)")
    add(
        "--validation",
        type=float,
        default=0.01,
        help="share of documents held out (default: %(default)s)",
    )
    add("--shard-tokens", type=int, default=2**26, help="about (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from engram_lm.train.encoder import Encoder
    from engram_lm.train.prepare import Request, prepare

    request = Request(
        sources=tuple(arguments.sources),
        field=arguments.field,
        config=arguments.config,
        split=arguments.split,
        validation=arguments.validation,
        shard_tokens=arguments.shard_tokens,
    )
    encoder = Encoder.open(arguments.tokenizer, arguments.separator)
    if not arguments.json:
        print(
            f"engram data: {len(request.sources)} sources, {encoder.token_ids:,} token ids, "
            f"{encoder.separator!r} before each document, into {arguments.out}"
        )
    started = time.perf_counter()
    index = prepare(request, encoder, arguments.out, Console(stderr=True))
    totals = {
        split: {
            count: sum(shard[split][count] for shard in index["shards"])
            for count in ("tokens", "documents", "bytes")
        }
        for split in ("train", "validation")
    }
    if not arguments.json:
        grid = Grid("source", "documents", "bytes", "duplicates", "empty")
        for source in index["sources"]:
            name, *counts = source.values()
            grid.add_row(name, *(f"{count:,}" for count in counts))
        Console().print(grid)
    record = {
        "command": "data",
        "out": str(arguments.out),
        "shards": len(index["shards"]),
        **totals,
        "duplicates": sum(source["duplicates"] for source in index["sources"]),
        "empty": sum(source["empty"] for source in index["sources"]),
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(record))
