"""A table from one file layout and row format into another, in bounded memory, resumable.

Rows are read, converted, hashed and written a block at a time: some 30 MB, however large the table,
and 24 bytes for each hot row. A hot row's copy is written when its row is, so both are on the disk
or neither.

Shapes: M rows of a block, K hot rows, R bytes per row.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.rows import RowFormat
from engram_lm.store import aside
from engram_lm.store.aside import Aside
from engram_lm.store.hot import DIGITS, MULTIPLE, NUMBER_BYTES, check_hot
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
_TENSOR_SCALE = "layers.{}.ple.ple_embedding.ngram_embedding.weight_scale"
_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp8": "F8_E4M3"}


def pack(
    source: Source,
    format: RowFormat,
    layout: str,
    path: Path,
    progress: Callable[[int], None] | None = None,
    *,
    hot_K: Tensor | None = None,
) -> None:
    """Writes one table's file; what an interrupted call left is gone on with, to the same bytes.

    Rows whose format stays are copied, others decoded and written anew. hot_K: numbers of the rows
    that a packed file has copies of, the hottest first; a multiple of 8. progress: called with the
    bytes of each block written, at first with all that were there. Beside the file stays its
    journal, for the caller to remove when no file is missing. ConfigError for a format that the
    layout cannot say; DataError where the disk is full or a file of that name exists.
    """
    label = Label(specification=source.specification, layer=source.layer, format=format)
    hot = _checked(hot_K, label.rows, layout)
    head = label.header(hot=len(hot)) if layout == "packed" else _header(label, layout)
    identity = hashlib.sha256(head + source.identity.encode() + hot.tobytes()).hexdigest()
    step, rows = label.block_rows, label.rows
    begin = len(head) + len(hot) * (NUMBER_BYTES + format.row_bytes)
    end = begin + rows * format.row_bytes
    behind = b"" if layout == "packed" else _tensor_scale(format)
    if path.exists():
        if aside.recorded(path, identity) < label.blocks:
            raise DataError(f"{path}: is there already; remove it, or write elsewhere")
        if progress is not None:
            progress(rows * format.row_bytes)
        return
    with Aside(path, end + len(behind), identity) as file:
        checksums = checksums_at(head) if layout == "packed" else 0
        copies = _Copies(file, len(head) + hot.nbytes, hot, format.row_bytes)
        digests = ""
        if not file.done:
            file.write(0, head + hot.tobytes())
            file.write(end, behind)
        elif layout == "packed":
            digests = file.read(checksums, DIGITS * file.done).decode()
        if progress is not None:
            progress(min(file.done * step, rows) * format.row_bytes)
        for block in range(file.done, label.blocks):
            first, last = block * step, min((block + 1) * step, rows)
            bytes_MR = converted(source, format, first, last)
            if layout == "packed":
                content = bytes_MR.numpy().tobytes()
                file.write(begin + first * format.row_bytes, content)
                copies.write(content, first, last)
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
            hot_sha256 = hashlib.sha256(hot.tobytes()).hexdigest() + copies.digests(step)
            file.write(0, label.header(digests, hot=len(hot), hot_sha256=hot_sha256))
        file.finish()


class _Copies:
    """Of hot rows: each is written to its place before the table when its row is at hand."""

    def __init__(self, file: Aside, offset: int, hot: NDArray[np.int64], row_bytes: int) -> None:
        self._file, self._offset, self._row_bytes = file, offset, row_bytes
        self._place_K = np.argsort(hot)
        self._row_K = hot[self._place_K]

    def write(self, content: bytes, first: int, last: int) -> None:
        """Those among rows `first` to `last` - 1, whose bytes these are."""
        low, high = np.searchsorted(self._row_K, (first, last))
        found = slice(low, high)
        begins = ((self._row_K[found] - first) * self._row_bytes).tolist()
        for place, begin in zip(self._place_K[found].tolist(), begins, strict=True):
            row = content[begin : begin + self._row_bytes]
            self._file.write(self._offset + place * self._row_bytes, row)

    def digests(self, block_rows: int) -> str:
        """SHA-256 of each block of them, read back."""
        found = ""
        for first in range(0, len(self._row_K), block_rows):
            length = (min(first + block_rows, len(self._row_K)) - first) * self._row_bytes
            content = self._file.read(self._offset + first * self._row_bytes, length)
            found += hashlib.sha256(content).hexdigest()
        return found


def _checked(hot_K: Tensor | None, rows: int, layout: str) -> NDArray[np.int64]:
    """As they are written: little-endian."""
    if hot_K is None:
        return np.empty(0, "<i8")
    hot: NDArray[np.int64] = hot_K.numpy().astype("<i8")
    if layout != "packed" or not len(hot) or len(hot) % MULTIPLE:
        raise ConfigError(
            f"{len(hot)} hot rows in a {layout} file: packed ones have a multiple of {MULTIPLE}"
        )
    check_hot("hot rows", hot, rows)
    return hot


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
    return torch.cat(parts)


def check_layout(layout: str, format: RowFormat) -> None:
    """ConfigError where this layout is not known or cannot say rows of this format."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r}: accepted are {', '.join(LAYOUTS)}")
    if layout == "packed":
        return
    scaled = format.scale_group is not None
    bare = format.name == "fp8" and format.scale_dtype is None
    if format.name not in _DTYPES or scaled != (layout == "deepseek-v4.1") or bare:
        kind = "fp8 with scales in rows" if layout == "deepseek-v4.1" else "fp32, bf16 or fp16"
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
    if format.tensor_scale is not None:
        tensors[_TENSOR_SCALE] = {
            "dtype": {torch.bfloat16: "BF16", torch.float32: "F32"}[format.tensor_scale.dtype],
            "shape": (1,),
            "data_offsets": (end, end + format.tensor_scale.dtype.itemsize),
        }
    record: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    record |= {name.format(label.layer): entry for name, entry in tensors.items()}
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor_scale(format: RowFormat) -> bytes:
    """The table's one scale as it is written behind its rows; nothing where it has none."""
    if format.tensor_scale is None:
        return b""
    value, dtype = format.tensor_scale
    return torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
