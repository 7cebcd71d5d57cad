"""Headers of safetensors files: what is read is what safetensors reads, and damage is one line."""

import contextlib
import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save

from engram_lm.errors import DataError
from engram_lm.store.header import BITS, MOST_BYTES, read_header

TENSORS = {
    "layers.1.embed.weight": torch.arange(48.0).view(6, 8).to(torch.float8_e4m3fn),
    "layers.1.embed.scale": torch.full((6, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "norm": torch.arange(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 3),
}
WHOLE = save(TENSORS, metadata={"format": "pt", "über": "[{"})


def file_of(record: object, content: bytes = b"", length: int | None = None) -> bytes:
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def u8(begin: int, end: int, **changes: object) -> dict:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **changes}


def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """What our reader says of a file, with the bytes that stand where it says."""
    content = path.read_bytes()
    return {
        name: (entry.dtype, list(entry.shape), content[entry.offset : entry.offset + entry.size])
        for name, entry in read_header(path).tensors.items()
    }


def read_by_safetensors(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in deserialize(content)
    }


def test_a_header_reads_as_safetensors_reads_it(tmp_path):
    path = tmp_path / "whole.safetensors"
    path.write_bytes(WHOLE)
    assert read(path) == read_by_safetensors(WHOLE)
    header = read_header(path)
    assert header.metadata == {"format": "pt", "über": "[{"}
    assert header.file_bytes == len(WHOLE)
    offsets = [entry.offset for entry in header.tensors.values()]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_of_safetensors_is_known(tmp_path, dtype):
    path = tmp_path / "one.safetensors"
    size = 4 * BITS[dtype] // 8
    path.write_bytes(file_of({"x": u8(0, size, dtype=dtype, shape=[2, 2])}, bytes(size)))
    with safe_open(path, "np") as file:
        assert file.get_slice("x").get_dtype() == dtype == read_header(path).tensors["x"].dtype


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0: truncated"),
        (b"\x01\0\0", "in a file of 3: truncated"),
        (file_of({}, length=3), "a header of 3 bytes in a file of 10: truncated"),
        (file_of({}, length=2**63), f"a header of {2**63} bytes in a file of 10: truncated"),
        (file_of(b" {}"), "does not begin with {"),
        (file_of(b"{"), "not JSON"),
        (file_of(b"{}x"), "not JSON"),
        (file_of(b'{"\xff": 1}'), "not JSON"),
        (file_of(b'{"\\ud800": 1}'), "not JSON"),
        (file_of(b'{"x": NaN}'), "NaN is no number"),
        (file_of(b'{"x": ' + b"9" * 5000 + b"}"), "not JSON"),
        (file_of(b'{"x":' * 100_000), "not JSON"),
        (file_of(b'{"x": 1, "x": 2}'), "'x' stands twice"),
        (file_of({"__metadata__": {"a": 1}}), "must be an object of strings"),
        (file_of({"x": 1}), "'x' must be an object of data_offsets, dtype, shape"),
        (file_of({"x": {**u8(0, 1), "more": 1}}, b"1"), "'x' must be an object of"),
        (file_of({"x": u8(0, 1, dtype="U7")}, b"1"), "'x' has dtype 'U7'; known are"),
        (file_of({"x": u8(0, 1, dtype=["U8"])}, b"1"), "'x' has dtype ['U8']"),
        (file_of({"x": u8(0, 1, shape=[-1])}, b"1"), "'x' has shape [-1]"),
        (file_of({"x": u8(0, 1, shape=[1.0])}, b"1"), "'x' has shape [1.0]"),
        (file_of({"x": u8(0, 1, shape=[True])}, b"1"), "'x' has shape [True]"),
        (file_of({"x": u8(0, 1, shape=[2**63])}, b"1"), "sizes from 0 to 2^63"),
        (file_of({"x": u8(0, 1, shape=[2**62] * 99)}, b"1"), "does not take 1 bytes"),
        (file_of({"x": u8(0, 1, shape=[2])}, b"1"), "U8 of shape [2] does not take 1 bytes"),
        (file_of({"x": u8(0, 1, data_offsets=[1, 0])}, b"1"), "has data_offsets [1, 0]"),
        (file_of({"x": u8(0, 1, data_offsets=[0, 1, 2])}, b"1"), "has data_offsets [0, 1, 2]"),
        (file_of({"x": u8(0, 1, data_offsets="01")}, b"1"), "has data_offsets '01'"),
        (file_of({"x": u8(0, 2), "y": u8(1, 3)}, b"123"), "'y' begins at byte"),
        (file_of({"x": u8(0, 1), "y": u8(2, 3)}, b"123"), "leaves a gap"),
        (file_of({"x": u8(0, 9)}, b"123"), "truncated"),
        (file_of({"x": u8(0, 2)}, b"123"), "overlong"),
        (file_of({}, b"1"), "overlong"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_header_is_one_line(tmp_path, content, message):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_header(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 400


def test_what_is_no_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for name, message in (("none", "No such file"), ("pipe", "not a file"), (".", "not a file")):
        with pytest.raises(DataError, match=message):
            read_header(tmp_path / name)


def test_a_longer_header_than_is_read_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write((MOST_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2**40)
    with pytest.raises(DataError, match="up to 33554432 are read"):
        read_header(path)


def mutated(draw: random.Random) -> bytes:
    """A whole file with one to four changes: of bytes, or of what its JSON says."""
    length = int.from_bytes(WHOLE[:8], "little")
    content = bytearray(WHOLE)
    if draw.random() < 0.5:
        record = json.loads(content[8 : 8 + length])
        numbers = (-1, 0, 1, 7, 2**31, 2**63 - 1, 2**64, 1e300, True, None, "3", [1])
        for _ in range(draw.randint(1, 4)):
            entry = record[draw.choice(list(TENSORS))]
            key = draw.choice(list(entry) or ["dtype"])
            if draw.random() < 0.1:
                entry.pop(key, None)
            elif draw.random() < 0.1:
                record[draw.choice(("copy", "__metadata__"))] = dict(entry)
            elif isinstance(entry.get(key), list) and entry[key] and draw.random() < 0.8:
                at = draw.randrange(len(entry[key]))
                step = draw.choice(numbers) if draw.random() < 0.5 else entry[key][at]
                nearby = step + draw.randint(-2, 2) if type(step) is int else step
                entry[key][at] = draw.choice((step, nearby))
            else:
                entry[key] = draw.choice((*numbers, *BITS, {}, [2**40] * 3))
        return file_of(record, bytes(content[8 + length :]))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(8 + length + 4, len(content)))
        change = draw.randrange(5)
        if change == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif change == 1:
            del content[at : at + draw.randint(1, 40)]
        elif change == 2:
            content[at:at] = draw.randbytes(draw.randint(1, 9))
        elif change == 3:
            content[at:at] = content[at : at + draw.randint(1, 200)]
        else:
            content[at] = draw.choice(b'{}[],:"0123456789eE-+\\ \n')
    return bytes(content)


def test_ten_thousand_mutated_headers_are_refused_or_rightly_read(tmp_path):
    draw, path = random.Random(0), tmp_path / "mutated.safetensors"
    whole = refused = 0
    for _ in range(10_000):
        content = mutated(draw)
        path.write_bytes(content)
        try:
            found = read(path)
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        whole += 1
        assert found == read_by_safetensors(content)
    assert whole > 300 and refused > 5000


def test_what_safetensors_refuses_we_refuse(tmp_path):
    draw, path = random.Random(1), tmp_path / "mutated.safetensors"
    for _ in range(2000):
        content = mutated(draw)
        try:
            deserialize(content)
        except SafetensorError:
            path.write_bytes(content)
            with pytest.raises(DataError):
                read_header(path)


def test_a_hostile_header_takes_bounded_memory(tmp_path):
    draw, path = random.Random(2), tmp_path / "mutated.safetensors"
    tracemalloc.start()
    try:
        for content in (*(mutated(draw) for _ in range(300)), file_of(b"[" * 10_000, length=2**60)):
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(DataError):
                read_header(path)
            assert tracemalloc.get_traced_memory()[1] - before < 64 * len(content) + 2**17
    finally:
        tracemalloc.stop()
