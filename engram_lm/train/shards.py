"""Token shards: documents as token ids on disk, and how training reads them.

A directory holds index.json, tokenizer.json and shard-00000.safetensors, ...; docs/data.md says
what is in them. Shards are mapped into memory: what is not read takes none.

Shapes: T token ids, D documents, of one split of one shard.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engram_lm import whole
from engram_lm.errors import DataError, MismatchError
from engram_lm.train import identity
from engram_lm.train.encoder import Encoder
from engram_lm.train.stream import Ids, Starts

FORMAT = "engram-shards"
VERSION = 1
INDEX = "index.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")
INDEX_KEYS = {
    "format",
    "version",
    "request",
    "files_sha256",
    "tokenizer_sha256",
    "separator",
    "padding",
    "shards",
    "sources",
}


class Packed(NamedTuple):
    """Documents of one split behind one another, each behind its separator."""

    ids_T: npt.NDArray[np.integer]
    starts_D: npt.NDArray[np.int64]
    """Where each document's separator is."""
    bytes_D: npt.NDArray[np.int64]
    """Of UTF-8 text in each document."""


def dtype(token_ids: int) -> type[np.uint16] | type[np.uint32]:
    """The narrower of the two that holds every id of the vocabulary."""
    return np.uint16 if token_ids <= 2**16 else np.uint32


def file_name(number: int) -> str:
    return f"shard-{number:05}.safetensors"


