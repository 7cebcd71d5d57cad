"""Logit lenses of several checkpoints as means with intervals over texts and checkpoints.

Shapes: S checkpoints, K places, N texts.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engram_lm.analysis.bootstrap import interval_over_seeds
from engram_lm.analysis.findings import Estimate, LensDifference, LensFindings
from engram_lm.analysis.logit_lens import MEASURES, LogitLens


def lens_findings(lenses: Sequence[LogitLens]) -> LensFindings:
    """Of one lens a checkpoint, on the same texts."""
    texts = lenses[0].normed[MEASURES[0]].shape[1]
    places = lenses[0].places
    return LensFindings(
        checkpoints=len(lenses),
        texts=texts,
        layers=[place.layer for place in places],
        at=[place.at for place in places],
        normed={
            name: estimates(np.stack([lens.normed[name] for lens in lenses])) for name in MEASURES
        },
        plain={
            name: estimates(np.stack([lens.plain[name] for lens in lenses])) for name in MEASURES
        },
    )


def lens_difference(
    name: str, own: Sequence[LogitLens], other: Sequence[LogitLens]
) -> LensDifference | None:
    """Own minus other after each block; as many checkpoints of both, in the same order."""
    gaps: dict[str, list[Estimate]] = {}
    for measure in MEASURES:
        pairs = [
            (one.of_blocks(measure), two.of_blocks(measure))
            for one, two in zip(own, other, strict=True)
        ]
        if any(len(one) != len(two) for one, two in pairs):
            return None
        gaps[measure] = estimates(np.stack([one - two for one, two in pairs]))
    return LensDifference(name=name, normed=gaps)


def estimates(values_SKN: npt.NDArray[np.float64]) -> list[Estimate]:
    """Place by place, over texts and checkpoints."""
    means_K = values_SKN.mean(axis=(0, 2))
    if values_SKN.shape[2] < 2:
        return [Estimate(mean=mean, low=None, high=None) for mean in means_K.tolist()]
    bounds = interval_over_seeds(values_SKN).tolist()
    return [
        Estimate(mean=mean, low=low, high=high)
        for mean, (low, high) in zip(means_K.tolist(), bounds, strict=True)
    ]
