"""float32 -> bfloat16 by chance: up or down, so that the mean is the value itself.

Shapes: U rows, E values per row, G groups of four values.
Rounding to the nearest drops every update below half a unit in the last place (2^-9 of the value);
rows that many small updates should move then never move.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""SplitMix64's increment and its two factors, as signed integers."""


def round_to_bf16(values_UE: Tensor, rows_U: Tensor, key: tuple[int, int, int]) -> Tensor:
    """Each value as one of its two neighbours in bfloat16, the nearer one more often; unbiased.

    Which one is a function of `key` (seed, table, step), the row's number in the whole table and
    the column, and of nothing else: a run that resumes, skips a step or owns other rows draws what
    it would have, and there is no generator whose state could be lost.
    """
    noise_UE = _noise(rows_U, values_UE.shape[1], key)
    bits_UE = values_UE.float().view(torch.int32)
    # Adding 16 random bits carries into the upper half as often as the lower half is large.
    return ((bits_UE + noise_UE) >> 16).to(torch.int16).view(torch.bfloat16)


def _noise(rows_U: Tensor, dim: int, key: tuple[int, int, int]) -> Tensor:
    """Uniform on 0 to 65535, int32."""
    groups = -(-dim // 4)
    counter_U = rows_U * groups
    start = torch.zeros((), dtype=torch.int64, device=rows_U.device)
    for part in key:
        start = _mix(start + part + _MULTIPLIERS[0])
    counter_UG = counter_U[:, None] + torch.arange(groups, device=rows_U.device)
    random_UG = _mix(counter_UG * _MULTIPLIERS[0] + start)
    return random_UG.view(torch.int16)[:, :dim].to(torch.int32) & 0xFFFF


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's output function on int64, whose >> copies the sign: hence the masks."""
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * _MULTIPLIERS[1]
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * _MULTIPLIERS[2]
    return bits ^ (bits >> 31 & (1 << 33) - 1)