def label(number: int, encoder: Encoder) -> dict[str, Any]:
    """What a shard says of itself, so that one from elsewhere is noticed."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "number": number,
        "tokenizer_sha256": encoder.sha256,
        "token_ids": encoder.token_ids,
        "separator_id": encoder.separator_id,
    }


def write(
    directory: Path, number: int, splits: dict[str, Packed], encoder: Encoder
) -> dict[str, Any]:
    """Writes a shard; returns its entry of the index."""
    path = directory / file_name(number)
    tensors = {
        f"{name}.{field.rpartition('_')[0]}": values
        for name, packed in splits.items()
        for field, values in packed._asdict().items()
    }
    # One entry: safetensors writes several in an order that differs between processes. Its own
    # save_file would leave a file of random name behind where the process is killed.
    content = save(tensors, metadata={"label": json.dumps(label(number, encoder))})
    with whole.aside(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    counts = {
        name: {
            "tokens": len(packed.ids_T),
            "documents": len(packed.starts_D),
            "bytes": int(packed.bytes_D.sum()),
        }
        for name, packed in splits.items()
    }
    return {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), **counts}


def read_index(directory: Path) -> dict[str, Any]:
    """index.json, its keys checked. DataError where it is missing or not one of ours."""
    path = directory / INDEX
    if not path.is_file():
        raise DataError(f"{directory}: no {INDEX}; `engram data` makes one when it has finished")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = (record["format"], record["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an index of token shards ({error!r})") from error
    if version != (FORMAT, VERSION):
        raise DataError(f"{path}: {version[0]} version {version[1]}; {FORMAT} {VERSION} is read")
    if set(record) != INDEX_KEYS:
        raise DataError(f"{path}: keys {', '.join(sorted(INDEX_KEYS))} are needed")
    return record


class Shards:
    """A finished directory of token shards, every file checked against the index.

    DataError where a file is missing or damaged, MismatchError where one belongs to another
    directory. The check reads everything once, at about a gigabyte a second; False for a worker
    whose main has made it.
    """

    def __init__(self, directory: Path, *, check: bool = True) -> None:
        self.directory = directory
        index = read_index(directory)
        self.encoder = _encoder(directory, index)
        self._entries = index["shards"]
        console = Console(stderr=True)
        hidden = not console.is_terminal
        checked = self._entries if check else []
        for number, entry in enumerate(
            track(checked, "checking shards", console=console, disable=hidden)
        ):
            _check(directory / entry["file"], number, entry, self.encoder)
        checksums: list[str | int] = [self.encoder.sha256, self.encoder.separator_id]
        checksums += [entry["sha256"] for entry in self._entries]
        self.sha256 = hashlib.sha256(json.dumps(checksums).encode()).hexdigest()

    def split(self, name: str) -> "Split":
        """ "train" or "validation"; DataError where no document fell into it."""
        files = [self.directory / entry["file"] for entry in self._entries]
        split = Split((_map(file, name) for file in files), f"{self.sha256} {name}")
        if not len(split):
            raise DataError(
                f"{self.directory}: no document is in its {name} split; "
                "prepare more text, or another --validation share"
            )
        return split


class Split:
    """One split of all shards as one `Stream`, document starts known."""

    def __init__(self, shards: Iterable[Packed], sha256: str) -> None:
        self.shards = [packed for packed in shards if len(packed.ids_T)]
        self.sha256 = sha256
        self._ends = np.cumsum([len(packed.ids_T) for packed in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def read(self, first: int, last: int) -> Ids:
        parts = [packed.ids_T[a:b] for packed, a, b in self._stretches(first, last)]
        return np.concatenate(parts)

    def starts(self, first: int, last: int) -> Starts:
        parts = []
        for packed, a, b in self._stretches(first, last):
            found = packed.starts_D[slice(*np.searchsorted(packed.starts_D, (a, b)))]
            parts.append(np.zeros(b - a, dtype=np.bool_))
            parts[-1][found - a] = True
        return np.concatenate(parts)

    def text_bytes(self, first: int, last: int) -> float:
        size = 0.0
        for packed, a, b in self._stretches(first, last):
            # Documents that the stretch touches; the first may begin before it.
            starts_D = packed.starts_D
            low = int(np.searchsorted(starts_D, a, side="right")) - 1
            high = int(np.searchsorted(starts_D, b))
            edges = np.append(starts_D[low : high + 1], len(packed.ids_T))[: high - low + 1]
            inside = np.minimum(edges[1:], b) - np.maximum(edges[:-1], a)
            size += float((packed.bytes_D[low:high] * inside / np.diff(edges)).sum())
        return size

    def judged(self, tokens: int) -> tuple[int, int]:
        """Whole documents, because only their bytes are known whatever the tokenizer: as many as it
        takes to have `tokens`."""
        size = 0
        for packed, end in zip(self.shards, self._ends, strict=True):
            begin = int(end) - len(packed.ids_T)
            inside = int(np.searchsorted(packed.starts_D, tokens - begin))
            size += int(packed.bytes_D[:inside].sum())
            if inside < len(packed.starts_D):
                return begin + int(packed.starts_D[inside]), size
        return len(self), size

    def _stretches(self, first: int, last: int) -> list[tuple[Packed, int, int]]:
        """The shards that hold ids `first` to `last` - 1, and where in each they are."""
        found = []
        for number in range(int(np.searchsorted(self._ends, first, side="right")), len(self._ends)):
            packed = self.shards[number]
            begin = int(self._ends[number]) - len(packed.ids_T)
            if begin >= last:
                break
            found.append((packed, max(first - begin, 0), min(last - begin, len(packed.ids_T))))
        return found


def _encoder(directory: Path, index: dict[str, Any]) -> Encoder:
    path = directory / TOKENIZER
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    found = hashlib.sha256(content.encode()).hexdigest()
    if found != index["tokenizer_sha256"]:
        raise MismatchError(
            f"{path}: sha256 {found}, the shards were made with {index['tokenizer_sha256']}"
        )
    return Encoder(content, index["separator"], index["padding"])


def _check(path: Path, number: int, entry: dict[str, Any], encoder: Encoder) -> None:
    try:
        with safe_open(path, "pt") as file:
            recorded = json.loads((file.metadata() or {}).get("label", "{}"))
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: no token shard can be read ({error})") from error
    difference = identity.difference("", recorded, label(number, encoder))
    if difference is not None:
        raise MismatchError(f"{path}: belongs elsewhere: {difference}")
    if found != entry["sha256"]:
        raise DataError(f"{path}: damaged: sha256 {found}, {INDEX} asks for {entry['sha256']}")


def _map(path: Path, split: str) -> Packed:
    # torch's reader maps the file; NumPy's would copy it.
    with safe_open(path, "pt") as file:
        tensors: list[torch.Tensor] = [
            file.get_tensor(f"{split}.{name}") for name in ("ids", "starts", "bytes")
        ]
    return Packed(*(tensor.numpy() for tensor in tensors))
