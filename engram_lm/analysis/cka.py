"""How alike two models' layers are: linear CKA of minibatches, and which layer each is most like.

Shapes: A layers of one model, B of another, N texts (or entities) of a batch, D width (of any one
model; layers of a model have the same).
Section 6.1 of arXiv 2601.07372. HSIC is the unbiased estimator (Song et al. 2012; Nguyen et al.
2021), so CKA may come out below 0 or above 1: nothing is clipped.
"""

import torch
from torch import Tensor

from engram_lm.errors import DataError

NEIGHBOURS = 5
"""Layers over which the paper takes the soft alignment index."""


class CKA:
    """Takes the same N inputs as two models see them, batch after batch.

    HSICs are averaged over batches before their ratio is taken: a mean of ratios would be biased.
    """

    def __init__(self) -> None:
        self.hsic: list[tuple[Tensor, Tensor, Tensor]] = []
        """Of each batch: (A, B) across, (A,) and (B,) within, float64."""

    def add(self, hidden_AND: Tensor, hidden_BND: Tensor) -> None:
        """DataError for batches of fewer than 4 inputs, or of two sizes."""
        inputs, others = hidden_AND.shape[1], hidden_BND.shape[1]
        if inputs != others or inputs < 4:
            raise DataError(f"{inputs} and {others} inputs: CKA compares the same 4 or more")
        first, second = centred(hidden_AND), centred(hidden_BND)
        size = inputs * (inputs - 3)
        self.hsic.append(
            (
                first @ second.T / size,
                first.square().sum(1) / size,
                second.square().sum(1) / size,
            )
        )

    def value(self) -> Tensor:
        """(A, B), float64. DataError before the first batch."""
        if not self.hsic:
            raise DataError("no batches: there is nothing to compare")
        parts = zip(*self.hsic, strict=True)
        across_AB, first_A, second_B = (torch.stack(part).mean(0) for part in parts)
        return across_AB / (first_A[:, None] * second_B).sqrt()


def centred(hidden_AND: Tensor) -> Tensor:
    """Each layer's Gram matrix, U-centred (Szekely and Rizzo 2014), flat: (A, N * N), float64.

    Inner products of two of these, over N (N - 3), are the unbiased HSIC.
    """
    inputs = hidden_AND.shape[1]
    hidden_AND = hidden_AND.double()
    gram_ANN = hidden_AND @ hidden_AND.mT
    gram_ANN.diagonal(dim1=1, dim2=2).zero_()
    sum_AN = gram_ANN.sum(2)
    gram_ANN = (
        gram_ANN
        - (sum_AN[:, :, None] + sum_AN[:, None, :]) / (inputs - 2)
        + sum_AN.sum(1)[:, None, None] / ((inputs - 1) * (inputs - 2))
    )
    gram_ANN.diagonal(dim1=1, dim2=2).zero_()
    return gram_ANN.flatten(1)


def alignment_index(cka_AB: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Soft alignment index (equation 9): for each layer of the second model the mean place of the
    layers of the first that it is most like, weighted by CKA. (B,), counted from zero.

    With 5 of 30 layers it lies between 2 and 27 by construction: read it against that of two seeds
    of one model, never alone. DataError for no neighbours, or more than there are layers.
    """
    if not 1 <= neighbours <= len(cka_AB):
        raise DataError(f"neighbours={neighbours}: 1 to {len(cka_AB)}, the layers there are")
    likest = cka_AB.topk(neighbours, dim=0)
    return (likest.values * likest.indices).sum(0) / likest.values.sum(0)
