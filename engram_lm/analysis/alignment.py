"""Two models layer by layer: which are alike, beside two seeds of one of them (the null).

Shapes: A layers of the first, B of the second, I inputs, D width.
"""

from collections.abc import Callable, Sequence
from itertools import permutations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram_lm.analysis.cka import CKA, NEIGHBOURS, alignment_index
from engram_lm.analysis.findings import AlignmentFindings
from engram_lm.analysis.gates import batched
from engram_lm.analysis.material import Integers, Material
from engram_lm.analysis.residual import watched
from engram_lm.errors import DataError
from engram_lm.evaluate.inference import inference

BATCH = 64
INPUTS = 1_024
"""At most so many hidden states of each layer."""


def places(material: Material) -> tuple[Integers, str]:
    """(I, 2): window and position of the inputs, and where they are: at the ends of names as the
    paper has it, or evenly spread where the text has too few. DataError for fewer than BATCH
    of these."""
    windows, context = len(material.windows_NT), material.context
    names = np.flatnonzero(material.names_T[: windows * context])
    if len(names) >= 4 * BATCH:
        chosen, where = names, "last tokens of names"
    else:
        chosen, where = np.arange(context // 8, windows * context, 8), "every 8th token"
    kept = chosen[: min(INPUTS, len(chosen)) // BATCH * BATCH]
    if not len(kept):
        raise DataError(
            f"{material.text}: {len(chosen)} places; CKA needs {BATCH} hidden states or more"
        )
    return np.stack([kept // context, kept % context], axis=1), where


def states(
    model: Any,
    windows_NT: Integers,
    places_I2: Integers,
    *,
    positions_NT: Integers | None = None,
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """(layers, I, D): after each block, streams merged as the model merges them before its head.
    DataError where they are not finite numbers."""
    found: list[Tensor] = []
    order: list[npt.NDArray[np.int64]] = []
    with inference(model), watched(model) as residual:
        for first in range(0, len(windows_NT), batch):
            inside = (places_I2[:, 0] >= first) & (places_I2[:, 0] < first + batch)
            if inside.any():
                part = slice(first, first + batch)
                asked = batched(windows_NT[:, :-1], positions_NT, part, model.device)
                model(**asked, use_cache=False, logits_to_keep=1)
                window_I, position_I = torch.from_numpy(places_I2[inside] - [first, 0]).T
                found.append(
                    torch.stack(
                        [
                            residual.read(block, norm=False)[window_I, position_I].float().cpu()
                            for block in residual.blocks.values()
                        ]
                    )
                )
                order.append(np.flatnonzero(inside))
            if progress is not None:
                progress(min(first + batch, len(windows_NT)))
    back = np.argsort(np.concatenate(order))
    states_AID = torch.cat(found, dim=1)[:, torch.from_numpy(back)]
    if not torch.isfinite(states_AID).all():
        raise DataError("hidden states: some are not finite numbers")
    return states_AID


def compared(first_AID: Tensor, second_BID: Tensor) -> Tensor:
    """(A, B): CKA of batches of BATCH inputs."""
    cka = CKA()
    for begin in range(0, first_AID.shape[1], BATCH):
        batch = slice(begin, begin + BATCH)
        cka.add(first_AID[:, batch], second_BID[:, batch])
    return cka.value()


def align(
    first: str,
    first_states: Sequence[Tensor],
    second: str,
    second_states: Sequence[Tensor],
    where: str,
) -> AlignmentFindings:
    """All pairs of a checkpoint of the first with one of the second; the null: all ordered pairs of
    two of the first. An index depends on which checkpoint's layers it counts in, so each is read
    against the null in that same one. States: one tensor of `states` for each checkpoint, of the
    same places."""
    across = [compared(one, other) for one, other in product(first_states, second_states)]
    null = [compared(one, other) for one, other in permutations(first_states, 2)]
    neighbours = min(NEIGHBOURS, len(first_states[0]))
    mean_AB = torch.stack(across).mean(0)
    null_AA = torch.stack(null).mean(0) if null else None
    index = [alignment_index(each, neighbours) for each in across]
    null_index = [alignment_index(each, neighbours) for each in null]
    above: list[list[float]] = []
    if null and len(first_states[0]) == len(second_states[0]):
        own_RB, null_RB = (
            torch.stack(each).unflatten(0, (len(first_states), -1)).mean(1)
            for each in (index, null_index)
        )
        above = (own_RB - null_RB).tolist()
    return AlignmentFindings(
        first=first,
        second=second,
        inputs=first_states[0].shape[1],
        batch=BATCH,
        where=where,
        neighbours=neighbours,
        across=mean_AB.tolist(),
        index=[each.tolist() for each in index],
        likest=mean_AB.argmax(0).tolist(),
        null=None if null_AA is None else null_AA.tolist(),
        null_index=[each.tolist() for each in null_index],
        above=above,
        null_likest=[] if null_AA is None else null_AA.argmax(0).tolist(),
    )
