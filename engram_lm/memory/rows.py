"""How a row is written, and what a place that holds rows must answer.

Shapes: M rows asked for, E values per row, G scales per row, R bytes per row.
"""

import functools
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from engram_lm.errors import AddressError, ConfigError, DataError, instance, shown, whole_number

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
"""torch knows it by name and does nothing with it: the bytes are ours."""

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": INT4,
}
"""How values of a row may be written, by the names that files and options use."""

_STEPS = {torch.int8: 127, INT4: 7}
"""Largest integer that is written; scales lie so that it stands for a group's largest value."""
_LEAST_EXPONENT = 10
"""ue8m0 byte below which e4m3's smallest value would be no normal float32."""


class TensorScale(NamedTuple):
    """One scale of all values of a table."""

    value: float
    dtype: torch.dtype
    """bfloat16 or float32: in it the scale is written and a value is multiplied."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """The bytes of one row: `dim` values of `dtype`, then one scale per `scale_group` values.

    All little-endian. Values: floats as they are, two's complement integers; of int4 two a byte,
    the first in its low half. Scales: of fp8 one ue8m0 byte b, which stands for 2^(b - 127)
    (DeepSeek-V4.1 has a group of 32: 264 B); of int8 and int4, which need them, a bfloat16.
    tensor_scale: of fp8 rows without scales of their own (Qwen3.8-Flash-Next-FP8: 160 B), the one
    of the whole table, which no row holds. docs/table-format.md draws it. Raises ConfigError.
    """

    dtype: torch.dtype
    dim: int
    scale_group: int | None = None
    tensor_scale: TensorScale | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise ConfigError(f"dtype={shown(self.dtype)}: a row is {', '.join(DTYPES)}")
        object.__setattr__(self, "dim", whole_number("dim", self.dim))
        if self.scale_group is not None:
            group = whole_number("scale_group", self.scale_group)
            object.__setattr__(self, "scale_group", group)
        if self.dim < 1:
            raise ConfigError(f"dim={self.dim}: a row holds at least 1 value")
        if self.dtype == INT4 and self.dim % 2:
            raise ConfigError(f"dim={self.dim}: an int4 row holds an even number of values")
        if self.scale_group is None:
            if self.dtype in _STEPS:
                raise ConfigError(f"scale_group=None: {self.name} rows need scales")
        elif self.dtype.is_floating_point and self.dtype.itemsize > 1:
            raise ConfigError(f"scale_group={self.scale_group}: {self.name} rows have no scales")
        elif self.scale_group < 1 or self.dim % self.scale_group:
            raise ConfigError(f"scale_group={self.scale_group}: must divide dim={self.dim}")
        if self.tensor_scale is not None:
            self._check(self.tensor_scale)

    def _check(self, scale: TensorScale) -> None:
        if self.dtype != torch.float8_e4m3fn or self.scale_group is not None:
            raise ConfigError(
                f"tensor_scale={scale.value!r}: only fp8 rows without scales of their own have one"
            )
        if scale.dtype not in (torch.bfloat16, torch.float32):
            raise ConfigError(f"tensor_scale of {scale.dtype}: bfloat16 or float32")
        written = float(torch.tensor(scale.value, dtype=scale.dtype))
        if not 0 < scale.value < math.inf or written != scale.value:
            raise ConfigError(
                f"tensor_scale={scale.value!r}: a finite {scale.dtype} above 0 is needed"
            )

    @classmethod
    def named(cls, name: str, dim: int) -> "RowFormat":
        """The format of this name in DTYPES, where scaled with a scale per 32 values, or per the
        largest power of two below that divides `dim`. ConfigError on other names."""
        instance("dtype", name, str)
        if name not in DTYPES:
            raise ConfigError(f"dtype={name!r}: accepted are {', '.join(DTYPES)}")
        dim, scaled = whole_number("dim", dim), DTYPES[name].itemsize == 1
        return cls(dtype=DTYPES[name], dim=dim, scale_group=math.gcd(dim, 32) if scaled else None)

    @property
    def name(self) -> str:
        """Of the dtype, in DTYPES."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """What a row's scales, or the table's, are written in; None where there are none."""
        if self.tensor_scale is not None:
            return self.tensor_scale.dtype
        if self.scale_group is None:
            return None
        return torch.bfloat16 if self.dtype in _STEPS else torch.float8_e8m0fnu

    @property
    def value_dtype(self) -> torch.dtype:
        """Of what `decode` gives."""
        if self.tensor_scale is not None:
            return self.tensor_scale.dtype
        if self.scale_group is None:
            return self.dtype
        return torch.float32 if self.dtype in _STEPS else torch.bfloat16

    @property
    def value_bytes(self) -> int:
        """Bytes of a row's values, without its scales."""
        return self.dim // 2 if self.dtype == INT4 else self.dim * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """R, values and scales."""
        if self.scale_group is None or self.scale_dtype is None:
            return self.value_bytes
        return self.value_bytes + self.dim // self.scale_group * self.scale_dtype.itemsize

    def decode(self, bytes_MR: Tensor) -> Tensor:
        """(M, R) uint8 -> (M, E) values: of `dtype` as they are, or scaled, then in bfloat16 (fp8)
        or float32 (int8, int4), or in the dtype of the table's one scale.

        A value times its scale is exact there, in bfloat16 short of its ends. Times the table's one
        scale it is rounded once, as in transformers' FP8Embedding. On a CPU fp8 with scales in rows
        takes the compiled way (rows_numba.py) where numba is installed, to the same bits.
        """
        assert bytes_MR.dtype == torch.uint8 and bytes_MR.shape[-1] == self.row_bytes
        if self.tensor_scale is not None:
            scale, dtype = self.tensor_scale
            return bytes_MR.view(self.dtype).to(dtype) * scale
        if self.scale_group is None:
            return bytes_MR.view(self.dtype)
        if self.dtype == torch.float8_e4m3fn and bytes_MR.device.type == "cpu":
            compiled = _compiled()
            if compiled is not None and compiled.compiles(self):
                return compiled.decode(self, bytes_MR)
        return self.decode_plainly(bytes_MR)

    def decode_plainly(self, bytes_MR: Tensor) -> Tensor:
        """The same for a scaled format, on any device, by torch alone."""
        assert self.scale_group is not None
        values_MV, scales_MX = bytes_MR.tensor_split((self.value_bytes,), dim=-1)
        if self.dtype in _STEPS:
            # A clone begins where two bytes may be read as one number; a slice may not.
            scales_MX = scales_MX.clone(memory_format=torch.contiguous_format)
            packed = self.dtype == INT4
            values_ME = _nibbles(values_MV) if packed else values_MV.view(torch.int8)
            return self._scaled(values_ME, scales_MX.view(torch.bfloat16).float())
        # The byte is a float32's exponent field, which is how the released engines read it.
        scales_MG = (scales_MX.to(torch.int32) << 23).view(torch.float32)
        return self._scaled(values_MV.contiguous().view(self.dtype), scales_MG).bfloat16()

    def _scaled(self, values_ME: Tensor, scales_MG: Tensor) -> Tensor:
        values_MGE = values_ME.float().unflatten(-1, (-1, self.scale_group))
        return (values_MGE * scales_MG[..., None]).flatten(1)

    def encode(self, values_ME: Tensor) -> Tensor:
        """(M, E) floats -> (M, R) uint8: the nearest that can be written; ties go to even.

        A group's scale is the smallest that leaves its largest value within range: of fp8 a power
        of two, of int8 and int4 any bfloat16. DataError where a value is not finite or too large,
        ConfigError for rows that share one scale with their table: nothing is written so.
        """
        assert values_ME.shape[-1] == self.dim
        if self.tensor_scale is not None:
            raise ConfigError("tensor_scale: rows that share one scale are copied, not written")
        values_ME = values_ME.float()
        scaled = self.scale_group is not None
        # Scaled values stay below what bfloat16 and a scale rounded up can reach.
        largest = 2.0**127 if scaled else torch.finfo(self.dtype).max
        wrong_M = ~(values_ME.abs() <= largest).all(1)
        if wrong_M.any():
            row = int(wrong_M.nonzero()[0])
            raise DataError(
                f"row {row} of {len(values_ME)} holds a value that is not finite or above "
                f"{largest:g}, which {self.name} cannot say"
            )
        if self.scale_group is None:
            return values_ME.to(self.dtype).contiguous().view(torch.uint8)
        values_MGE = values_ME.unflatten(-1, (-1, self.scale_group))
        largest_MG = values_MGE.abs().amax(-1)
        if self.dtype in _STEPS:
            scales_MG = _scales_above(largest_MG, _STEPS[self.dtype])
            # In float64 a quotient cannot be rounded onto a tie, or across it.
            values_ME = (values_MGE.double() / scales_MG.double()[..., None]).round().flatten(1)
            values_ME = values_ME.to(torch.int8)
            if self.dtype == INT4:
                values_ME = (values_ME[:, ::2] & 15) | (values_ME[:, 1::2] << 4)
            return torch.cat([values_ME.view(torch.uint8), scales_MG.view(torch.uint8)], dim=1)
        # e4m3 ends at 448 = 0.875 * 2^9.
        fraction_MG, exponent_MG = torch.frexp(largest_MG)
        bytes_MG = 127 + exponent_MG - 9 + (fraction_MG > 0.875).int()
        bytes_MG = bytes_MG.clamp(min=_LEAST_EXPONENT)
        values_MGE = values_MGE / (bytes_MG << 23).view(torch.float32)[..., None]
        values_ME = values_MGE.flatten(1).to(self.dtype)
        return torch.cat([values_ME.view(torch.uint8), bytes_MG.to(torch.uint8)], dim=1)


