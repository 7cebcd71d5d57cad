"""Token ids -> row numbers: integers only, exact, and without state.

Shapes: L layers, B sequences, T tokens, W positions of the window, K heads per order, H heads per
layer. mix(order n) = XOR over s < n of canonical(t - s) * multiplier[s], modulo 2^63; head h of
order n reads row mix mod prime(n, h) of its own part of the layer's table. Section 2.2 of arXiv
2601.07372; only ids beyond the tokenizer's reach 2^63.

This is the readable twin that also runs on a GPU; everything faster must equal it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engram_lm.errors import instance
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import INT64_MAX, Specification
from engram_lm.memory.window import EMPTY, Window, open_window


class _Constants(NamedTuple):
    canonical_V: Tensor
    multipliers_NL: Tensor
    primes_NLK: Tensor
    offsets_LH: Tensor


class Addresses:
    """A specification bound to a canonical map: answers which rows a token sequence reads.

    Plain object, no module: there is nothing in it to train, move or load. Constants are copied to
    each device once, when ids on that device are first seen.
    canonical: the tokenizer's map, or what it has `grown` to for a model with more token ids.
    """

    def __init__(self, specification: Specification, canonical: CanonicalMap) -> None:
        instance("specification", specification, Specification)
        instance("canonical", canonical, CanonicalMap)
        self.specification = specification.bind(canonical)
        self.canonical = canonical
        self._by_device: dict[torch.device, _Constants] = {}

    def grown(self, token_ids: int) -> "Addresses":
        """These addresses for a model that has so many token ids (see CanonicalMap.grown)."""
        return type(self)(self.specification, self.canonical.grown(token_ids))

    @property
    def layers(self) -> tuple[int, ...]:
        """Zero-based numbers of the layers that have a memory."""
        return self.specification.layers

    def rows(
        self,
        token_ids_BT: Tensor,
        history_BH: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        masked: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Row numbers in each layer's whole table, (L, B, T, H) int64, heads order-major.

        history_BH: token ids before these, oldest first, any number; EMPTY (-1) where there is
        none.
        padding: bool (B, T), True where there is no token; looking back steps over it.
        masked: bool (B, T), True at image tokens: they and everything older count as pad.
        document_starts: bool (B, T), True at first tokens; only the boundary rule `document` heeds
        them.
        Raises AddressError with position and value for ids outside the vocabulary.
        """
        return self.window_rows(
            self.open(token_ids_BT, history_BH, padding, masked, document_starts)
        )

    def open(
        self,
        token_ids_BT: Tensor,
        history_BH: Tensor | None = None,
        padding: Tensor | None = None,
        masked: Tensor | None = None,
        document_starts: Tensor | None = None,
        *,
        lookback: int | None = None,
    ) -> Window:
        """The window of a call; `lookback` positions before it instead of the specification's."""
        return open_window(
            token_ids_BT,
            history_BH,
            vocabulary=self.canonical.token_ids,
            lookback=self.specification.lookback if lookback is None else lookback,
            padding_BT=padding,
            masked_BT=masked,
            starts_BT=document_starts if self.specification.boundary_rule == "document" else None,
        )

    def window_rows(self, window: Window) -> Tensor:
        """Row numbers of the T tokens of a window, (L, B, T, H) int64."""
        constants = self._constants(window.ids_BW.device)
        ids_BW, starts_BW = window.packed_ids_BW, self._packed_starts(window)
        B, W = ids_BW.shape
        lookback = self.specification.lookback
        # Padding moves tokens about inside the window, so then the rows of all positions are made.
        T = window.tokens if window.order_BW is None else W
        missing = max(0, lookback - (W - T))
        ids_BW = torch.cat([ids_BW.new_full((B, missing), EMPTY), ids_BW], dim=1)
        if starts_BW is not None:
            starts_BW = torch.cat([starts_BW.new_zeros(B, missing), starts_BW], dim=1)

        canonical_BW = constants.canonical_V[ids_BW.clamp_min(0)]
        empty_BW = ids_BW == EMPTY
        pad = constants.canonical_V[self.specification.pad_id]
        first = ids_BW.shape[1] - T
        blocked_BT = empty_BW[:, first:]
        value_BT = torch.where(blocked_BT, pad, canonical_BW[:, first:])
        mix_LBT = value_BT * constants.multipliers_NL[0][:, None, None]
        rows = []
        for back in range(1, lookback + 1):
            blocked_BT = blocked_BT | empty_BW[:, first - back : first - back + T]
            if starts_BW is not None:  # the token after this one opened a document
                blocked_BT = blocked_BT | starts_BW[:, first - back + 1 : first - back + 1 + T]
            value_BT = torch.where(
                blocked_BT, pad, canonical_BW[:, first - back : first - back + T]
            )
            mix_LBT = mix_LBT ^ (value_BT * constants.multipliers_NL[back][:, None, None])
            # Products wrap round in int64: what is below 2^63 of them is the same modulo 2^63.
            low_LBT = mix_LBT & INT64_MAX
            rows.append(low_LBT[..., None] % constants.primes_NLK[back - 1][:, None, None])
        rows_LBTH = torch.cat(rows, dim=-1) + constants.offsets_LH[:, None, None]
        if window.order_BW is None:
            return rows_LBTH
        return torch.stack([window.unpack(rows_BTH) for rows_BTH in rows_LBTH])

    def _packed_starts(self, window: Window) -> Tensor | None:
        if self.specification.boundary_rule != "eos":
            return window.packed_starts_BW
        # The EOS itself belongs to the segment that it ends. Addressing alone stops here: the
        # short convolution of the released model runs on, so the window is not told.
        ended_BW = window.packed_ids_BW == self.specification.pad_id
        return torch.cat([torch.zeros_like(ended_BW[:, :1]), ended_BW[:, :-1]], dim=1)

    def _constants(self, device: torch.device) -> _Constants:
        if device not in self._by_device:
            specification = self.specification

            def tensor(values: list[object]) -> Tensor:
                return torch.tensor(values, dtype=torch.int64, device=device)

            self._by_device[device] = _Constants(
                canonical_V=self.canonical.ids_V.to(device=device, dtype=torch.int64),
                multipliers_NL=tensor(
                    [specification.multipliers[layer] for layer in self.layers]
                ).T.contiguous(),
                primes_NLK=tensor([specification.primes[layer] for layer in self.layers])
                .transpose(0, 1)
                .contiguous(),
                offsets_LH=tensor([specification.offsets(layer) for layer in self.layers]),
            )
        return self._by_device[device]
