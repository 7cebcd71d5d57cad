"""Losses of models on one text, by how often the suffix n-gram stood in a corpus.

Shapes: S checkpoints, O orders, T tokens.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from engram_lm.analysis.bands import BandLoss, loss_by_band
from engram_lm.analysis.findings import BandFindings, Losses

Nats = npt.NDArray[np.float64]
Bands = npt.NDArray[np.int8]


def band_findings(
    losses: Mapping[str, Nats],
    orders: list[int],
    bands_SOT: Bands,
    *,
    text_bytes: int,
    context: int,
) -> BandFindings:
    """losses: name -> (S, T), as many checkpoints of each; the first is compared with the second,
    token by token and checkpoint by checkpoint. bands_SOT: in what each checkpoint was trained on.
    """
    names = list(losses)
    other = names[1] if len(names) > 1 else None
    difference_ST = None if other is None else losses[names[0]] - losses[other]

    def by_order(values_ST: Nats) -> list[list[BandLoss]]:
        return [seeds_by_band(values_ST, bands_SOT[:, at]) for at in range(len(orders))]

    return BandFindings(
        orders=orders,
        losses={
            name: Losses(
                loss=float(losses_ST.mean()),
                bpb=float(losses_ST.mean(0).sum()) / math.log(2) / text_bytes,
                by_checkpoint=losses_ST.mean(1).tolist(),
                bands=by_order(losses_ST),
            )
            for name, losses_ST in losses.items()
        },
        difference=None if other is None else f"{names[0]} \N{MINUS SIGN} {other}",
        difference_mean=None if difference_ST is None else float(difference_ST.mean()),
        difference_error=None if difference_ST is None else error(difference_ST, context),
        difference_bands=[] if difference_ST is None else by_order(difference_ST),
    )


def error(difference_ST: Nats, context: int) -> float:
    """Standard error of the mean: over checkpoints, or with one over windows of `context` tokens,
    for the tokens of a window are alike and windows hardly."""
    means = difference_ST.mean(1)
    if len(means) == 1:
        means = difference_ST.reshape(-1, context).mean(1)
    return float(means.std(ddof=1)) / math.sqrt(len(means))


def seeds_by_band(losses_ST: Nats, bands_ST: Bands) -> list[BandLoss]:
    """Means over tokens and checkpoints; the error is over tokens with one checkpoint, as if they
    were independent, and over checkpoints with several, where each has a token. tokens: of the
    first."""
    by_seed = [loss_by_band(*each) for each in zip(losses_ST, bands_ST, strict=True)]
    if len(by_seed) == 1:
        return by_seed[0]
    rows = []
    for together in zip(*by_seed, strict=True):
        means = [mean for row in together if (mean := row["mean"]) is not None]
        rows.append(
            BandLoss(
                band=together[0]["band"],
                tokens=together[0]["tokens"],
                mean=float(np.mean(means)) if means else None,
                standard_error=float(np.std(means, ddof=1)) / math.sqrt(len(means))
                if len(means) == len(by_seed)
                else None,
            )
        )
    return rows
