"""CKA against the definition summed by hand, against pytorch-cka, and where the answer is known."""

import pytest
import torch
from cka.hsic import hsic

from engram_lm.analysis.cka import CKA, alignment_index, centred
from engram_lm.errors import DataError

N, D = 24, 7
# Sums of some hundred float64 products, in another order.
TOLERANCE = 1e-10


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cka(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    found = CKA()
    found.add(first, second)
    return found.value()


def by_hand(first: torch.Tensor, second: torch.Tensor) -> float:
    """HSIC_1 of two Gram matrices, term by term."""
    n = len(first)
    k = [[0.0 if i == j else float(first[i] @ first[j]) for j in range(n)] for i in range(n)]
    m = [[0.0 if i == j else float(second[i] @ second[j]) for j in range(n)] for i in range(n)]
    trace = sum(k[i][j] * m[j][i] for i in range(n) for j in range(n))
    sums = sum(map(sum, k)) * sum(map(sum, m)) / ((n - 1) * (n - 2))
    rows = sum(sum(k[i][j] for i in range(n)) * sum(m[j]) for j in range(n))
    return (trace + sums - 2 / (n - 2) * rows) / (n * (n - 3))


def test_hsic_is_the_unbiased_estimator_term_by_term():
    first, second = drawn(1, N, D), drawn(1, N, D + 2, seed=1) + 3
    found = CKA()
    found.add(first, second)
    across, within, other = found.hsic[0]
    assert across.item() == pytest.approx(by_hand(first[0], second[0]), abs=TOLERANCE)
    assert within.item() == pytest.approx(by_hand(first[0], first[0]), abs=TOLERANCE)
    assert other.item() == pytest.approx(by_hand(second[0], second[0]), rel=TOLERANCE)


def test_values_are_those_of_pytorch_cka():
    first, second = drawn(5, N, D), drawn(3, N, D, seed=1)
    second[1] = first[2] + 0.3 * second[1]
    found = CKA()
    theirs = []
    for half in (slice(0, N // 2), slice(N // 2, N)):
        found.add(first[:, half], second[:, half])
        theirs.append(hsic(*(each[:, half] @ each[:, half].mT for each in (first, second))))
    across, within, other = (torch.stack(part).mean(0) for part in zip(*theirs, strict=True))
    wanted = across / (within[:, None] * other).sqrt()
    assert (found.value() - wanted).abs().max() < TOLERANCE


def test_a_rotated_scaled_and_shifted_copy_is_the_same_and_an_independent_one_is_not():
    first = drawn(1, N, D)
    rotation = torch.linalg.qr(drawn(D, D, seed=2)).Q
    assert cka(first, 4 * first @ rotation - 5).item() == pytest.approx(1, abs=TOLERANCE)
    stretched = first * torch.tensor([9.0, 1, 1, 1, 1, 1, 1])
    assert cka(first, stretched).item() < 0.9
    many = [cka(drawn(1, N, D, seed=s), drawn(1, N, D, seed=s + 1000)).item() for s in range(200)]
    mean = torch.tensor(many)
    # Unbiased: 0 within 3 standard errors, though single values are well off it.
    assert abs(mean.mean()) < 3 * mean.std() / 200**0.5 and mean.min() < -0.02


def test_minibatches_give_what_the_whole_gives():
    first = drawn(1, 4000, D)
    second = first + 1.5 * drawn(1, 4000, D, seed=3)
    parts = CKA()
    for begin in range(0, 4000, 8):
        parts.add(first[:, begin : begin + 8], second[:, begin : begin + 8])
    assert parts.value().item() == pytest.approx(cka(first, second).item(), abs=0.02)


def test_means_are_taken_before_the_ratio():
    first, other = drawn(1, N, D), drawn(1, N, D, seed=4)
    parts = CKA()
    parts.add(3 * first, 3 * first)  # 81 times the HSIC of the next batch
    parts.add(first, other)
    across = by_hand(first[0], other[0])
    within, within_other = by_hand(first[0], first[0]), by_hand(other[0], other[0])
    norm = ((81 * within + within) * (81 * within + within_other)) ** 0.5
    assert parts.value().item() == pytest.approx((81 * within + across) / norm, rel=TOLERANCE)
    assert parts.value().item() > 0.9  # the mean of the two ratios is near 0.5


def test_float32_inputs_are_summed_in_float64():
    values = drawn(2, N, D) + 1e3
    assert centred(values.float()).dtype == torch.float64
    assert cka(values.float(), values.float()).diagonal() == pytest.approx([1, 1])


def test_the_alignment_index_is_the_weighted_place_of_the_likest_layers():
    matrix = torch.tensor([[0.1, 0.5], [0.2, 0.9], [0.8, 0.3], [0.9, 0.1]], dtype=torch.float64)
    found = alignment_index(matrix, neighbours=2)
    assert found.tolist() == pytest.approx([(0.8 * 2 + 0.9 * 3) / 1.7, (0.5 * 0 + 0.9 * 1) / 1.4])
    deep = torch.eye(30, dtype=torch.float64)
    deep += 1e-3 * drawn(30, 30).abs()
    assert alignment_index(deep).sub(torch.arange(30)).abs().max() < 1


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DataError, match="3 and 3 inputs: CKA compares the same 4 or more"):
        CKA().add(drawn(1, 3, D), drawn(1, 3, D))
    with pytest.raises(DataError, match="8 and 9 inputs"):
        CKA().add(drawn(1, 8, D), drawn(1, 9, D))
    with pytest.raises(DataError, match="no batches"):
        CKA().value()
    with pytest.raises(DataError, match="neighbours=5: 1 to 4"):
        alignment_index(drawn(4, 4))
