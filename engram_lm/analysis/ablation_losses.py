"""What each part of a memory is worth: the loss that its absence costs, band by band.

Shapes: T token ids of a stream, N windows of it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram_lm.analysis import ablation
from engram_lm.analysis.bands import BandLoss, NgramCounts, loss_by_band, window_bands
from engram_lm.analysis.bootstrap import interval
from engram_lm.errors import DataError
from engram_lm.evaluate.token_losses import token_losses

TOKENS = 16_384
"""What a report's ablations read, at most: there is a pass for each."""
Ablation = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class AblationLoss:
    """One ablation, judged on the same tokens as the model as it is."""

    name: str
    loss: float
    """Nats per token."""
    change: float
    """Of the loss, against the model as it is."""
    low: float
    high: float
    """95 % of bootstraps over windows of the text; seeds have no share in it."""
    bands: list[list[BandLoss]]
    """Order -> band -> change: by how often the suffix n-gram stood in training."""


def ablations(
    model: Any, gates: dict[int, Tensor], updates: dict[int, Tensor], *, heads: bool
) -> dict[str, Ablation]:
    """Name -> ablation: all that ablation.py knows, for each layer and order, and for each head.

    gates, updates: layer -> (S,) and (S, D), those that are held.
    """
    specification = ablation.memory_decoder(model).memory.addresses.specification
    orders = range(2, specification.max_order + 1)
    found: dict[str, Ablation] = {"memory off": partial(ablation.memory_off, model)}
    for layer in specification.layers:
        found[f"layer {layer} off"] = partial(ablation.layer_off, model, layer)
    for order in orders:
        found[f"order {order} off"] = partial(ablation.order_off, model, order)
    for column in range(len(orders) * specification.heads if heads else 0):
        place, head = divmod(column, specification.heads)
        name = f"order {orders[place]}, head {head} off"
        found[name] = partial(ablation.heads_off, model, [column])
    found["gates at their mean"] = partial(ablation.gates_held, model, gates)
    found["updates at their mean"] = partial(ablation.updates_held, model, updates)
    found["rows permuted"] = partial(ablation.rows_permuted, model)
    found["random rows of equal norm"] = partial(ablation.rows_random, model)
    return found


def ablation_losses(
    model: Any,
    ids_T: npt.NDArray[np.integer],
    *,
    context: int,
    batch: int,
    counts: Sequence[NgramCounts] = (),
    starts_T: npt.NDArray[np.bool_] | None = None,
    heads: bool = False,
    autocast: torch.dtype | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[AblationLoss]:
    """One pass over the stream for the model as it is, and one for each ablation.

    counts: of the n-grams of what the model was trained on; without them no bands. starts_T: True
    where a document starts, that sees nothing of the one before; None where documents run on.
    heads: each head alone as well. progress: told what begins. ConfigError for a model without
    memory, DataError for a stream of fewer than two whole windows and losses that are not finite.
    """
    whole = (len(ids_T) - 1) // context * context
    if whole < 2 * context:
        raise DataError(f"{len(ids_T)} ids: two windows of context={context} are needed")
    ids_T = ids_T[: whole + 1]
    canonical = ablation.memory_decoder(model).memory.addresses.canonical
    canonical_T = canonical.ids_V.numpy()[ids_T]

    def losses(name: str, made: Ablation) -> npt.NDArray[np.float64]:
        if progress is not None:
            progress(name)
        with made():
            found = token_losses(
                model, ids_T, context=context, batch=batch, starts_T=starts_T, autocast=autocast
            )
        if not np.isfinite(found).all():
            raise DataError(f"losses, {name}: some are not finite numbers")
        return found.astype(np.float64)

    with ablation.mean_gates(model) as gates, ablation.mean_updates(model) as updates:
        plain_T = losses("as it is", nullcontext)
    by_order = [window_bands(count, canonical_T, context, starts_T) for count in counts]
    found = []
    for name, made in ablations(model, gates, updates, heads=heads).items():
        losses_T = losses(name, made)
        change_T = losses_T - plain_T
        low, high = interval(change_T.reshape(-1, context).mean(axis=1))
        found.append(
            AblationLoss(
                name=name,
                loss=float(losses_T.mean()),
                change=float(change_T.mean()),
                low=float(low),
                high=float(high),
                bands=[loss_by_band(change_T, bands_T) for bands_T in by_order],
            )
        )
    return found


def retention(score: float, full: float, chance: float = 0.0) -> float:
    """What of a score is left, above chance: (score - chance) / (full - chance). With chance 0 it
    is the paper's raw retention, which multiple choice inflates.

    DataError where the full score is not above chance: there is nothing to retain.
    """
    if full <= chance:
        raise DataError(f"full={full:g}: not above chance={chance:g}, so nothing can be retained")
    return (score - chance) / (full - chance)
