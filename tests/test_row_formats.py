"""Row formats: bytes and values, against slow references that know one value at a time."""

import math
import struct

import numpy as np
import pytest
import torch

from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.rows import DTYPES, RowFormat, TensorScale

STEPS = {"int8": 127, "int4": 7}
ONE = TensorScale(1.0, torch.bfloat16)


def e4m3(byte: int) -> float:
    """OCP 8-bit floating point, E4M3: sign, 4 bits of exponent, 3 of fraction; no infinity."""
    sign, exponent, fraction = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def bf16(pair: bytes) -> float:
    return struct.unpack("<f", b"\0\0" + pair)[0]


def slow_decode(row: bytes, name: str, dim: int, group: int | None) -> list[float]:
    if group is None and name == "bf16":
        return [bf16(row[2 * i : 2 * i + 2]) for i in range(dim)]
    if group is None and name != "fp8":
        return list(struct.unpack(f"<{dim}{'f' if name == 'fp32' else 'e'}", row))
    if name == "fp8":
        scales = row[dim:]
        return [
            e4m3(row[i]) * (2.0 ** (scales[i // group] - 127) if group else 1) for i in range(dim)
        ]
    found = []
    start = dim if name == "int8" else dim // 2
    for i in range(dim):
        if name == "int8":
            value = row[i] - 256 if row[i] > 127 else row[i]
        else:
            half = row[i // 2] >> 4 if i % 2 else row[i // 2] & 15
            value = half - 16 if half > 7 else half
        at = start + 2 * (i // group)
        found.append(value * bf16(row[at : at + 2]))
    return found


def values_of(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Rows of every size: as trained, tiny, huge, with one outlier, on ties, and of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, dim, generator=generator) * 0.02
    values *= 2.0 ** torch.randint(-30, 30, (rows, 1), generator=generator)
    values[0], values[1, 0], values[2] = 0, 3.0, torch.arange(dim) - dim // 2 + 0.5
    values[3] = values[3].bfloat16().float()
    return values


FORMATS = [
    *(RowFormat.named(name, dim) for name in DTYPES for dim in (256, 64, 8, 80, 6)),
    RowFormat(dtype=torch.float8_e4m3fn, dim=7),
    RowFormat(dtype=torch.int8, dim=33, scale_group=3),
]


def label(format: RowFormat) -> str:
    return f"{format.name}-{format.dim}-{format.scale_group}"


@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_decoded_values_are_those_of_a_slow_reference(format):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (40, format.row_bytes), generator=generator, dtype=torch.uint8)
    # Scales within what bfloat16 and a normal float32 can hold.
    if format.scale_dtype == torch.float8_e8m0fnu:
        rows[:, format.value_bytes :] = rows[:, format.value_bytes :].clamp(10, 245)
    elif format.scale_dtype is not None:
        scales = torch.randn(40, format.dim // format.scale_group, generator=generator) * 1e-3
        rows[:, format.value_bytes :] = scales.bfloat16().view(torch.uint8)
    found = format.decode(rows).double().numpy()
    for row, values in zip(rows, found, strict=True):
        slow = slow_decode(bytes(row.tolist()), format.name, format.dim, format.scale_group)
        np.testing.assert_array_equal(values, np.array(slow))
    one = torch.cat([torch.zeros(1, dtype=torch.uint8), rows[5]])[1:][None]  # at an odd address
    if format.scale_group is not None:
        np.testing.assert_array_equal(format.decode(one).double().numpy()[0], found[5])


def test_fp8_decodes_as_the_released_engines_do_whatever_the_bytes():
    values, scales = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    rows = torch.stack([values.flatten(), scales.flatten()], dim=1).to(torch.uint8)
    found = RowFormat(dtype=torch.float8_e4m3fn, dim=1, scale_group=1).decode(rows)[:, 0]
    e4m3_M = rows[:, 0].contiguous().view(torch.float8_e4m3fn).float()
    theirs = (e4m3_M * (rows[:, 1].to(torch.int32) << 23).view(torch.float32)).bfloat16()
    assert torch.equal(found.view(torch.int16), theirs.view(torch.int16))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8"])
def test_values_that_a_format_can_say_come_back_bit_for_bit(dtype):
    for dim in (8, 160):
        format = RowFormat(dtype=DTYPES[dtype], dim=dim)
        values = values_of(9, dim).clamp(-400, 400).to(format.dtype)
        assert torch.equal(
            format.decode(format.encode(values)).view(torch.uint8), values.view(torch.uint8)
        )


@pytest.mark.parametrize("format", [f for f in FORMATS if f.name != "fp32"], ids=label)
def test_what_is_written_is_the_nearest_that_its_scale_can_say(format):
    values = values_of(8, format.dim)
    if format.scale_group is None:
        values = values.clamp(-400, 400)
    rows = format.encode(values)
    assert rows.shape == (8, format.row_bytes) and rows.dtype == torch.uint8
    error = (format.decode(rows).double() - values.double()).abs().numpy()
    slow = np.array(
        [nearest_error(format, row, given) for row, given in zip(rows, values, strict=True)]
    )
    np.testing.assert_array_equal(error, slow)


def nearest_error(format: RowFormat, row: torch.Tensor, values: torch.Tensor) -> list[float]:
    """Distance of each value to the closest that can be written beside the row's own scales."""
    errors = []
    for i, value in enumerate(values.double().tolist()):
        scale = 1.0
        if format.scale_group is not None:
            group = i // format.scale_group
            scales = bytes(row[format.value_bytes :].tolist())
            at = 2 * group
            scale = (
                2.0 ** (scales[group] - 127) if format.name == "fp8" else bf16(scales[at : at + 2])
            )
        errors.append(np.abs(codes(format.name) * scale - value).min())
    return errors


def codes(name: str) -> np.ndarray:
    """Every value that can be written without scale."""
    if name == "fp8":
        return np.array([e4m3(b) for b in range(256) if b & 127 != 127])
    if name in STEPS:
        return np.arange(-STEPS[name], STEPS[name] + 1, dtype=np.float64)
    pairs = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(DTYPES[name]).double().numpy()
    return pairs[np.isfinite(pairs)]


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_a_scale_is_the_smallest_that_leaves_the_largest_value_in_range(name):
    format = RowFormat.named(name, 64)
    values = values_of(300, 64)[1:]
    largest = values.unflatten(1, (2, 32)).abs().amax(2).double().numpy()
    scales = format.encode(values)[:, format.value_bytes :].contiguous()
    if name == "fp8":
        exponents = scales.double().numpy()
        reach, below = (448 * 2.0 ** (exponents - 127 - less) for less in (0, 1))
    else:
        bits = scales.view(torch.int16)
        reach, below = (
            STEPS[name] * (bits - less).view(torch.bfloat16).double().numpy() for less in (0, 1)
        )
    assert (below < largest).all() and (largest <= reach).all()


def test_what_is_written_twice_is_written_alike():
    values = values_of(50, 64)
    for name in ("fp32", "bf16", "fp16", "fp8"):
        format = RowFormat.named(name, 64)
        once = format.decode(format.encode(values.clamp(-6e4, 6e4)))
        assert torch.equal(format.decode(format.encode(once.float())), once)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_a_value_that_cannot_be_said_is_refused_with_its_row(name, value):
    format = RowFormat.named(name, 8)
    values = torch.zeros(5, 8)
    values[3, 2] = value
    if name == "fp32" and value == 3.4e38:
        return
    with pytest.raises(DataError, match=f"row 3 of 5 holds a value .* which {name} cannot say"):
        format.encode(values)


def test_row_bytes_are_those_of_the_page():
    sizes = {name: RowFormat.named(name, 256).row_bytes for name in DTYPES}
    assert sizes == {"fp32": 1024, "bf16": 512, "fp16": 512, "fp8": 264, "int8": 272, "int4": 144}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_scale_of_a_table_multiplies_every_byte_and_rounds_once(dtype):
    scale = float(torch.tensor(0.000199, dtype=dtype))
    rows = torch.arange(256, dtype=torch.uint8)[:, None]
    format = RowFormat(dtype=torch.float8_e4m3fn, dim=1, tensor_scale=TensorScale(scale, dtype))
    assert (format.row_bytes, format.value_dtype, format.scale_dtype) == (1, dtype, dtype)
    exact = torch.tensor([e4m3(byte) * scale for byte in range(256)], dtype=torch.float64)
    found = format.decode(rows)[:, 0]
    assert found.dtype == dtype and torch.equal(found.isnan(), exact.isnan())
    # 4 bits of fraction times 24 or 8 of them: exact in float64, and in float32 before bfloat16.
    assert torch.equal(found.nan_to_num(), exact.to(dtype).nan_to_num())
    with pytest.raises(ConfigError, match="rows that share one scale are copied, not written"):
        format.encode(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": torch.int64}, "dtype=torch.int64: a row is fp32"),
        ({"dtype": torch.int8}, "scale_group=None: int8 rows need scales"),
        ({"dtype": torch.int4}, "scale_group=None: int4 rows need scales"),
        ({"dtype": torch.int4, "dim": 9, "scale_group": 3}, "dim=9: an int4 row"),
        ({"dtype": torch.bfloat16, "scale_group": 4}, "bf16 rows have no scales"),
        ({"dtype": torch.float8_e4m3fn, "scale_group": 3}, "scale_group=3: must divide dim=8"),
        ({"dtype": torch.float8_e4m3fn, "scale_group": 0}, "scale_group=0: must divide dim=8"),
        ({"dtype": torch.bfloat16, "tensor_scale": ONE}, "tensor_scale=1.0: only fp8 rows"),
        ({"tensor_scale": ONE, "scale_group": 4}, "tensor_scale=1.0: only fp8 rows without scales"),
        ({"tensor_scale": TensorScale(1.0, torch.float16)}, "bfloat16 or float32"),
        ({"tensor_scale": TensorScale(0.1, torch.bfloat16)}, "tensor_scale=0.1: a finite torch.bf"),
        ({"tensor_scale": TensorScale(0.0, torch.float32)}, "tensor_scale=0.0: a finite"),
        ({"tensor_scale": TensorScale(math.nan, torch.float32)}, "tensor_scale=nan: a finite"),
        ({"tensor_scale": TensorScale(math.inf, torch.bfloat16)}, "tensor_scale=inf: a finite"),
        ({"dtype": torch.float32, "dim": 0}, "dim=0"),
    ],
)
def test_a_format_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        RowFormat(**{"dtype": torch.float8_e4m3fn, "dim": 8, **fields})
    with pytest.raises(ConfigError, match="dtype='fp7': accepted are fp32, bf16"):
        RowFormat.named("fp7", 8)
