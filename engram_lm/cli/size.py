"""`engram size`: rows per head for a corpus, from its distinct n-grams."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import accumulate, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from engram_lm.cli.settings import file_bytes, progress_bars
from engram_lm.errors import ConfigError

if TYPE_CHECKING:
    from engram_lm.analysis.ngram_counts import NgramCounter, OrderCounts
    from engram_lm.analysis.texts import Piece

HELP = "Print how many rows per head a corpus needs, from its distinct n-grams."
LADDER = (0.25, 0.5, 1, 2, 4)
HALVINGS = 6
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}


def options(add: Callable[..., Any]) -> None:
    add(
        "--text",
        type=Path,
        action="append",
        metavar="FILE",
        help='text, or .jsonl with a "text" in each line; may be repeated (default: WordNet)',
    )
    add("--tokenizer", type=Path, help="tokenizer.json, or a directory with one (default: ours)")
    add("--raw", action="store_true", help="count token ids as they are, not folded (Qwen4-Exp)")
    add("--tokens", type=int, help="read about so many at most (default: all)")
    add("--max-order", type=int, default=3, help="longest n-gram (default: %(default)s)")
    add("--heads", type=int, default=8, help="per order (default: %(default)s)")
    add("--head-dim", type=int, default=80, help="values per row (default: %(default)s)")
    add(
        "--share",
        type=float,
        default=0.01,
        help="of n-grams that may share their rows in every head (default: %(default)s)",
    )
    add("--rows", help="rows per head to look at, as 100000,200000 (default: around what is asked)")


def run(arguments: argparse.Namespace) -> None:
    from engram_lm import corpus
    from engram_lm.analysis.collisions import collisions, rows_for
    from engram_lm.analysis.ngram_counts import NgramCounter
    from engram_lm.memory.canonical import CanonicalMap, backend_of, vocabulary_size

    for name in ("tokens", "heads", "head_dim"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: at least 1")
    rows_for(2, arguments.heads, arguments.share)  # refuses a share before the work, not after
    asked = None if arguments.rows is None else _rows(arguments.rows)
    backend = backend_of(arguments.tokenizer or corpus.tokenizer_file())
    backend.no_truncation()
    backend.no_padding()
    if arguments.raw:
        canonical = CanonicalMap.identity(vocabulary_size(backend))
    else:
        canonical = CanonicalMap.from_tokenizer(backend)
    with NgramCounter(canonical, arguments.max_order) as counter:
        documents = _read(counter, backend, arguments.text or [], arguments.tokens)
        counts = _count(counter)
    orders = {}
    for count in counts:
        least = rows_for(count.distinct, arguments.heads, arguments.share)
        rows = asked or sorted({max(2, math.ceil(least * factor)) for factor in LADDER})
        orders[str(count.order)] = {
            "occurrences": count.occurrences,
            "distinct": count.distinct,
            "once": count.once,
            "growth": count.growth,
            "rows": least,
            "sizes": [
                {
                    **asdict(collisions(count, each, arguments.heads)),
                    "bytes": {
                        dtype: each * arguments.heads * arguments.head_dim * size
                        for dtype, size in VALUE_BYTES.items()
                    },
                }
                for each in rows
            ],
        }
    record = {
        "command": "size",
        "tokens": counter.tokens,
        "documents": documents,
        "heads": arguments.heads,
        "head_dim": arguments.head_dim,
        "share": arguments.share,
        "rows_per_head": [order["rows"] for order in orders.values()],
        "orders": orders,
    }
    if not arguments.json:
        _show(record)
    print(json.dumps(record))


def _read(counter: NgramCounter, backend: Any, paths: list[Path], limit: int | None) -> int:
    """Tokenises into the counter; returns how many documents there were."""
    from engram_lm.analysis.texts import pieces, token_ids

    sources = [(path.name, file_bytes(path), pieces(path)) for path in paths] or [_wordnet()]
    documents = 0
    with progress_bars() as progress:
        for name, size, found in sources:
            task = progress.add_task(f"tokenising {name}", total=size, note="")
            for ids, piece in token_ids(found, backend):
                left = len(ids) if limit is None else limit - counter.tokens
                counter.add(ids[:left], starts=piece.starts)
                documents += piece.starts
                note = f"{counter.tokens / 1e6:.1f}M tokens"
                progress.update(task, completed=piece.read, note=note)
                if limit is not None and counter.tokens >= limit:
                    return documents
    return documents


def _count(counter: NgramCounter) -> list[OrderCounts]:
    halved = (counter.tokens >> halvings for halvings in range(HALVINGS, 0, -1))
    points = tuple(tokens for tokens in halved if tokens)
    counts = []
    with progress_bars() as progress:
        for order in range(2, counter.max_order + 1):
            task = progress.add_task(f"sorting {order}-grams", total=1.0, note="")
            update = partial(_advance, progress, task)
            counts.append(counter.count(order, points=points, progress=update))
    return counts


def _advance(progress: Any, task: Any, share: float) -> None:
    progress.update(task, completed=share)


def _wordnet() -> tuple[str, int, Iterator[Piece]]:
    from engram_lm import corpus
    from engram_lm.analysis.texts import Piece

    texts = corpus.documents("train")
    sizes = [len(text.encode()) for text in texts]
    reads = accumulate(sizes)
    return "WordNet", sum(sizes), (Piece(*each) for each in zip(texts, repeat(True), reads))


def _rows(text: str) -> list[int]:
    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"rows={text!r}: integers are needed, as 100000,200000") from None
    if min(rows) < 2:
        raise ConfigError(f"rows={text!r}: at least 2 rows a head")
    return rows


def _show(record: dict[str, Any]) -> None:
    print(f"{record['tokens']:,} tokens of {record['documents']:,} documents")
    for order, found in record["orders"].items():
        Console().print(_growth(f"distinct {order}-grams", found["growth"]))
        print(f"{found['once']:,} of them occur once")
    for order, found in record["orders"].items():
        title = f"{order}-grams, {record['heads']} heads x {record['head_dim']}, of one layer"
        Console().print(_sizes(title, found["sizes"]))
    rows = json.dumps(record["rows_per_head"])
    print("load: n-grams for each row of a head. In one head / in every head:")
    print("sharing: n-grams whose row another reads too; behind: occurrences whose row a more")
    print("frequent n-gram reads too")
    print(f"rows_per_head {rows}: at most {record['share']:.2%} share in every head")


def _growth(title: str, growth: list[tuple[int, int]]) -> Grid:
    grid = Grid("tokens", "distinct", "grew as tokens to the", title=title)
    before: tuple[int, int] | None = None
    for tokens, distinct in growth:
        power = ""
        if before is not None:
            power = f"{math.log(distinct / before[1]) / math.log(tokens / before[0]):.2f}"
        grid.add_row(f"{tokens:,}", f"{distinct:,}", power)
        before = (tokens, distinct)
    return grid


def _sizes(title: str, sizes: list[dict[str, Any]]) -> Grid:
    grid = Grid("rows", "load", "sharing", "behind", title=title)
    for dtype in VALUE_BYTES:
        grid.add_column(dtype)
    for size in sizes:
        grid.add_row(
            f"{size['rows']:,}",
            f"{size['load']:.2f}",
            f"{size['one_head']:.0%} / {size['every_head']:.2%}",
            f"{size['occurrences_one_head']:.0%} / {size['occurrences_every_head']:.2%}",
            *(f"{count / 1e6:,.1f} MB" for count in size["bytes"].values()),
        )
    return grid
