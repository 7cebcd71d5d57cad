"""Where documents start in a packed row, as attention sees it too.

Shapes: B sequences, T tokens of a call.
transformers keeps documents apart by their positions where it gets neither a mask nor a cache; a
2-D mask or a cache makes one text of a row. Memory follows attention, and never a different rule.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from engram_lm.errors import AddressError


def text_positions(position_ids: Tensor | None) -> Tensor | None:
    """What attention goes by, (B, T), of position_ids in the shapes that transformers has for them.

    (T,) is for all sequences. Of (4, B, T) the first plane is of the text; (3, B, T) are planes of
    time, height and width, of which attention is told nothing: then it sees one text, and so does
    memory. None for these and for None.
    """
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    if position_ids.ndim == 1:
        return position_ids[None]
    return position_ids[0] if position_ids.ndim == 3 and len(position_ids) == 4 else None


def document_starts(
    position_ids: Tensor, padding_BT: Tensor | None, attention_mask: Any, cache: Cache | None
) -> Tensor:
    """True at the first token of each document, bool, of the shape of position_ids.

    AddressError where attention would read across a start.
    """
    if padding_BT is not None:
        position_ids = position_ids.masked_fill(padding_BT, -1)
    starts_BT = position_ids == 0
    steps_BT = position_ids.diff(dim=1)
    if attention_mask is None and cache is None:
        starts_BT[:, 1:] |= steps_BT != 1
        return starts_BT
    starts_BT[:, 1:] |= steps_BT <= 0
    if padding_BT is not None:
        starts_BT &= ~padding_BT
    flat = attention_mask is None or (
        isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    )
    if flat and not torch.compiler.is_compiling():
        _refuse_crossing(starts_BT, attention_mask, cache)
    return starts_BT


def _refuse_crossing(starts_BT: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> None:
    T = starts_BT.shape[1]
    if attention_mask is None:
        past = 0 if cache is None else cache.get_seq_length()
        before_BT = past + torch.arange(T, device=starts_BT.device).expand_as(starts_BT)
    else:
        seen = attention_mask.to(torch.int64)
        before_BT = (seen.cumsum(1) - seen)[:, -T:]
    wrong_BT = starts_BT & (before_BT > 0)
    if bool(wrong_BT.any()):
        sequence, position = (int(index) for index in wrong_BT.nonzero()[0])
        raise AddressError(
            f"position_ids: a document starts at position {position} of sequence {sequence}, but a "
            "2-D attention_mask or a cache makes one text of a row; leave both out "
            "(use_cache=False), or give a 4-D attention_mask"
        )
