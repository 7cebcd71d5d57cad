"""Calls in which a family's own masks and caches lose track of a text: a memory must not go on.

Shapes: B sequences, T tokens of a call, W positions of the text so far.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from engram_lm.errors import ConfigError
from engram_lm.model.cache import begun
from engram_lm.model.probe import (
    AFTER,
    CHUNKS,
    LATER,
    LEFT,
    LEFT_UNPLACED,
    MASKED,
    PACKED,
    STEPS,
    UNPLACED,
)

_ADVICE = {
    PACKED: "give each document a row of its own",
    MASKED: "give each document a row of its own",
    LEFT: "read texts of one length at a time",
    LEFT_UNPLACED: "give position_ids, which count tokens and not padding",
    AFTER: "pad on the left",
    LATER: "pad the first part only",
    UNPLACED: "give position_ids, which go on from the text before",
    STEPS: "leave the cache out (use_cache=False)",
    CHUNKS: "read the text in one part, and then one token after another",
}


def check(
    family: str,
    refused: Mapping[str, str],
    tokens: int,
    cache: Cache | None,
    mask: Any,
    padding_mask_BT: Tensor | None,
    positions_BT: Tensor | None,
    placed: bool,
) -> None:
    """ConfigError, with the mode's name, for a call in a mode that the bare family gets wrong.

    refused: what `probe` gave. tokens: T. mask: (B, W), 0 at padding; another mask says nothing of
    padding, and padding_mask_BT what it can. positions_BT: those that attention goes by, or None;
    placed: whether the caller gave position_ids. Reads values of the masks.
    """
    if not refused:
        return
    # A graph cannot branch on what a mask holds: compiled, the modes of masks are not looked at.
    compiling = torch.compiler.is_compiling()
    past = cache is not None and begun(cache)
    seen_BW = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    happens: dict[str, Callable[[], bool]] = {
        STEPS: lambda: past,
        UNPLACED: lambda: past and not placed,
        CHUNKS: lambda: past and tokens > 1,
    }
    if compiling:
        pass
    elif seen_BW is not None:
        earlier_BW = seen_BW[:, : seen_BW.shape[1] - tokens]
        happens[LEFT] = lambda: not bool(seen_BW[:, 0].all())
        happens[AFTER] = lambda: past and _ends(earlier_BW)
        happens[LATER] = lambda: past and not bool(seen_BW[:, -tokens:].all())
    elif padding_mask_BT is not None:
        seen_BT = padding_mask_BT.bool()
        happens[LEFT] = lambda: not past and not bool(seen_BT[:, 0].all())
        happens[AFTER] = lambda: cache is not None and _ends(seen_BT)
        happens[LATER] = lambda: past and not bool(seen_BT.all())
    if LEFT in happens and not placed:
        happens[LEFT_UNPLACED] = happens[LEFT]
    if positions_BT is not None and seen_BW is None and not compiling:
        starts_BT = positions_BT[:, 1:] != positions_BT[:, :-1] + 1
        if padding_mask_BT is not None:
            starts_BT = starts_BT & padding_mask_BT[:, :-1].bool()
        happens[PACKED if mask is None else MASKED] = lambda: bool(starts_BT.any())
    for mode, happening in happens.items():
        if mode in refused and happening():
            raise ConfigError(
                f"{mode}: {family} gets it wrong without memory too ({refused[mode]}); "
                f"{_ADVICE[mode]}"
            )


def _ends(seen_BW: Tensor) -> bool:
    """Whether padding follows a token."""
    return bool((seen_BW[:, :-1] & ~seen_BW[:, 1:]).any())
