"""Losses of models on one text, by how often the suffix n-gram stood in a corpus.

Shapes: S checkpoints, T tokens.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from engram_lm.analysis.bands import BandLoss, loss_by_band
from engram_lm.analysis.findings import BandFindings, Losses

Nats = npt.NDArray[np.float64]


def band_findings(
    losses: Mapping[str, Nats],
    orders: list[int],
    bands: Sequence[npt.NDArray[np.int8]],
    *,
    text_bytes: int,
    context: int,
) -> BandFindings:
    """losses: name -> (S, T); the first is compared with the second, token by token. bands: one
    (T,) an order."""
    names = list(losses)
    other = names[1] if len(names) > 1 else None
    difference_ST = None if other is None else paired(losses[names[0]], losses[other])
    return BandFindings(
        orders=orders,
        losses={
            name: Losses(
                loss=float(losses_ST.mean()),
                bpb=float(losses_ST.mean(0).sum()) / math.log(2) / text_bytes,
                by_checkpoint=losses_ST.mean(1).tolist(),
                bands=[seeds_by_band(losses_ST, bands_T) for bands_T in bands],
            )
            for name, losses_ST in losses.items()
        },
        difference=None if other is None else f"{names[0]} \N{MINUS SIGN} {other}",
        difference_mean=None if difference_ST is None else float(difference_ST.mean()),
        difference_error=None if difference_ST is None else error(difference_ST, context),
        difference_bands=[]
        if difference_ST is None
        else [seeds_by_band(difference_ST, bands_T) for bands_T in bands],
    )


def paired(first_ST: Nats, second_ST: Nats) -> Nats:
    """Differences token by token: of the checkpoints one by one where both have as many, or else of
    the means over checkpoints, (1, T)."""
    if len(first_ST) == len(second_ST):
        return first_ST - second_ST
    return (first_ST.mean(0) - second_ST.mean(0))[None]


def error(difference_ST: Nats, context: int) -> float:
    """Standard error of the mean: over checkpoints, or with one over windows of `context` tokens,
    for the tokens of a window are alike and windows hardly."""
    means = difference_ST.mean(1)
    if len(means) == 1:
        means = difference_ST.reshape(-1, context).mean(1)
    return float(means.std(ddof=1)) / math.sqrt(len(means))


def seeds_by_band(losses_ST: Nats, bands_T: npt.NDArray[np.int8]) -> list[BandLoss]:
    """Means over tokens and checkpoints; the error is over tokens with one checkpoint, as if they
    were independent, and over checkpoints with several."""
    rows = loss_by_band(losses_ST.mean(0), bands_T)
    if len(losses_ST) == 1:
        return rows
    by_seed = [loss_by_band(losses_T, bands_T) for losses_T in losses_ST]
    for index, row in enumerate(rows):
        means = [mean for seed in by_seed if (mean := seed[index]["mean"]) is not None]
        if means:
            row["standard_error"] = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    return rows