@functools.cache
def _compiled() -> Any:
    if find_spec("numba") is None:
        return None
    from engram_lm.memory import rows_numba

    return rows_numba


def _nibbles(bytes_MV: Tensor) -> Tensor:
    """(M, V) bytes -> (M, 2 V) int8 from -8 to 7, low halves first."""
    halves = torch.stack([bytes_MV & 15, bytes_MV >> 4], dim=-1).flatten(1)
    return (halves ^ 8).view(torch.int8) - 8


def _scales_above(largest_MG: Tensor, steps: int) -> Tensor:
    """The smallest normal bfloat16 of which `steps` reach so far."""
    scales_MG = (largest_MG / steps).bfloat16().clamp(min=torch.finfo(torch.bfloat16).tiny)
    short_MG = scales_MG.double() * steps < largest_MG.double()
    return (scales_MG.view(torch.int16) + short_MG).view(torch.bfloat16)


class Request(Protocol):
    """Rows of one table that have been asked for."""

    def wait(self) -> Tensor:
        """Their values, (M, E), in the order asked, repeats included."""
        ...


class TierCounts(NamedTuple):
    """What one place has answered since it was opened."""

    name: str
    asked: int
    """Rows that were asked of it."""
    hits: int
    """Of these: answered by it. The others it took from the place behind it."""
    bytes_read: int
    """From a device."""


