"""Where a family's own caches lose track of a text, so that a memory must not go on either.

Shapes: B sequences, T tokens of a call, W positions of the text so far.
What the bare models do: a sliding window counts padding as tokens, and a recurrent layer reads
padding that does not stand at the start, and reads across documents.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from engram_lm.errors import ConfigError


class Limits:
    """What the layers of one family cannot follow. A check reads a value of the mask."""

    def __init__(self, config: Any) -> None:
        cache = DynamicCache(config=config)
        self.family = config.model_type
        self.sliding, self.recurrent = any(cache.is_sliding), any(cache.is_linear)

    def check(
        self,
        tokens: int,
        cache: Cache | None,
        mask: Any,
        padding_mask_BT: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        """ConfigError, with the mode's name, for a call that the bare model gets wrong.

        mask: (B, W), 0 at padding; anything else tells nothing, and padding_mask_BT what it can.
        """
        if not (self.sliding or self.recurrent) or torch.compiler.is_compiling():
            return
        past = cache.get_seq_length() if cache is not None else 0
        if isinstance(mask, Tensor) and mask.ndim == 2:
            seen_BW = mask.bool()
            if past and bool(_ends(seen_BW[:, : mask.shape[1] - tokens + 1])[:, :-1].any()):
                raise ConfigError(self._says("text after right padding", "pad on the left"))
            if past and self.recurrent and not bool(seen_BW[:, -tokens:].all()):
                raise ConfigError(self._says("padding in a later part", "pad the first part only"))
        elif padding_mask_BT is not None and bool(_ends(padding_mask_BT.bool()).any()):
            raise ConfigError(self._says("text after right padding", "pad on the left"))
        if self.recurrent and position_ids is not None and mask is None:
            starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
            if bool(starts.any()):
                raise ConfigError(self._says("packed documents", "give each a row of its own"))

    def _says(self, mode: str, advice: str) -> str:
        kind = "recurrent" if self.recurrent else "sliding-window"
        return f"{mode}: the {kind} layers of {self.family} do not keep it apart; {advice}"


def _ends(seen_BW: Tensor) -> Tensor:
    """True where padding follows a token."""
    return seen_BW[:, :-1] & ~seen_BW[:, 1:]
