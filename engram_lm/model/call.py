"""One call of a decoder: its token ids, and what its masks and positions mean to a memory.

Shapes: B sequences, T tokens.
"""

from typing import Any, NamedTuple

from torch import Tensor
from transformers import Cache

from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.state import DecodingState
from engram_lm.memory.window import Window
from engram_lm.model.documents import document_starts, text_positions


class Call(NamedTuple):
    """Masks are bool (B, T) or None."""

    ids_BT: Tensor
    padding_BT: Tensor | None
    masked_BT: Tensor | None
    """True at image tokens."""
    starts_BT: Tensor | None
    positions_BT: Tensor | None = None
    """What attention is told of documents by, (B, T) or (1, T)."""

    @classmethod
    def of(
        cls,
        ids_BT: Tensor | None,
        cache: Cache | None,
        *,
        attention_mask: Any,
        padding_mask: Tensor | None,
        masked: Tensor | None,
        position_ids: Tensor | None,
    ) -> "Call":
        """Arguments as decoders get them. ValueError without ids."""
        if ids_BT is None:
            raise ValueError("inputs_embeds without engram_input_ids: memory is addressed by ids")
        flat = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        if padding_mask is None and flat:
            padding_mask = attention_mask[:, -ids_BT.shape[1] :]
        padding_BT = None if padding_mask is None else ~padding_mask.bool()
        starts_BT, positions_BT = None, text_positions(position_ids)
        if positions_BT is not None:
            starts_BT = document_starts(positions_BT, padding_BT, attention_mask, cache)
            starts_BT = starts_BT.expand_as(ids_BT)
        return cls(ids_BT, padding_BT, masked, starts_BT, positions_BT)

    @property
    def kept_BT(self) -> Tensor | None:
        """False where a gate is held at 0."""
        if self.padding_BT is None:
            return None if self.masked_BT is None else ~self.masked_BT
        if self.masked_BT is None:
            return ~self.padding_BT
        return ~(self.padding_BT | self.masked_BT)

    def window(self, addresses: Addresses, keep: int, state: DecodingState | None) -> Window:
        """The call behind what was remembered, or behind nothing. keep: positions of look-back."""
        masks = (self.padding_BT, self.masked_BT, self.starts_BT)
        lookback = keep if state is None else 0
        window = addresses.open(self.ids_BT, None, *masks, lookback=lookback)
        return window if state is None else state.open(window)
