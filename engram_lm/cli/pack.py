"""`engram pack`: turn a checkpoint's tables into packed files and back, and check such files."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_lm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from engram_lm.store.source import Source

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
    add(
        "--hot",
        metavar="SHARE",
        help="copy the rows that --data asks for most to the front, for a cache to begin with: a "
        "share of the table as 0.03, or how many",
    )
    add("--data", type=Path, help="of `engram data`: its train split is counted for --hot")
    add("--verify", nargs="+", type=Path, metavar="FILE", help="read packed files and check them")


def run(arguments: argparse.Namespace) -> int:
    if arguments.verify is not None:
        given = arguments.source, arguments.out, arguments.hot, arguments.data
        if any(each is not None for each in given):
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
        if arguments.hot is not None and arguments.layout != "packed":
            raise ConfigError(f"--hot: a {arguments.layout} table has no place for hot rows")
        path = arguments.out / f"table-{source.layer:05}.safetensors"
        tables.append((source, format, path))
    hot = _hot_rows(arguments, sources)
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
            advance = partial(bar.advance, task)
            pack(source, format, arguments.layout, path, advance, hot_K=hot.get(source.layer))
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
                "hot_rows": len(hot.get(source.layer, ())),
            }
            for source, format, path in tables
        ],
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(record))


def _hot_rows(arguments: argparse.Namespace, sources: Sequence[Source]) -> dict[int, Tensor]:
    """Numbers of each layer's hot rows; none without --hot."""
    if (arguments.hot is None) != (arguments.data is None):
        raise ConfigError("--hot and --data: give both or neither")
    if arguments.hot is None:
        return {}
    from engram_lm.memory.ngrams import Addresses
    from engram_lm.store.byte_bar import byte_bar
    from engram_lm.store.hot import MULTIPLE
    from engram_lm.train.hot_rows import count_rows, hottest
    from engram_lm.train.shards import Shards

    share = _share(arguments.hot, MULTIPLE)
    started, shards = time.perf_counter(), Shards(arguments.data)
    split, specification = shards.split("train"), sources[0].specification
    addresses = Addresses(specification, specification.canonical_map(shards.encoder.fast()))
    layers = [source.layer for source in sources]
    width = split.shards[0].ids_T.itemsize
    with byte_bar() as bar:
        task = bar.add_task("counting rows", total=len(split) * width)
        counts = count_rows(
            split, addresses, layers, lambda tokens: bar.advance(task, tokens * width)
        )
    hot = {}
    for source in sources:
        counts_V = counts[source.layer]
        most = int(share * source.rows if share < 1 else share)
        rows_K = hot[source.layer] = hottest(counts_V, most)
        if not len(rows_K):
            raise ConfigError(
                f"--hot {arguments.hot}: fewer than {MULTIPLE} rows of layer {source.layer} that "
                f"{arguments.data} asks for"
            )
        if not arguments.json:
            asked = counts_V[rows_K.numpy()].sum(dtype=int) / counts_V.sum(dtype=int)
            print(
                f"layer {source.layer}: {len(rows_K):,} hot rows "
                f"({len(rows_K) / source.rows:.1%}), {asked:.1%} of what {len(split):,} tokens "
                "ask for"
            )
    if not arguments.json:
        size = sum(each.nbytes for each in counts.values())
        print(
            f"counted in {time.perf_counter() - started:,.1f} s and {size / 1e6:,.0f} MB of memory"
        )
    return hot


def _share(text: str, least: int) -> float:
    """Below 1: of the rows; else how many."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if 0 < share < 1 or (share >= least and share.is_integer()):
        return share
    raise ConfigError(
        f"--hot {text}: a share of the table's rows above 0 and below 1, or how many, from "
        f"{least} on"
    )


def _verify(arguments: argparse.Namespace) -> int:
    from engram_lm.store.byte_bar import byte_bar
    from engram_lm.store.packed import Packed

    started, files = time.perf_counter(), []
    for path in arguments.verify:
        packed = Packed.open(path)
        with byte_bar() as bar:
            regions = [packed.region, *([packed.hot.region] if packed.hot else [])]
            size = sum(region.end - region.offset for region in regions)
            task = bar.add_task(path.name, total=size)
            advance = partial(bar.advance, task)
            verified = packed.verify(advance)
        damaged = [each._asdict() for each in verified.damaged]
        copies = [each._asdict() for each in verified.damaged_copies]
        files.append(
            {
                "file": str(path),
                "sha256": verified.sha256,
                "recorded_sha256": packed.sha256,
                "damaged": damaged,
                "damaged_copies": copies,
            }
        )
        if not arguments.json:
            rows = f"{packed.region.rows:,} rows of {packed.label.format.name}"
            if packed.hot is not None:
                rows += f", {packed.hot.region.rows:,} hot ones"
            print(f"{path}: {rows}, {'damaged' if damaged or copies else 'whole'}")
            for each in damaged:
                print(f"  block {each['block']}: among rows {each['first']} to {each['last'] - 1}")
            for each in copies:
                places = f"{each['first']} to {each['last'] - 1}"
                print(f"  block {each['block']} of hot rows: among places {places}")
    seconds = time.perf_counter() - started
    print(json.dumps({"command": "pack", "verify": files, "seconds": seconds}))
    return int(any(each["damaged"] or each["damaged_copies"] for each in files))


def _layers(text: str | None, there: list[int]) -> list[int]:
    if text is None:
        return there
    wanted = text.split(",")
    if not all(layer.strip().isdigit() and int(layer) in there for layer in wanted):
        raise ConfigError(f"--layers {text}: the source has {', '.join(map(str, there))}")
    return sorted({int(layer) for layer in wanted})
