"""Where the rows of one table are, whatever file layout holds them, and reading them in row order.

In: a directory as save_pretrained, DeepSeek-V4.1 or Qwen4-Exp writes it, or a packed file.

Shapes: V rows of the table, M rows read, E values per row, R bytes per row.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_lm.auto import CONFIGURATIONS, PACK
from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.canonical import FILE_NAME as CANONICAL_MAP
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.rows import RowFormat
from engram_lm.memory.specification import Specification
from engram_lm.store.dequantize import PLAIN
from engram_lm.store.header import Entry, read_header
from engram_lm.store.hot import Hot
from engram_lm.store.packed import Packed
from engram_lm.store.region import Region, stamp
from engram_lm.store.released import DTYPES, Released
from engram_lm.store.weights import INDEX, check_one_save, weight_files

_Place = tuple[Path, Entry]
"""The file that holds a tensor, and where in it."""
_TABLE = re.compile(r"^([^.]*\.)?tables\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One layer's table in files.

    parts: lists of regions. Rows of one list go on from region to region; lists stand side by side,
    as values and scales do in files that keep them apart. hot: copies of the rows that are asked
    for most, where a packed file has them.
    """

    specification: Specification
    layer: int
    format: RowFormat
    parts: Sequence[Sequence[Region]]
    hot: Hot | None = None

    @property
    def rows(self) -> int:
        """V."""
        return self.specification.table_rows(self.layer)

    @property
    def identity(self) -> str:
        """Changes when a file of it does: hex, of paths, sizes, times and places of rows."""
        facts: list[Any] = [self.specification.digest, self.layer, str(self.format)]
        for region in (region for part in self.parts for region in part):
            facts.append([str(region.path.resolve()), *stamp(region.path)])
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
            found.append(region.read(low, high))
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
                hot=packed.hot,
            )
        ]
    try:
        record = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise DataError(f"{path}/config.json: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}/config.json: not JSON ({error})") from error
    if isinstance(record, dict) and record.get("model_type") in (*CONFIGURATIONS, PACK):
        return _trainable(path, record)
    released = Released(path)
    specification = released.memory.specification
    if specification.vocabulary is None:
        specification = specification.bind(released.canonical_map(tokenizer))
    sources = []
    for layer in released.layers:
        format, parts = released.parts(layer)
        source = Source(specification=specification, layer=layer, format=format, parts=parts)
        sources.append(source.check())
    return sources


def _trainable(path: Path, record: Mapping[str, Any]) -> list[Source]:
    if record.get("memory") is None:
        raise ConfigError(f"{path}: a model without memory has no tables")
    memory = MemoryConfig.from_dict(record["memory"])
    # config.json may leave the vocabulary to the map that save_pretrained writes beside it.
    specification = memory.specification.bind(CanonicalMap.load(path / CANONICAL_MAP))
    check_one_save(path)
    tensors = _tensors(path)
    _check_known(path, tensors)
    _check_seal(path, tensors, specification)
    return [
        _table(path, tensors, specification, layer, memory.head_dim)
        for layer in specification.layers
    ]


def _check_known(path: Path, tensors: Mapping[str, _Place]) -> None:
    """save_pretrained writes nothing beside a table; a quantiser writes scales there."""
    for name in tensors:
        if _TABLE.search(name) and not name.endswith(".weight"):
            raise DataError(
                f"{path}: {name} lies beside a table, and what it changes there is not known"
            )


def _check_seal(path: Path, tensors: Mapping[str, _Place], specification: Specification) -> None:
    """The 32 bytes among the weights that say which specification they were trained with."""
    file, entry = _find(path, tensors, "seal.sha256")
    region = Region(path=file, offset=entry.offset, rows=1, row_bytes=entry.size)
    found = bytes(_read([region], 0, 1)[0][0].tolist()).hex()
    if found != specification.digest:
        raise MismatchError(
            f"{file}: trained with the specification of sha256 {found}, config.json and map give "
            f"{specification.digest}"
        )


def _table(
    path: Path,
    tensors: Mapping[str, _Place],
    specification: Specification,
    layer: int,
    dim: int,
) -> Source:
    file, entry = _find(path, tensors, f"tables.{layer}.weight")
    rows = specification.table_rows(layer)
    if DTYPES.get(entry.dtype) not in PLAIN or entry.shape != (rows, dim):
        raise MismatchError(
            f"{file}: table of layer {layer} is {entry.dtype} {entry.shape}, by config.json it is "
            f"{(rows, dim)} of F32, BF16 or F16"
        )
    format = RowFormat(dtype=DTYPES[entry.dtype], dim=dim)
    region = Region(path=file, offset=entry.offset, rows=rows, row_bytes=format.row_bytes)
    return Source(specification=specification, layer=layer, format=format, parts=[[region]])


def _tensors(directory: Path) -> dict[str, _Place]:
    """Where each is, by the headers of the files."""
    files = weight_files(directory)
    headers = {file: read_header(file).tensors for file in sorted(set(files.values()))}
    lacking = [name for name, file in files.items() if name not in headers[file]]
    if lacking:
        name = lacking[0]
        raise DataError(f"{files[name]}: no tensor {name}, which {INDEX} promises there")
    return {name: (file, headers[file][name]) for name, file in files.items()}


def _find(directory: Path, tensors: Mapping[str, _Place], suffix: str) -> _Place:
    """The first part of a name is the family's, and a headless model's names lack it."""
    names = [name for name in tensors if suffix in (name, name.split(".", 1)[-1])]
    if not names:
        raise DataError(f"{directory}: no tensor model.{suffix}")
    if len(names) > 1:
        raise DataError(f"{directory}: {suffix} is there twice, as {' and '.join(names)}")
    return tensors[names[0]]
