"""`engram pack`: turn a checkpoint's tables into packed files and back, and check such files."""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engram_lm.errors import ConfigError

HELP = (
    "Pack the tables of a checkpoint into one file a layer, and back, in bounded memory; goes on "
    "where it was interrupted. With --verify, check packed files (exit status 1 if damaged)."
)


def options(add: Callable[..., Any]) -> None:
    add(
        "source",
        nargs="?",
        type=Path,
        metavar="SOURCE",
        help="directory of a model (save_pretrained, DeepSeek-V4.1, Qwen4-Exp), or a packed FILE",
    )
    add("--out", type=Path, help="directory for table-LAYER.safetensors")
    add(
        "--dtype",
        help="fp32, bf16, fp16, fp8, int8 or int4 (default: as stored, bytes unchanged)",
    )
    add(
        "--layout",
        default="packed",
        help="packed; or deepseek-v4.1, qwen4-exp or trainable: one table under the tensor names "
        "of such a checkpoint (default: %(default)s)",
    )
    add("--layers", help="zero-based, as 1,14 (default: all)")
    add("--tokenizer", type=Path, help="of a DeepSeek-V4.1 checkpoint without tokenizer.json")
    add("--verify", nargs="+", type=Path, metavar="FILE", help="read packed files and check them")


def run(arguments: argparse.Namespace) -> int:
    if arguments.verify is not None:
        if arguments.source is not None or arguments.out is not None:
            raise ConfigError("--verify: takes packed files and nothing else")
        return _verify(arguments)
    if arguments.source is None or arguments.out is None:
        raise ConfigError("give a SOURCE and --out, or --verify and packed files")
    _pack(arguments)
    return 0


def _pack(arguments: argparse.Namespace) -> None:
    from engram_lm.memory.rows import RowFormat
    from engram_lm.store import aside
    from engram_lm.store.byte_bar import byte_bar
    from engram_lm.store.pack import check_layout, pack
    from engram_lm.store.source import open_sources

    started = time.perf_counter()
    found = {each.layer: each for each in open_sources(arguments.source, arguments.tokenizer)}
    sources = [found[layer] for layer in _layers(arguments.layers, list(found))]
    tables = []
    for source in sources:
        stored, name = source.format, arguments.dtype
        same = name is None or name == stored.name
        format = stored if same else RowFormat.named(name, stored.dim)
        check_layout(arguments.layout, format)
        path = arguments.out / f"table-{source.layer:05}.safetensors"
        tables.append((source, format, path))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for source, format, path in tables:
        size = source.rows * format.row_bytes
        if not arguments.json:
            print(
                f"layer {source.layer}: {source.rows:,} rows of {source.format.name} "
                f"({source.format.row_bytes} B) as {format.name} ({format.row_bytes} B), "
                f"{size / 1e9:.2f} GB, into {path}"
            )
        with byte_bar() as bar:
            task = bar.add_task(f"layer {source.layer}", total=size)
            pack(source, format, arguments.layout, path, partial(bar.advance, task))
    for _, _, path in tables:
        aside.journal(path).unlink(missing_ok=True)
    record = {
        "command": "pack",
        "layout": arguments.layout,
        "specification_sha256": sources[0].specification.digest,
        "tables": [
            {
                "file": str(path),
                "layer": source.layer,
                "rows": source.rows,
                "dtype": format.name,
                "row_bytes": format.row_bytes,
            }
            for source, format, path in tables
        ],
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(record))


def _verify(arguments: argparse.Namespace) -> int:
    from engram_lm.store.byte_bar import byte_bar
    from engram_lm.store.packed import Packed

    started, files = time.perf_counter(), []
    for path in arguments.verify:
        packed = Packed.open(path)
        with byte_bar() as bar:
            task = bar.add_task(path.name, total=packed.region.end - packed.region.offset)
            damaged = [each._asdict() for each in packed.damaged(partial(bar.advance, task))]
        files.append({"file": str(path), "sha256": packed.sha256, "damaged": damaged})
        if not arguments.json:
            rows = f"{packed.region.rows:,} rows of {packed.label.format.name}"
            print(f"{path}: {rows}, {'damaged' if damaged else 'whole'}")
            for each in damaged:
                print(f"  block {each['block']}: among rows {each['first']} to {each['last'] - 1}")
    seconds = time.perf_counter() - started
    print(json.dumps({"command": "pack", "verify": files, "seconds": seconds}))
    return int(any(each["damaged"] for each in files))


def _layers(text: str | None, there: list[int]) -> list[int]:
    if text is None:
        return there
    wanted = text.split(",")
    if not all(layer.strip().isdigit() and int(layer) in there for layer in wanted):
        raise ConfigError(f"--layers {text}: the source has {', '.join(map(str, there))}")
    return sorted({int(layer) for layer in wanted})
