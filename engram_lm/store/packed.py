"""The packed file: rows of one layer's table, values and scales side by side, and what they are.

A safetensors file of one U8 tensor `rows`, (V, R); its metadata hold the specification, the row
format and a SHA-256 of every block of rows. Copies of the hot rows may stand before it.
docs/table-format.md says every byte.

Shapes: V rows of the table, R bytes per row.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.rows import DTYPES, RowFormat, TensorScale
from engram_lm.memory.specification import Specification
from engram_lm.store.disk import Disk
from engram_lm.store.header import Header, read_header
from engram_lm.store.hot import COPIES, DIGITS, NUMBER_BYTES, NUMBERS, Hot
from engram_lm.store.region import Region

FORMAT = "engram-table"
VERSION = "1"
TENSOR = "rows"
BLOCK_BYTES = 2**20
"""Of rows, about: what is read to check a row. 101 GB then have 6 MB of checksums."""
PAGE = 4096
"""Rows begin at a multiple of it, so that blocks can be read without the page cache."""
SCALES = {
    "ue8m0": torch.float8_e8m0fnu,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "none": None,
}
TENSOR_SCALE_KEY = "tensor_scale"
"""There where a table has one scale for all its rows."""
HOT_KEY = "hot_sha256"
"""There where hot rows are."""

_KEYS = (
    *("format", "version", "header_sha256", "specification", "specification_sha256", "layer"),
    *("dtype", "dim", "scale_dtype", "scale_group", "block_rows", "block_sha256"),
)
_SEALED = b'"header_sha256":"'
_CHECKSUMS = b'"block_sha256":"'
_COPIES = b'"hot_sha256":"'


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a packed file says of its rows."""

    specification: Specification
    layer: int
    format: RowFormat

    @property
    def rows(self) -> int:
        """V."""
        return self.specification.table_rows(self.layer)

    @property
    def block_rows(self) -> int:
        """Rows that share a checksum; the last block may have fewer."""
        return max(1, BLOCK_BYTES // self.format.row_bytes)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.rows // self.block_rows)

    def header(
        self, block_sha256: str | None = None, *, hot: int = 0, hot_sha256: str | None = None
    ) -> bytes:
        """All bytes before the first tensor; with zeros for checksums where none are given.

        hot: how many rows have copies.
        """
        scales = next(name for name, dtype in SCALES.items() if dtype == self.format.scale_dtype)
        values = (
            *(FORMAT, VERSION, "0" * DIGITS),
            json.dumps(self.specification.to_dict(), sort_keys=True, separators=(",", ":")),
            *(self.specification.digest, str(self.layer), self.format.name, str(self.format.dim)),
            *(scales, str(self.format.scale_group or 0), str(self.block_rows)),
            "0" * DIGITS * self.blocks if block_sha256 is None else block_sha256,
        )
        metadata, row_bytes = dict(zip(_KEYS, values, strict=True)), self.format.row_bytes
        if self.format.tensor_scale is not None:
            metadata[TENSOR_SCALE_KEY] = repr(self.format.tensor_scale.value)
        tensors: list[tuple[str, str, tuple[int, ...], int]] = []
        if hot:
            zeros = "0" * DIGITS * (1 + -(-hot // self.block_rows))
            metadata[HOT_KEY] = zeros if hot_sha256 is None else hot_sha256
            tensors.append((NUMBERS, "I64", (hot,), hot * NUMBER_BYTES))
            tensors.append((COPIES, "U8", (hot, row_bytes), hot * row_bytes))
        tensors.append((TENSOR, "U8", (self.rows, row_bytes), self.rows * row_bytes))
        record: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, dtype, shape, size in tensors:
            record[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + size)}
            end += size
        text = json.dumps(record, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text) + hot * (NUMBER_BYTES + row_bytes)) % PAGE)
        content = len(text).to_bytes(8, "little") + text
        return content if block_sha256 is None else _sealed(content, seal(content))


def seal(header: bytes) -> str:
    """SHA-256 of all bytes before the first tensor, with zeros where it stands itself."""
    return hashlib.sha256(_sealed(header, "0" * DIGITS)).hexdigest()


def checksums_at(header: bytes) -> int:
    """Where in the file the checksums of blocks begin."""
    return header.index(_CHECKSUMS) + len(_CHECKSUMS)


def _sealed(header: bytes, digits: str) -> bytes:
    return _with(header, header.index(_SEALED) + len(_SEALED), digits)


