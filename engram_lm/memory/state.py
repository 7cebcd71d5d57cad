"""What decoding must remember: the last token ids, and the convolution's last inputs.

Shapes: B sequences, K kept positions, T tokens of a call, W = K + T, S streams, D width.
One small object for all layers. It knows no cache; whatever carries it calls the six verbs below.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engram_lm.memory.window import EMPTY, Window


class DecodingState:
    """The last `keep` positions of each sequence, padding left out.

    keep is the furthest look-back of addressing and convolution: max(N - 1, (kernel - 1) *
    dilation). With `recording` every position since is kept too, so that `crop` can go back.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.recording = False
        self.past: Window | None = None
        self.tails: dict[int, Tensor] = {}
        """Layer -> convolution inputs (B, W, S, D) of the positions in `past`, float32."""

    def open(self, call: Window) -> Window:
        """The window of a call (made with lookback 0), with what came before in front of it."""
        past = self.past
        if past is None:
            past = _empty(call.ids_BW, self.keep, documents=call.starts_BW is not None)
        elif past.ids_BW.shape[0] != call.ids_BW.shape[0]:
            raise ValueError(
                f"{call.ids_BW.shape[0]} sequences after {past.ids_BW.shape[0]}: "
                "the cache holds others"
            )
        return Window(
            torch.cat([past.ids_BW, call.ids_BW], dim=1),
            call.tokens,
            _cat(past.padding_BW, call.padding_BW, past.ids_BW, call.ids_BW),
            _cat(past.starts_BW, call.starts_BW, past.ids_BW, call.ids_BW),
        )

    def commit(self, window: Window, tails: dict[int, Tensor]) -> None:
        """Remembers what a finished call has seen."""
        self.past, self.tails = window, {layer: tail.detach() for layer, tail in tails.items()}
        if not self.recording:
            self._trim()

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` positions, and what was recorded before the last `keep` of the
        rest.

        RuntimeError where they were not recorded.
        """
        if self.past is None:
            return
        width = self.past.ids_BW.shape[1]
        if tokens > width - self.keep:
            raise RuntimeError(
                f"crop of {tokens} tokens: {width - self.keep} are recorded; call "
                "activate_past_recording() on the cache before the tokens that may be taken back"
            )
        self._map(lambda values: values[:, : width - tokens])
        self._trim()

    def select(self, sequences: Tensor) -> None:
        """Keeps these sequences, in this order, repeats allowed."""
        self._map(lambda values: values.index_select(0, sequences.to(values.device)))

    def repeat(self, times: int) -> None:
        """Each sequence `times` times, side by side."""
        self._map(lambda values: values.repeat_interleave(times, dim=0))

    def reset(self) -> None:
        """As if nothing had been seen."""
        self.past, self.tails = None, {}

    def _trim(self) -> None:
        past = self.past
        assert past is not None
        self.tails = {
            layer: past.pack(tail)[:, -self.keep :].contiguous()
            for layer, tail in self.tails.items()
        }
        # Padding that is still there stands before the text, where EMPTY says the same.
        starts_BW = past.packed_starts_BW
        self.past = Window(
            past.packed_ids_BW[:, -self.keep :].contiguous(),
            self.keep,
            None,
            None if starts_BW is None else starts_BW[:, -self.keep :].contiguous(),
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.past is None:
            return
        past = self.past
        ids_BW = change(past.ids_BW)
        self.past = Window(
            ids_BW,
            ids_BW.shape[1],
            None if past.padding_BW is None else change(past.padding_BW),
            None if past.starts_BW is None else change(past.starts_BW),
        )
        self.tails = {layer: change(tail) for layer, tail in self.tails.items()}


def _empty(ids: Tensor, keep: int, *, documents: bool) -> Window:
    ids_BW = ids.new_full((ids.shape[0], keep), EMPTY)
    starts_BW = torch.zeros_like(ids_BW, dtype=torch.bool) if documents else None
    return Window(ids_BW, keep, None, starts_BW)


def _cat(a: Tensor | None, b: Tensor | None, like_a: Tensor, like_b: Tensor) -> Tensor | None:
    if a is None and b is None:
        return None
    a = torch.zeros_like(like_a, dtype=torch.bool) if a is None else a
    b = torch.zeros_like(like_b, dtype=torch.bool) if b is None else b
    return torch.cat([a, b], dim=1)
