"""`engram inspect`: what a model's memory holds for one text."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engram_lm.cli.models import memory_options, memory_places, open_model, open_tokenizer, opening
from engram_lm.cli.settings import file_bytes, prepare, progress_bars
from engram_lm.errors import ConfigError, DataError

HELP = "Say what a memory holds for a text: rows, who shares them, gates, what each row does."


def options(add: Callable[..., Any]) -> None:
    add("text", metavar="TEXT", help='as "Alexander the Great"')
    add(
        "--model",
        type=Path,
        default=Path("runs/demo/nano-engram/model"),
        help="directory (default: %(default)s)",
    )
    add(
        "--corpus",
        type=Path,
        help="file whose n-grams are counted on the rows: one document, or .jsonl",
    )
    memory_options(add)


def run(arguments: argparse.Namespace) -> None:

    from engram_lm.analysis.inspect import inspect

    prepare(None)
    with opening(arguments.model):
        model = open_model(arguments.model, memory_places(arguments))
        tokenizer = open_tokenizer(arguments.model)
    if getattr(model.config, "memory_config", None) is None:
        raise ConfigError(f"{arguments.model}: a model without memory")
    sharing = None if arguments.corpus is None else _sharing(model, tokenizer, arguments.corpus)
    found = inspect(model, tokenizer, arguments.text, sharing)
    if arguments.json:
        print(json.dumps(asdict(found)))
    else:
        _show(found)


def _sharing(model: Any, tokenizer: Any, path: Path) -> Any:
    from engram_lm.analysis.material import stream
    from engram_lm.analysis.row_sharing import sharing_of
    from engram_lm.analysis.texts import pieces

    addresses = model.base_model.memory.addresses
    with progress_bars() as bars:
        reading = bars.add_task(f"tokenising {path.name}", total=file_bytes(path), note="")
        counting = bars.add_task("counting n-grams on rows", total=None, note="")

        def texts() -> Iterator[tuple[str, bool]]:
            for piece in pieces(path):
                yield piece.text, piece.starts
                bars.update(reading, completed=piece.read)

        counted = stream(texts(), tokenizer)
        ids_T, starts_T = counted["corpus_C"], counted["corpus_starts_C"]
        if len(ids_T) < addresses.specification.max_order:
            raise DataError(f"{path}: {len(ids_T)} tokens, which make no n-gram of each order")
        return sharing_of(
            addresses,
            ids_T,
            starts_T,
            lambda done, of: bars.update(counting, completed=done, total=of),
        )


def _show(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from engram_lm.analysis.gate_text import colour, gate_text

    console, trace = Console(), found.trace
    console.print(gate_text(trace))
    tokens = Table("token", "id", "canonical", f"{trace.orders[-1]}-gram", box=None)
    for layer in trace.layers:
        tokens.add_column(f"gate, layer {layer}", justify="right")
        tokens.add_column("added", justify="right")
    for token, (written, id) in enumerate(zip(trace.tokens, trace.ids, strict=True)):
        cells: list[Any] = [repr(written), str(id), str(found.canonical_ids[token])]
        cells.append(Text(repr(trace.ngrams[-1][token])))
        for place in range(len(trace.layers)):
            gate = max(trace.gates[place][token])
            cells.append(Text(f"{gate:.2f}", style=colour(gate)))
            cells.append(f"{max(trace.contributions[place][token]):.3f}")
        tokens.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    console.print(tokens, "")
    rows = Table(
        *("layer", "order", "head", "row", "norm", "n-grams on it", "KL", "raises"),
        title="rows of the last token, each read alone",
        box=None,
    )
    for effect in found.effects:
        raised = ", ".join(f"{said!r} {gain:+.3f}" for said, gain in effect.raised[:3])
        rows.add_row(
            *(str(effect.layer), str(effect.order), str(effect.head), f"{effect.row:,}"),
            f"{effect.norm:.3f}",
            "" if effect.sharers is None else f"{effect.sharers:,}",
            f"{effect.divergence:.4f}",
            Text(raised),
        )
    console.print(rows, "")
    for title, likeliest in (("no row read", found.unread), ("all rows read", found.read)):
        said = ", ".join(f"{token!r} {share:.3f}" for token, share in likeliest)
        console.print(Text(f"next, {title}: {said}"))
