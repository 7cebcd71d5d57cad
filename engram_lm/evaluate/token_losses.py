"""The loss of every single token of a long stream, for whatever is to be averaged over later.

Shapes: T token ids in the stream, B windows, C positions in a window, V ids in the vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engram_lm.errors import DataError
from engram_lm.evaluate.inference import inference
from engram_lm.model.positions import packed_positions


def token_losses(
    model: Any,
    ids_T: npt.NDArray[np.integer],
    *,
    context: int,
    batch: int,
    starts_T: npt.NDArray[np.bool_] | None = None,
    autocast: torch.dtype | None = None,
    share: Callable[[int], range] | None = None,
    progress: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Losses in nats, (T - 1,): entry t is that of predicting token t + 1, token t read last.

    The stream is cut into windows of `context` inputs, so every token but the first is predicted
    exactly once. Windows share nothing: a token near the start of one has a short context, and the
    first n-grams there begin with padding. A longer context gives a lower mean, so compare only
    losses of one `context`. Logits are made for `batch` windows at once: 4 * batch * context * V
    bytes. `starts_T`: True where a document starts, whose tokens then see nothing of the one
    before: not in attention, nor in memory whose boundary_rule is "document". `autocast`: None for
    the weights' own precision. `share`: for one of several workers, which of this many windows are
    its own; the entries of others are 0, and all call the model equally often. `progress`: called
    with tokens so far. To judge the backbone alone, call inside `analysis.ablation.memory_off`.
    DataError for fewer than 2 ids, and for windows or batches of nothing.
    """
    if len(ids_T) < 2 or context < 1 or batch < 1:
        raise DataError(
            f"{len(ids_T)} ids, context={context}, batch={batch}: 2 ids and 1 of each are needed"
        )
    losses_T = np.zeros(len(ids_T) - 1, dtype=np.float32)
    with inference(model):
        for first, last, positions in _batches(len(losses_T), context, batch):
            window = torch.from_numpy(ids_T[first : last + 1].astype(np.int64)).to(model.device)
            inputs_BC, targets_BC = window[:-1].view(-1, positions), window[1:].view(-1, positions)
            own = range(len(inputs_BC)) if share is None else share(len(inputs_BC))
            # Who has none reads one all the same: workers that share tables wait for one another.
            read = slice(own.start, own.stop) if own else slice(0, 1)
            positions_BC = None
            if starts_T is not None:
                starts_BC = starts_T[first:last].reshape(-1, positions)[read]
                positions_BC = torch.from_numpy(packed_positions(starts_BC)).to(model.device)
            with torch.autocast(model.device.type, autocast) if autocast else nullcontext():
                logits_BCV = model(
                    input_ids=inputs_BC[read], position_ids=positions_BC, use_cache=False
                ).logits
            # A window at a time: in float32, and once more inside, the logits of all would be
            # larger than everything that a training step keeps.
            losses = torch.cat(
                [
                    F.cross_entropy(logits_CV.float(), targets_C, reduction="none")
                    for logits_CV, targets_C in zip(logits_BCV, targets_BC[read], strict=True)
                ]
            )
            if own:
                begin, end = first + own.start * positions, first + own.stop * positions
                losses_T[begin:end] = losses.cpu().numpy()
            if progress is not None:
                progress(last)
    return losses_T


def _batches(tokens: int, context: int, batch: int) -> list[tuple[int, int, int]]:
    # (first, last, positions in each window); what fills no whole window comes last, on its own.
    whole = tokens // context * context
    step = batch * context
    batches = [(first, min(first + step, whole), context) for first in range(0, whole, step)]
    if whole < tokens:
        batches.append((whole, tokens, tokens - whole))
    return batches
