"""Backward passes written by hand, against autograd's own and against finite differences."""

import pytest
import torch

from engram_lm.memory.fuse import mean_square
from engram_lm.memory.taps import Taps

TAPS, DILATION = 4, 3
SHAPES = {
    "history as long as the taps reach": (9, 40),
    "shorter history": (4, 23),
    "no history": (0, 17),
    "fewer tokens than the taps reach": (0, 5),
    "one token": (9, 1),
}


def documents(batch: int, positions: int) -> torch.Tensor:
    return (torch.rand(batch, positions) < 0.2).cumsum(dim=1)


def gradients(output, inputs) -> tuple:
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


@pytest.mark.parametrize(("history", "tokens"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed documents"])
def test_taps_have_autograds_gradients_bit_for_bit(history, tokens, packed):
    taps = Taps(TAPS, DILATION, tokens, documents(3, history + tokens) if packed else None)
    values = torch.randn(3, history + tokens, 2, 32, requires_grad=True)
    weight = torch.randn(TAPS, 2, 32, requires_grad=True)
    ours, plain = taps(values, weight), taps.sum(values, weight)
    assert torch.equal(ours, plain)
    for mine, theirs in zip(
        gradients(ours, (values, weight)), gradients(plain, (values, weight)), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("history", "tokens"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed documents"])
def test_gradients_of_taps_are_those_of_finite_differences(history, tokens, packed):
    taps = Taps(TAPS, DILATION, tokens, documents(2, history + tokens) if packed else None)
    values = torch.randn(2, history + tokens, 1, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(TAPS, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(taps, (values, weight))


def test_taps_without_weights_to_train_pass_the_gradient_on():
    values = torch.randn(2, 20, 1, 4, requires_grad=True)
    weight = torch.randn(TAPS, 1, 4)
    taps = Taps(TAPS, DILATION, 20, None)
    (ours,), (plain,) = (
        gradients(function(values, weight), (values,)) for function in (taps, taps.sum)
    )
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("width", [1, 96, 128])
def test_mean_square_has_autograds_gradient_bit_for_bit(width):
    values = torch.randn(3, 7, 2, width, requires_grad=True)
    ours, plain = mean_square(values), values.square().mean(-1)
    assert torch.equal(ours, plain)
    assert torch.equal(*(gradients(output, (values,))[0] for output in (ours, plain)))


def test_the_gradient_of_mean_square_is_that_of_finite_differences():
    values = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mean_square, (values,))
