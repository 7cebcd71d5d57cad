"""What a safetensors file says it holds, and where in the file: no byte of a tensor is read.

In: a file. Out: names, dtypes, shapes and absolute offsets, so that rows can be read in place.
safetensors' own reader maps the file and hands out tensors, never where they are. The rules are
those of its format: 8 bytes of length, that many bytes of JSON, then tensors without a gap.
"""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from engram_lm.errors import DataError

MOST_BYTES = 2**25
"""Of JSON that are accepted, some 250,000 tensors (safetensors stops at 10^8). Reading that many
hostile bytes takes at most 1 GB."""

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Of one value of each dtype that a safetensors file may hold."""

_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}


class Entry(NamedTuple):
    """Where one tensor is: `size` bytes from byte `offset` of the file, row by row."""

    dtype: str
    """As safetensors writes it: a key of BITS."""
    shape: tuple[int, ...]
    offset: int
    size: int


class Header(NamedTuple):
    """All that stands before the first tensor."""

    tensors: dict[str, Entry]
    """By name, in the order of their offsets: they fill the rest of the file without a gap."""
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file, checked from end to end.

    DataError in one line where a file is missing, truncated or overlong, where a name stands twice,
    a dtype is unknown, a shape is negative or does not fit its bytes, or tensors overlap or leave
    the file.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a file")  # and opening a pipe would wait for its writer
        with path.open("rb", buffering=0) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > file_bytes - 8:
                _refuse(path, f"a header of {length} bytes in a file of {file_bytes}: truncated")
            if length > MOST_BYTES:
                _refuse(path, f"a header of {length} bytes; up to {MOST_BYTES} are read")
            content = _read(file, length)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if len(content) < length:
        _refuse(path, f"{len(content)} of the header's {length} bytes are there: truncated")
    record = _parse(path, content)
    metadata = _metadata(path, record.pop(_METADATA, {}))
    entries = [(name, _entry(path, name, given, 8 + length)) for name, given in record.items()]
    entries.sort(key=lambda named: (named[1].offset, named[1].size))
    end = 8 + length
    for name, entry in entries:
        if entry.offset != end:
            word = "overlaps the tensor before it" if entry.offset < end else "leaves a gap"
            _refuse(path, f"{name!r} begins at byte {entry.offset}, not {end}: it {word}")
        end += entry.size
    if end != file_bytes:
        word = "truncated" if end > file_bytes else "overlong"
        _refuse(path, f"its tensors end at byte {end} of {file_bytes}: {word}")
    return Header(dict(entries), metadata, file_bytes)


def _read(file: Any, length: int) -> bytes:
    content = bytearray()
    while len(content) < length and (part := file.read(length - len(content))):
        content += part
    return bytes(content)


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    if not content.startswith(b"{"):
        _refuse(path, "its header does not begin with {")
    try:
        text = content.decode("utf-8")
        record: dict[str, Any] = json.loads(text, object_pairs_hook=once, parse_constant=_constant)
        # A lone surrogate, written as an escape, is no character and could not be printed.
        "".join(record).encode("utf-8")
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not JSON ({_short(error)})")
    return record


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. ValueError where a name stands twice in it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{_short(repr(twice))} stands twice")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _metadata(path: Path, given: Any) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        _refuse(path, f"{_METADATA} must be an object of strings")
    return given


def _entry(path: Path, name: str, given: Any, begin: int) -> Entry:
    """begin: the byte of the file from which offsets count."""
    if not isinstance(given, dict) or given.keys() != _KEYS:
        _refuse_tensor(path, name, f"must be an object of {', '.join(sorted(_KEYS))}")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        known = ", ".join(BITS)
        _refuse_tensor(path, name, f"has dtype {_short(repr(dtype))}; known are {known}")
    if not _naturals(shape):
        needed = "sizes from 0 to 2^63 are needed"
        _refuse_tensor(path, name, f"has shape {_short(repr(shape))}: {needed}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        needed = "a begin and an end"
        _refuse_tensor(path, name, f"has data_offsets {_short(repr(offsets))}: {needed}")
    size = offsets[1] - offsets[0]
    if _bits(dtype, shape) != 8 * size:
        written = f"{dtype} of shape {_short(repr(shape))}"
        _refuse(path, f"{_short(repr(name))}: {written} does not take {size} bytes")
    return Entry(dtype, tuple(shape), begin + offsets[0], size)


def _naturals(given: Any) -> bool:
    # A checkpoint has 300,000 such lists: a generator for each would take seconds.
    if not isinstance(given, list) or not {*map(type, given)} <= {int}:
        return False
    return not given or (min(given) >= 0 and max(given) < 2**63)


def _bits(dtype: str, shape: list[int]) -> int:
    """Of a whole tensor; some number above 2^70 where it is more than that."""
    bits = 0 if 0 in shape else BITS[dtype]
    for size in shape:
        bits *= size
        if bits > 2**70:  # a product of a million factors would take hours
            break
    return bits


def _short(given: object) -> str:
    text = " ".join(str(given).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_tensor(path: Path, name: str, reason: str) -> NoReturn:
    _refuse(path, f"{_short(repr(name))} {reason}")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise DataError(f"{path}: not a whole safetensors file: {reason}")
