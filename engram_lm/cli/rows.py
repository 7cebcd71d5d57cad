"""`engram rows`: print the rows that a text or token ids read."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from engram_lm.errors import AddressError, ConfigError

HELP = "Print the rows that a text or token ids read."


def options(add: Callable[..., Any]) -> None:
    add(
        "--spec",
        required=True,
        help="paper, demo, deepseek-v4.1, qwen4-exp, a specification's FILE.json, or the "
        "directory of a released checkpoint",
    )
    add(
        "--tokenizer",
        type=Path,
        help="tokenizer.json, or a directory with one (default: that of the checkpoint; raw ids "
        "need none)",
    )
    add("--text", help="text to tokenise, without special tokens")
    add("--ids", help="token ids instead, as 1,2,3")
    add("--history", default="", help="token ids before them, oldest first")
    add(
        "--masked", default="", help="positions of image tokens: they and what is older are blocked"
    )
    add("--document-starts", default="", help="positions of first tokens of documents")
    add(
        "--save",
        type=Path,
        help="also write the specification, bound to the tokenizer, to FILE.json",
    )


def run(arguments: argparse.Namespace) -> None:
    import torch

    from engram_lm.memory.canonical import CanonicalMap, backend_of
    from engram_lm.memory.ngrams import Addresses

    if (arguments.text is None) == (arguments.ids is None):
        raise ConfigError("give either --text or --ids")
    specification, token_ids = _specification(arguments.spec)
    tokenizer = arguments.tokenizer
    if tokenizer is None and (Path(arguments.spec) / "tokenizer.json").is_file():
        tokenizer = Path(arguments.spec)
    backend = None if tokenizer is None else backend_of(tokenizer)
    if backend is not None:
        canonical_map = specification.canonical_map(backend)
        addresses = Addresses(specification, canonical_map.grown(token_ids))
    elif specification.canonical_rule == "raw" and specification.vocabulary is not None:
        identity = CanonicalMap.identity(specification.vocabulary.token_ids)
        addresses = Addresses(specification, identity)
    else:
        raise ConfigError("--tokenizer: needed, because canonical ids are made from it")
    if arguments.ids is not None:
        ids = _integers("--ids", arguments.ids)
    elif backend is not None:
        ids = backend.encode(arguments.text, add_special_tokens=False).ids
    else:
        raise ConfigError("--tokenizer: needed for --text")
    history = _integers("--history", arguments.history)
    if any(token_id < 0 for token_id in history):
        raise AddressError(f"--history={arguments.history}: ids run from 0 up")
    rows = addresses.rows(
        torch.tensor([ids], dtype=torch.int64),
        torch.tensor([history], dtype=torch.int64),
        masked=_positions("--masked", arguments.masked, len(ids)),
        document_starts=_positions("--document-starts", arguments.document_starts, len(ids)),
    )
    bound = addresses.specification
    if arguments.save is not None:
        bound.save(arguments.save)
    layers: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(bound.layers):
        table_rows = rows[index, 0]
        head_rows = table_rows - torch.tensor(bound.offsets(layer))
        layers[str(layer)] = {"head_rows": head_rows.tolist(), "table_rows": table_rows.tolist()}
    canonical = addresses.canonical.ids_V[torch.tensor(ids, dtype=torch.int64)].tolist()
    record = {
        "spec": arguments.spec,
        "spec_hash": bound.digest,
        "token_ids": ids,
        "canonical_ids": canonical,
        "layers": layers,
        "specification": bound.to_dict(),
    }
    if arguments.json:
        print(json.dumps(record))
        return
    console = Console()
    console.print(f"{arguments.spec}: specification {bound.digest}", soft_wrap=True)
    for name, kinds in layers.items():
        grid = Grid(
            "position", "token id", "canonical id", "token", "table rows", title=f"layer {name}"
        )
        for position, row in enumerate(kinds["table_rows"]):
            token = "" if backend is None else repr(backend.decode([ids[position]], False))
            cells = (str(position), str(ids[position]), str(canonical[position]), token)
            grid.add_row(*cells, " ".join(map(str, row)))
        console.print(grid)


def _specification(name: str) -> tuple[Any, int]:
    """And how many token ids a model has, where it is known; else 0."""
    from engram_lm import config
    from engram_lm.memory.specification import Specification
    from engram_lm.store.released import Released

    presets = {
        "paper": config.paper,
        "demo": config.demo,
        "deepseek-v4.1": config.deepseek_v41,
        "qwen4-exp": config.qwen4_exp,
    }
    if name.replace("_", "-") in presets:
        return presets[name.replace("_", "-")]().specification, 0
    if Path(name).is_dir():
        released = Released(name)
        return released.memory.specification, released.token_ids
    if not Path(name).is_file():
        raise ConfigError(
            f"spec={name!r}: accepted are {', '.join(presets)}, a FILE.json, or the directory of a "
            "released checkpoint"
        )
    return Specification.load(name), 0


def _integers(option: str, text: str) -> list[int]:
    if not text.strip():
        return []
    values = []
    for position, part in enumerate(text.split(",")):
        try:
            values.append(int(part))
        except ValueError:
            raise AddressError(
                f"{option}: {part!r} at position {position} is not an integer"
            ) from None
        if not -(2**63) <= values[-1] < 2**63:
            raise AddressError(f"{option}: {part} at position {position} does not fit in 64 bits")
    return values


def _positions(option: str, text: str, tokens: int) -> Any:
    import torch

    mask = torch.zeros(1, tokens, dtype=torch.bool)
    for position in _integers(option, text):
        if not 0 <= position < tokens:
            raise AddressError(f"{option}: position {position}; there are {tokens} tokens, from 0")
        mask[0, position] = True
    return mask
