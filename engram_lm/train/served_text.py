"""The rows of requests that are texts of a stream: stretches of it, drawn from all over it."""

from collections.abc import Sequence

import numpy as np

from engram_lm.errors import DataError
from engram_lm.memory.ngrams import Addresses
from engram_lm.simulate.row_trace import RowTrace
from engram_lm.train.stream import Stream


def warm_lengths(tokens: int, longest: int) -> list[int]:
    """So many tokens as texts of at most `longest`."""
    whole, rest = divmod(tokens, longest)
    return [longest] * whole + ([rest] if rest else [])


def served_trace(
    stream: Stream, addresses: Addresses, lengths: Sequence[int], *, seed: int = 0
) -> RowTrace:
    """Texts of these lengths behind one another, no token of the stream in two of them.

    Each begins where one of equally long windows does, taken in a random order. DataError where
    the stream has fewer windows.
    """
    window = max(lengths)
    windows = len(stream) // window
    if windows < len(lengths):
        raise DataError(
            f"{len(stream)} tokens: {len(lengths)} texts of up to {window} are needed; "
            "serve fewer or shorter ones"
        )
    order = np.random.default_rng(seed).permutation(windows)[: len(lengths)]
    parts = [
        stream.read(int(index) * window, int(index) * window + length)
        for index, length in zip(order, lengths, strict=True)
    ]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return RowTrace.of_text(addresses, np.concatenate(parts), starts.tolist())
