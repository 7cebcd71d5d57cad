"""Watches a model and tells which rows its memory really reads, call by call."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from engram_lm.memory.lookup import Memory


class Calls:
    """Forward passes of one model: where each began, and its row numbers (L, B, T, H)."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.rows: list[torch.Tensor] = []

    def of_the_text(self) -> torch.Tensor:
        """Row numbers of every position, as the last call that came by left them."""
        text = self.rows[0][:, :, :0]
        for start, rows in zip(self.starts, self.rows, strict=True):
            text = torch.cat([text[:, :, :start], rows], dim=2)
        return text

    @property
    def taken_back(self) -> int:
        """Positions that were read and then left again (rejected drafts)."""
        ends = [s + r.shape[2] for s, r in zip(self.starts, self.rows, strict=True)]
        return sum(max(0, end - s) for end, s in zip(ends, self.starts[1:], strict=False))


@contextmanager
def rows_read(model) -> Iterator[Calls]:
    """Inside, every forward pass of this model is written down; other models' are not."""
    calls, start_window = Calls(), Memory.start_window

    def before(module, positional, given) -> None:
        cache = given.get("past_key_values")
        calls.starts.append(0 if cache is None else int(cache.get_seq_length()))

    def watched(memory, window):
        pending = start_window(memory, window)
        if memory.addresses is model.model.addresses:
            calls.rows.append(pending.rows_LBTH)
        return pending

    hook = model.model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with mock.patch.object(Memory, "start_window", watched):
            yield calls
    finally:
        hook.remove()
