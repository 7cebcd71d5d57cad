"""What decoding must remember: the last token ids, and the convolution's last inputs.

Shapes: B sequences, K kept positions, T tokens of a call, W = K + T, S streams, D width.
One small object for all layers. It knows no cache; whatever carries it calls the six verbs below.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engram_lm.errors import MismatchError
from engram_lm.memory.window import EMPTY, Window


class DecodingState:
    """The last `keep` positions of each sequence, padding left out.

    keep is the furthest look-back of addressing and convolution: max(N - 1, (kernel - 1) *
    dilation). With `recording` every position since is kept too, so that `crop` can go back.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.recording = False
        self.lost = False
        """A crop was refused after the attention layers before us had done it."""
        self.past: Window | None = None
        self.tails: dict[int, Tensor] = {}
        """Layer -> convolution inputs (B, W, S, D) of the positions in `past`, float32."""

    def open(self, call: Window) -> Window:
        """The window of a call (made with lookback 0), with what came before in front of it."""
        if self.lost:
            raise RuntimeError(
                "the cache was cropped without a record: reset it or start a new one"
            )
        past = self.past
        if past is None:
            past = _empty(call.ids_BW, self.keep, documents=call.starts_BW is not None)
        elif past.ids_BW.shape[0] != call.ids_BW.shape[0]:
            raise MismatchError(
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
        tails = {layer: tail.detach() for layer, tail in tails.items()}
        if self.recording:
            self.past, self.tails = window, tails
        else:
            self._keep(window, tails)

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` positions, and what was recorded before the last `keep` of the
        rest.

        RuntimeError where they were not recorded.
        """
        if self.past is None:
            return
        width = self.past.ids_BW.shape[1]
        if tokens > width - self.keep:
            self.lost = True
            raise RuntimeError(
                f"crop of {tokens} tokens: {width - self.keep} are recorded; call "
                "activate_past_recording() on the cache before the tokens that may be taken back"
            )
        self._map(lambda values: values[:, : width - tokens])
        self._keep(self.past, self.tails)

    def select(self, sequences: Tensor) -> None:
        """Keeps these sequences, in this order, repeats allowed."""
        self._map(lambda values: values[sequences.to(values.device)])

    def repeat(self, times: int) -> None:
        """Each sequence `times` times, side by side."""
        self._map(lambda values: values.repeat_interleave(times, dim=0))

    def reset(self) -> None:
        """As if nothing had been seen."""
        self.past, self.tails, self.lost = None, {}, False

    def _keep(self, window: Window, tails: dict[int, Tensor]) -> None:
        """Remembers the last `keep` positions, where the ones before them stood if they fit."""
        past = self.past
        self.tails = {
            layer: _put(self.tails.get(layer), window.pack(tail)[:, -self.keep :])
            for layer, tail in tails.items()
        }
        # Padding that is still there stands before the text, where EMPTY says the same.
        ids_BK, starts_BW = window.packed_ids_BW[:, -self.keep :], window.packed_starts_BW
        starts_BK = None
        if starts_BW is not None:
            starts_BK = _put(None if past is None else past.starts_BW, starts_BW[:, -self.keep :])
        ids_BK = _put(None if past is None else past.ids_BW, ids_BK)
        self.past = Window(ids_BK, self.keep, None, starts_BK)

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


def _put(old: Tensor | None, new: Tensor) -> Tensor:
    # In place, because a CUDA graph looks for its state where it found it the first time.
    compiling = torch.compiler.is_compiling()
    if old is not None and old.shape == new.shape:
        # Outside of inference mode, a tensor made in it may not be written to.
        writable = compiling or torch.is_inference_mode_enabled() or not old.is_inference()
        if writable:
            return old.copy_(new)
    new = new.clone(memory_format=torch.contiguous_format)
    if not compiling:
        torch._dynamo.mark_static_address(new)
    return new


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