class RowStore(Protocol):
    """Where the rows of one layer's table live. It answers one question: give me these rows.

    Stores that read from another close it with themselves. `with store:` closes at the end.
    """

    format: RowFormat
    rows: int
    """V, how many there are."""

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8, in the order asked, repeats included.

        AddressError for a row that is not there, DataError once closed or where reading fails.
        """
        ...

    def prefetch(self, rows_M: Tensor) -> None:
        """A hint that these rows will be gathered soon; gather is right without it."""
        ...

    def close(self) -> None:
        """Gives back files, memory and threads; waits for readers that have begun."""
        ...

    def start(self, rows_M: Tensor) -> Request:
        """Asks for rows, (M,) int64, whose values will be waited for."""
        self.prefetch(rows_M)
        return _Read(self, rows_M)

    def tiers(self) -> list[TierCounts]:
        """The fastest first; of stores that keep no counts none."""
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class _Read:
    def __init__(self, store: RowStore, rows_M: Tensor) -> None:
        self.store, self.rows_M = store, rows_M

    def wait(self) -> Tensor:
        return self.store.format.decode(self.store.gather(self.rows_M))


def select(values_VX: Tensor, rows_M: Tensor) -> Tensor:
    """(V, X) -> (M, X). AddressError for a row that is not there (a GPU's own assertion on one)."""
    try:
        return values_VX.index_select(0, rows_M)
    except IndexError:
        check_rows(rows_M, len(values_VX))
        raise


def ascending(rows_M: Tensor) -> bool:
    """Whether each is above the one before: nothing to sort or merge. On a CPU."""
    rows = rows_M.numpy()
    return bool((rows[1:] > rows[:-1]).all())


def check_store(name: str, store: Any) -> None:
    """ConfigError for what answers no requests for rows. A RowStore need not inherit from it."""
    if not all(callable(getattr(store, method, None)) for method in ("gather", "prefetch")):
        raise ConfigError(f"{name}={shown(store)}: a RowStore is needed")


def check_rows(rows_M: Tensor, rows: int) -> None:
    """AddressError where a number is outside 0..rows-1: the first such and its place."""
    if not len(rows_M):
        return
    lowest, highest = torch.aminmax(rows_M)
    if lowest < 0 or highest >= rows:
        place = int(((rows_M < 0) | (rows_M >= rows)).nonzero()[0])
        raise AddressError(
            f"row {int(rows_M[place])} asked for at position {place}: "
            f"this table has rows 0 to {rows - 1}"
        )
