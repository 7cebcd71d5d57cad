"""The frequency profile of a stream: worker batches drawn from it are really addressed."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import track
from torch import Tensor

from engram_lm.errors import DataError
from engram_lm.memory.ngrams import Addresses
from engram_lm.model.documents import document_starts
from engram_lm.model.row_profile import MeasuredProfile, measure
from engram_lm.train.batches import Batches
from engram_lm.train.stream import Stream


def sampled_profile(
    stream: Stream,
    addresses: Addresses,
    *,
    context: int,
    sequences: Iterable[int],
    batches: int,
    seed: int = 0,
) -> MeasuredProfile:
    """Distinct rows in batches of so many sequences of `context` tokens, as training draws them.

    Each size is measured on the first `batches` batches of a pass, or on fewer where the stream
    has no more. DataError for a size that is longer than the stream.
    """
    console = Console(stderr=True)
    points = {}
    for size in track(
        sorted(set(sequences)), "counting rows", console=console, disable=not console.is_terminal
    ):
        source = Batches(stream, batch=size, context=context, seed=seed)
        most = source.windows // size
        if not most:
            raise DataError(
                f"{len(stream)} tokens: fewer than the {size} sequences of {context} of one batch"
            )
        points[size * context] = measure(addresses, _batches(source, min(batches, most)))
    return MeasuredProfile(addresses.specification, points)


def _batches(source: Batches, batches: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for step in range(batches):
        batch = source[step]
        positions_BT = batch.positions_BT
        starts_BT = (
            None if positions_BT is None else document_starts(positions_BT, None, None, None)
        )
        yield batch.inputs_BT, starts_BT
