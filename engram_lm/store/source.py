"""Where the rows of one table are, whatever file layout holds them, and reading them in row order.

In: a directory as save_pretrained, DeepSeek-V4.1 or Qwen4-Exp writes it, or a packed file.

Shapes: V rows of the table, M rows read, E values per row, R bytes per row.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.canonical import FILE_NAME as CANONICAL_MAP
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.rows import RowFormat
from engram_lm.memory.specification import Specification
from engram_lm.store.header import Entry, read_header
from engram_lm.store.packed import Packed
from engram_lm.store.region import Region
from engram_lm.store.released import INDEX, Released

VALUES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Dtypes of a stored table, by their names in a safetensors header."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One layer's table in files.

    parts: lists of regions. Rows of one list go on from region to region; lists stand side by side,
    as values and scales do in files that keep them apart.
    """

    specification: Specification
    layer: int
    format: RowFormat
    parts: Sequence[Sequence[Region]]

    @property
    def rows(self) -> int:
        """V."""
        return self.specification.table_rows(self.layer)

    @property
    def identity(self) -> str:
        """Changes when a file of it does: hex, of paths, sizes, times and places of rows."""
        facts: list[Any] = [self.specification.digest, self.layer, str(self.format)]
        for region in (region for part in self.parts for region in part):
            stat = region.path.stat()
            facts.append([str(region.path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
            facts.append([region.offset, region.rows, region.row_bytes])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def read(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` - 1 as they are stored, (M, R) uint8. DataError."""
        parts = [torch.cat(list(_read(part, first, last))) for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def check(self) -> "Source":
        """Itself. MismatchError where its rows are not those of the specification."""
        for part in self.parts:
            stored = sum(region.rows for region in part)
            if stored != self.rows:
                raise MismatchError(
                    f"{part[0].path}: {stored} rows for layer {self.layer}, the specification "
                    f"gives it {self.rows}"
                )
        return self


def _read(regions: Sequence[Region], first: int, last: int) -> list[Tensor]:
    found, begin = [], 0
    for region in regions:
        low, high = max(first - begin, 0), min(last - begin, region.rows)
        if low < high:
            length, width = (high - low) * region.row_bytes, region.row_bytes
            content = bytearray(length)
            try:
                with region.path.open("rb", buffering=0) as file:
                    file.seek(region.offset + low * width)
                    count = file.readinto(content)
                    while count < length and (more := file.readinto(memoryview(content)[count:])):
                        count += more
            except OSError as error:
                raise DataError(f"{region.path}: {error.strerror}") from error
            if count < length:
                raise DataError(f"{region.path}: ends before its rows do: truncated")
            found.append(torch.frombuffer(content, dtype=torch.uint8).view(-1, width))
        begin += region.rows
    return found


def open_sources(path: Path, tokenizer: Path | None = None) -> list[Source]:
    """The tables of a checkpoint's directory, or that of a packed file, by their headers alone.

    tokenizer: of a DeepSeek-V4.1 checkpoint without tokenizer.json, since addresses depend on it.
    ConfigError for a model without memory or of another family; DataError and MismatchError for
    files that are missing, damaged or of two models.
    """
    if path.is_file():
        packed = Packed.open(path)
        label = packed.label
        return [
            Source(
                specification=label.specification,
                layer=label.layer,
                format=label.format,
                parts=[[packed.region]],
            )
        ]
    try:
        record = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise DataError(f"{path}/config.json: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}/config.json: not JSON ({error})") from error
    if isinstance(record, dict) and record.get("model_type") == "engram_lm":
        return _trainable(path, record)
    released = Released(path)
    specification = released.memory.specification
    if specification.vocabulary is None:
        specification = specification.bind(released.canonical_map(tokenizer))
    tensors, dim = _Tensors(path), released.memory.head_dim
    layout = _deepseek if released.family == "deepseek-v4.1" else _qwen
    return [_source(specification, layer, dim, layout(tensors, layer)) for layer in released.layers]


def _trainable(path: Path, record: Mapping[str, Any]) -> list[Source]:
    if record.get("memory") is None:
        raise ConfigError(f"{path}: a model without memory has no tables")
    memory = MemoryConfig.from_dict(record["memory"])
    # config.json may leave the vocabulary to the map that save_pretrained writes beside it.
    specification = memory.specification.bind(CanonicalMap.load(path / CANONICAL_MAP))
    tensors, dim = _Tensors(path), memory.head_dim
    _check_seal(tensors, specification)
    return [
        _source(specification, layer, dim, [[tensors.find(f"tables.{layer}.weight")]])
        for layer in specification.layers
    ]


def _check_seal(tensors: "_Tensors", specification: Specification) -> None:
    """The 32 bytes among the weights that say which specification they were trained with."""
    path, entry = tensors.find("seal.sha256")
    region = Region(path=path, offset=entry.offset, rows=1, row_bytes=entry.size)
    found = bytes(_read([region], 0, 1)[0][0].tolist()).hex()
    if found != specification.digest:
        raise MismatchError(
            f"{path}: trained with the specification of sha256 {found}, config.json and map give "
            f"{specification.digest}"
        )


def _deepseek(tensors: "_Tensors", layer: int) -> list[list["_Place"]]:
    prefix = f"layers.{layer}.engram.embed."
    return [[tensors.find(prefix + "weight")], [tensors.find(prefix + "scale")]]


def _qwen(tensors: "_Tensors", layer: int) -> list[list["_Place"]]:
    """Stored whole, or as shard_0 ... shard_n one below the other."""
    name = f"layers.{layer}.ple.ple_embedding.ngram_embedding"
    if not tensors.has(f"{name}.shard_0.weight"):
        return [[tensors.find(f"{name}.weight")]]
    shards: list[_Place] = []
    while tensors.has(shard := f"{name}.shard_{len(shards)}.weight"):
        shards.append(tensors.find(shard))
    return [shards]


_Place = tuple[Path, Entry]


def _source(
    specification: Specification, layer: int, dim: int, places: list[list[_Place]]
) -> Source:
    """Of values, and of scales where there are any."""
    for path, entry in (place for part in places for place in part):
        if len(entry.shape) != 2 or not all(entry.shape):
            raise MismatchError(f"{path}: a table of shape {entry.shape}: a matrix is needed")
    for part in places:
        if len({(entry.dtype, entry.shape[1]) for _, entry in part}) > 1:
            raise MismatchError(f"{part[0][0]}: shards of layer {layer} differ in dtype or width")
    path, values = places[0][0]
    if values.dtype not in VALUES or values.shape[1] != dim:
        raise MismatchError(
            f"{path}: rows of {values.shape[1]} {values.dtype} for layer {layer}: {dim} of "
            f"{', '.join(VALUES)} are needed"
        )
    group = None
    if len(places) > 1:
        scales = places[1][0][1]
        if scales.dtype not in ("F8_E8M0", "U8") or dim % scales.shape[1]:
            raise MismatchError(
                f"{path}: {scales.shape[1]} {scales.dtype} scales for rows of {dim}: one e8m0 for "
                "each equal group is needed"
            )
        group = dim // scales.shape[1]
    return Source(
        specification=specification,
        layer=layer,
        format=RowFormat(dtype=VALUES[values.dtype], dim=dim, scale_group=group),
        parts=[[_region(*place) for place in part] for part in places],
    ).check()


def _region(path: Path, entry: Entry) -> Region:
    rows = entry.shape[0]
    return Region(path=path, offset=entry.offset, rows=rows, row_bytes=entry.size // rows)


class _Tensors:
    """Where each tensor of a checkpoint is, by the headers of its files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        files = [directory / "model.safetensors"]
        if not files[0].exists() and not (directory / INDEX).exists():
            files = sorted(directory.glob("*.safetensors")) or files
        elif not files[0].exists():
            try:
                index = json.loads((directory / INDEX).read_text())["weight_map"]
                files = [directory / name for name in sorted(set(index.values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{directory / INDEX}: no index ({error!r})") from error
        self._places: dict[str, _Place] = {}
        for file in files:
            for name, entry in read_header(file).tensors.items():
                if name in self._places:
                    raise DataError(f"{file}: {name} stands in {self._places[name][0]} too")
                self._places[name] = (file, entry)

    def _names(self, suffix: str) -> list[str]:
        """What stands before a name differs between releases."""
        return [name for name in self._places if name == suffix or name.endswith(f".{suffix}")]

    def has(self, suffix: str) -> bool:
        return bool(self._names(suffix))

    def find(self, suffix: str) -> _Place:
        names = self._names(suffix)
        if len(names) != 1:
            raise DataError(
                f"{self.directory}: {' and '.join(names) or 'no tensor'} for {suffix}: one is "
                "needed"
            )
        return self._places[names[0]]
