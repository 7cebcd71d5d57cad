"""A table from one file layout and row format into another, in bounded memory, resumable.

Rows are read, converted, hashed and written a block at a time: some 30 MB, however large the table.

Shapes: M rows of a block, R bytes per row.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, cat

from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.rows import RowFormat
from engram_lm.store import aside
from engram_lm.store.aside import Aside
from engram_lm.store.packed import Label, checksums_at
from engram_lm.store.source import Source

LAYOUTS = ("packed", "deepseek-v4.1", "qwen4-exp", "trainable")
COMMIT_BLOCKS = 64
"""Written between two flushes: what a killed process loses at the most."""

_VALUES_AT_ONCE = 2**17
_NAMES = {
    "deepseek-v4.1": "layers.{}.engram.embed.weight",
    "qwen4-exp": "layers.{}.ple.ple_embedding.ngram_embedding.weight",
    "trainable": "model.tables.{}.weight",
}
_SCALES = "layers.{}.engram.embed.scale"
_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp8": "F8_E4M3"}


def pack(
    source: Source,
    format: RowFormat,
    layout: str,
    path: Path,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes one table's file; what an interrupted call left is gone on with, to the same bytes.

    Rows whose format stays are copied, others decoded and written anew. progress: called with the
    bytes of each block written, at first with all that were there. Beside the file stays its
    journal, for the caller to remove when no file is missing. ConfigError for a format that the
    layout cannot say; DataError where the disk is full or a file of that name exists.
    """
    label = Label(specification=source.specification, layer=source.layer, format=format)
    head = label.header() if layout == "packed" else _header(label, layout)
    identity = hashlib.sha256(head + source.identity.encode()).hexdigest()
    step, rows = label.block_rows, label.rows
    if path.exists():
        if aside.recorded(path, identity) < label.blocks:
            raise DataError(f"{path}: is there already; remove it, or write elsewhere")
        if progress is not None:
            progress(rows * format.row_bytes)
        return
    with Aside(path, len(head) + rows * format.row_bytes, identity) as file:
        checksums = checksums_at(head) if layout == "packed" else 0
        digests = ""
        if not file.done:
            file.write(0, head)
        elif layout == "packed":
            digests = file.read(checksums, 64 * file.done).decode()
        if progress is not None:
            progress(min(file.done * step, rows) * format.row_bytes)
        for block in range(file.done, label.blocks):
            first, last = block * step, min((block + 1) * step, rows)
            bytes_MR = converted(source, format, first, last)
            if layout == "packed":
                content = bytes_MR.numpy().tobytes()
                file.write(len(head) + first * format.row_bytes, content)
                digests += hashlib.sha256(content).hexdigest()
            else:
                width, scales = format.value_bytes, len(head) + rows * format.value_bytes
                file.write(len(head) + first * width, bytes_MR[:, :width].numpy().tobytes())
                left = first * (format.row_bytes - width)
                file.write(scales + left, bytes_MR[:, width:].numpy().tobytes())
            if (block + 1) % COMMIT_BLOCKS == 0 or last == rows:
                if layout == "packed":
                    file.write(checksums, digests.encode())
                file.commit(block + 1)
            if progress is not None:
                progress((last - first) * format.row_bytes)
        if layout == "packed":
            file.write(0, label.header(digests))
        file.finish()


def converted(source: Source, format: RowFormat, first: int, last: int) -> Tensor:
    """Rows `first` to `last` - 1 in another format, (M, R) uint8.

    DataError where a value cannot be said in it.
    """
    if format == source.format:
        return source.read(first, last)
    step, parts = max(1, _VALUES_AT_ONCE // format.dim), []
    for start in range(first, last, step):
        values_ME = source.format.decode(source.read(start, min(start + step, last)))
        try:
            parts.append(format.encode(values_ME))
        except DataError as error:
            raise DataError(f"layer {source.layer}, from row {start} on: {error}") from error
    return cat(parts)


def check_layout(layout: str, format: RowFormat) -> None:
    """ConfigError where this layout is not known or cannot say rows of this format."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r}: accepted are {', '.join(LAYOUTS)}")
    if layout == "packed":
        return
    scaled = format.scale_group is not None
    if format.name not in _DTYPES or scaled != (layout == "deepseek-v4.1"):
        kind = "fp8 with scales" if layout == "deepseek-v4.1" else "fp32, bf16 or fp16"
        raise ConfigError(f"dtype={format.name}: a {layout} table is {kind}: give a --dtype")
    if layout == "trainable" and format.name not in ("fp32", "bf16"):
        raise ConfigError(f"dtype={format.name}: a trainable table is fp32 or bf16")


def _header(label: Label, layout: str) -> bytes:
    """Of a safetensors file with one table under the names of a released or trainable layout."""
    format, rows = label.format, label.rows
    end = rows * format.value_bytes
    tensors: dict[str, dict[str, Any]] = {
        _NAMES[layout]: {
            "dtype": _DTYPES[format.name],
            "shape": (rows, format.dim),
            "data_offsets": (0, end),
        }
    }
    if format.scale_group is not None:
        tensors[_SCALES] = {
            "dtype": "F8_E8M0",
            "shape": (rows, format.dim // format.scale_group),
            "data_offsets": (end, rows * format.row_bytes),
        }
    record: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    record |= {name.format(label.layer): entry for name, entry in tensors.items()}
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 8)
    return len(text).to_bytes(8, "little") + text
