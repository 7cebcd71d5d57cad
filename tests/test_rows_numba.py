"""Rows of fp8 are decoded by the compiled twin to the bits of the plain one."""

import pytest
import torch
from stores import content

from engram_lm.memory.rows import RowFormat

pytest.importorskip("numba")
from engram_lm.memory.rows_numba import compiles, decode


def claim_same_bits(format, bytes_MR):
    assert compiles(format)
    found, plain = decode(format, bytes_MR), format.decode_plainly(bytes_MR)
    assert found.dtype == plain.dtype == torch.bfloat16 and found.shape == plain.shape
    assert torch.equal(found.view(torch.int16), plain.view(torch.int16))
    assert torch.equal(format.decode(bytes_MR).view(torch.int16), plain.view(torch.int16))


def test_every_byte_under_every_scale_is_decoded_alike():
    """Among them zeros of both signs, subnormals, no numbers, and scales that end in infinity."""
    format = RowFormat(dtype=torch.float8_e4m3fn, dim=256, scale_group=32)
    values_MV = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales_MX = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 8)
    claim_same_bits(format, torch.cat([values_MV, scales_MX], dim=1))


@pytest.mark.parametrize("group", [4, 8, 32, 64])
def test_each_group_of_a_row_has_its_own_scale(group):
    format = RowFormat(dtype=torch.float8_e4m3fn, dim=256, scale_group=group)
    for size in (0, 1, 7, 3000):
        bytes_MR = content(format, size)
        claim_same_bits(format, bytes_MR)
        claim_same_bits(format, bytes_MR.T.contiguous().T)
        at_odd_address = torch.cat([torch.zeros(1, dtype=torch.uint8), bytes_MR.flatten()])[1:]
        claim_same_bits(format, at_odd_address.view_as(bytes_MR))


def test_formats_that_do_not_come_in_fours_are_left_to_torch():
    for dim, group in ((256, 128), (8, 8), (6, 2), (7, None)):
        format = RowFormat(dtype=torch.float8_e4m3fn, dim=dim, scale_group=group)
        assert not compiles(format)
        assert format.decode(content(format, 5)).shape == (5, dim)
    assert not compiles(RowFormat.named("int8", 256))
