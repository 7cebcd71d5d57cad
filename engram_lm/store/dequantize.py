"""Projections that a release keeps as fp8, times their scales.

Shapes: O rows, I columns, X x Y blocks that share a scale.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engram_lm.errors import MismatchError

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""What a weight without scales is stored in."""
BLOCK = (128, 128)
"""Rows and columns that share a scale where a release does not say: DeepSeek's custom."""
_SCALES = (*PLAIN, torch.float8_e8m0fnu, torch.uint8)


def dequantized(weight_OI: Tensor, scale: Tensor, block: Sequence[int] = BLOCK) -> Tensor:
    """e4m3 values times their scales, (O, I) float32: each product is exact or rounded once, as in
    transformers' Fp8Dequantize.

    scale: one for all, one for each row (O, 1), or (X, Y) for blocks. MismatchError for any other.
    """
    rows, columns = weight_OI.shape
    if scale.numel() == 1:
        block, scale = (rows, columns), scale.reshape(1, 1)
    elif scale.shape == (rows, 1):
        block = (1, columns)
    return dequantize_blocks(weight_OI, scale, block)


def dequantize_blocks(weight_OI: Tensor, scale_XY: Tensor, block: int | Sequence[int]) -> Tensor:
    """e4m3 values times the scale of their block, (O, I) float32.

    scale_XY: floats, or e8m0 or its bytes (2^(byte - 127)), one for each block of so many rows and
    columns, edges included. MismatchError for another shape or dtype, or one that is not finite.
    """
    rows, columns = weight_OI.shape
    high, wide = (block, block) if isinstance(block, int) else block
    wanted = (-(-rows // high), -(-columns // wide))
    if tuple(scale_XY.shape) != wanted or scale_XY.dtype not in _SCALES:
        raise MismatchError(
            f"scales of shape {tuple(scale_XY.shape)} and {scale_XY.dtype} for a {rows} x "
            f"{columns} matrix: floats or e8m0 of shape {wanted} are needed for blocks of {block}"
        )
    if scale_XY.dtype in PLAIN:
        scale_XY = scale_XY.float()
    else:
        scale_XY = (scale_XY.view(torch.uint8).to(torch.int32) << 23).view(torch.float32)
    if not bool(scale_XY.isfinite().all()):
        raise MismatchError("a scale is not finite")
    scale_OI = scale_XY.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)
    return weight_OI.float() * scale_OI[:, :columns]


def block_size(quantization: object) -> Sequence[int]:
    """weight_block_size of a quantization_config, or what it means to leave it out.

    MismatchError where it is no two whole numbers above 0.
    """
    given = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if given is None:
        return BLOCK
    if (
        not isinstance(given, list)
        or [type(size) for size in given] != [int, int]
        or min(given) < 1
    ):
        raise MismatchError(f"weight_block_size={given!r}: two whole numbers above 0 are needed")
    return given