def _with(header: bytes, place: int, digits: str) -> bytes:
    return header[:place] + digits.encode() + header[place + len(digits) :]


class Damage(NamedTuple):
    """A block that is not what its checksum says: rows `first` to `last` - 1, or copies."""

    block: int
    first: int
    last: int


class Verified(NamedTuple):
    """What a file holds, by reading all of it."""

    sha256: str
    """SHA-256 of the header with the checksums of what was read: the file's own if it is whole."""
    damaged: list[Damage]
    damaged_copies: list[Damage]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed file whose header has been checked; its rows are not read yet."""

    label: Label
    region: Region
    """Where the rows are."""
    block_rows: int
    block_sha256: str
    """64 hex digits a block."""
    sha256: str
    """As recorded: of the header, and through the checksums in it of every row."""
    hot: Hot | None = None

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], specification: Specification | None = None
    ) -> "Packed":
        """Checks the header, that the file is as long as it says, and the numbers of hot rows.

        DataError for a file that is truncated, damaged in its header, unfinished or no packed file,
        of another version, or of another shape or dtype than its specification gives it;
        MismatchError where `specification` is given and is another.
        """
        path = Path(path)
        header = read_header(path)
        given = header.metadata
        if given.get("format") != FORMAT:
            _refuse(path, f"format={given.get('format')!r}: no packed table ({FORMAT!r} is needed)")
        if given.get("version") != VERSION:
            _refuse(path, f"version={given.get('version')!r}: version {VERSION!r} is read")
        hot = NUMBERS in header.tensors
        if wrong := (set(given) - {TENSOR_SCALE_KEY}) ^ {*_KEYS, *((HOT_KEY,) if hot else ())}:
            _refuse(path, f"metadata key {min(wrong)!r}: just {', '.join(_KEYS)} are needed")
        if list(header.tensors) not in ([TENSOR], [NUMBERS, COPIES, TENSOR]):
            _refuse(
                path,
                f"tensors {', '.join(header.tensors)}: one named {TENSOR!r} is needed, and "
                f"before it none or {NUMBERS}, {COPIES}",
            )
        entry = header.tensors[TENSOR]
        start = min(each.offset for each in header.tensors.values())
        _check_seal(path, start, given["header_sha256"])
        label = _label(path, header)
        if (entry.dtype, entry.shape) != ("U8", (label.rows, label.format.row_bytes)):
            _refuse(
                path,
                f"rows are {entry.dtype} {entry.shape}: by specification and dtype they are U8 "
                f"{(label.rows, label.format.row_bytes)}",
            )
        block_rows = _natural(path, "block_rows", given["block_rows"])
        digits = DIGITS * -(-label.rows // max(1, block_rows))
        if block_rows < 1 or len(given["block_sha256"]) != digits:
            found = len(given["block_sha256"])
            _refuse(path, f"block_sha256 has {found} digits for blocks of {block_rows} rows")
        region = Region(
            path=path, offset=entry.offset, rows=label.rows, row_bytes=label.format.row_bytes
        )
        if specification is not None and specification.digest != label.specification.digest:
            raise MismatchError(
                f"{path}: packed with the specification of sha256 {label.specification.digest}, "
                f"sha256 {specification.digest} is asked for"
            )
        return cls(
            label=label,
            region=region,
            block_rows=block_rows,
            block_sha256=given["block_sha256"],
            sha256=given["header_sha256"],
            hot=Hot.open(header.tensors, region, block_rows, given[HOT_KEY]) if hot else None,
        )

    def verify(self, progress: Callable[[int], None] | None = None) -> "Verified":
        """Reads everything once, rows that have copies twice, and says what it found.

        progress: called with the bytes of each block. DataError where the file cannot be read.
        """
        measured = {"block_sha256": "", HOT_KEY: ""}
        damaged, copies = [], []
        for damage, digits in self._blocks(progress):
            measured["block_sha256"] += digits
            damaged += [damage] if damage else []
        for damage, digits in self._copies(progress):
            measured[HOT_KEY] += digits
            copies += [damage] if damage else []
        header = _header(self.region.path)
        header = _with(header, checksums_at(header), measured["block_sha256"])
        if self.hot is not None:  # behind the digits of the numbers, which are checked on opening
            header = _with(header, header.index(_COPIES) + len(_COPIES) + DIGITS, measured[HOT_KEY])
        return Verified(seal(header), damaged, copies)

    def damaged(self, progress: Callable[[int], None] | None = None) -> Iterator[Damage]:
        """Reads every row once and names the blocks that are not what their checksums say.

        progress: called with the bytes of each block. DataError where the file cannot be read.
        """
        return (damage for damage, _ in self._blocks(progress) if damage is not None)

    def damaged_copies(self, progress: Callable[[int], None] | None = None) -> Iterator[Damage]:
        """Reads every copy of a hot row, and that row, and names the blocks of copies that are not
        what their checksums say or not what the table has.

        progress: called with the bytes of each block. DataError where the file cannot be read.
        """
        return (damage for damage, _ in self._copies(progress) if damage is not None)

    def _blocks(
        self, progress: Callable[[int], None] | None
    ) -> Iterator[tuple[Damage | None, str]]:
        """The damage of each block, and the SHA-256 of what is there."""
        region, size = self.region, self.block_rows * self.region.row_bytes
        try:
            with region.path.open("rb", buffering=0) as file:
                file.seek(region.offset)
                for block, first in enumerate(range(0, region.rows, self.block_rows)):
                    last = min(first + self.block_rows, region.rows)
                    content = file.read(min(size, (last - first) * region.row_bytes))
                    digits = hashlib.sha256(content).hexdigest()
                    whole = digits == self.block_sha256[DIGITS * block : DIGITS * (block + 1)]
                    yield None if whole else Damage(block, first, last), digits
                    if progress is not None:
                        progress(len(content))
        except OSError as error:
            raise DataError(f"{region.path}: {error.strerror}") from error

    def _copies(
        self, progress: Callable[[int], None] | None
    ) -> Iterator[tuple[Damage | None, str]]:
        if self.hot is None:
            return
        with Disk(self.label.format, [[self.region]]) as table:
            for block, first in enumerate(range(0, self.hot.region.rows, self.block_rows)):
                rows_M, bytes_MR, whole = self.hot.block(block)
                whole = whole and bytes_MR.equal(table.gather(rows_M))
                digits = hashlib.sha256(bytes_MR.numpy().tobytes()).hexdigest()
                yield None if whole else Damage(block, first, first + len(rows_M)), digits
                if progress is not None:
                    progress(bytes_MR.nbytes)


def _header(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            return start + file.read(int.from_bytes(start, "little"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _check_seal(path: Path, length: int, recorded: str) -> None:
    with path.open("rb") as file:
        content = file.read(length)
    if content.count(_SEALED) != 1 or len(recorded) != DIGITS or seal(content) != recorded:
        _refuse(path, f"its header is not what header_sha256={recorded[:16]!r}... says: damaged")


def _label(path: Path, header: Header) -> Label:
    given = header.metadata
    try:
        specification = Specification.from_dict(json.loads(given["specification"]))
    except (ValueError, ConfigError) as error:
        _refuse(path, f"specification: {error}")
    if specification.digest != given["specification_sha256"]:
        _refuse(path, f"its specification has sha256 {specification.digest}, not the recorded one")
    layer = _natural(path, "layer", given["layer"])
    if layer not in specification.layers:
        _refuse(path, f"layer={layer}: its specification has layers {specification.layers}")
    dim, group = (_natural(path, name, given[name]) for name in ("dim", "scale_group"))
    if given["dtype"] not in DTYPES:
        _refuse(path, f"dtype={given['dtype']!r}: accepted are {', '.join(DTYPES)}")
    try:
        format = RowFormat(
            dtype=DTYPES[given["dtype"]],
            dim=dim,
            scale_group=group or None,
            tensor_scale=_tensor_scale(path, given),
        )
    except ConfigError as error:
        _refuse(path, str(error))
    if given["scale_dtype"] not in SCALES or SCALES[given["scale_dtype"]] != format.scale_dtype:
        _refuse(path, f"scale_dtype={given['scale_dtype']!r}: not that of {format.name} rows")
    return Label(specification=specification, layer=layer, format=format)


def _tensor_scale(path: Path, given: Mapping[str, str]) -> TensorScale | None:
    text, dtype = given.get(TENSOR_SCALE_KEY), SCALES.get(given["scale_dtype"])
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if dtype is None or repr(value) != text:
        _refuse(
            path,
            f"{TENSOR_SCALE_KEY}={text!r} of scale_dtype={given['scale_dtype']!r}: the shortest "
            "decimal of a bf16 or fp32 above 0 is needed",
        )
    return TensorScale(value, dtype)


def _natural(path: Path, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        _refuse(path, f"{name}={text!r}: a whole number is needed")
    return int(text)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise DataError(f"{path}: {' '.join(reason.split())}")
