"""Row optimisers: updates against slow references, and what they leave alone."""

import copy
import math

import pytest
import torch
from test_optimizers import DIM, ROWS
from torch import nn

from engram_lm.errors import ConfigError
from engram_lm.memory.table import Table
from engram_lm.train.rounding import round_to_bf16
from engram_lm.train.row_adam import RowAdam
from engram_lm.train.row_optimizer import SQUARE
from engram_lm.train.rowwise_rmsprop import RowwiseRMSprop

OPTIMIZERS = [RowAdam, RowwiseRMSprop]
both = pytest.mark.parametrize("make", OPTIMIZERS)


def drawn(rows: int, among: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randperm(among)[:rows].sort().values, torch.randn(rows, DIM)


def stepped(optimizer, *gradients) -> None:
    (table,) = optimizer.tables
    for gradient in gradients:
        table.accumulate(*gradient)
    optimizer.step()
    optimizer.zero_grad()


def test_rowwise_rmsprop_equals_its_formula_in_float64():
    table = Table(ROWS, DIM)
    optimizer = RowwiseRMSprop([table], lr=1e-2, beta2=0.95)
    value = table.weight.detach().double().clone()
    square = torch.zeros(ROWS, dtype=torch.float64)
    for _ in range(20):
        rows, gradient = drawn(7)
        stepped(optimizer, (rows, gradient))
        for row, g in zip(rows.tolist(), gradient.double(), strict=True):
            mean = g.square().mean()
            square[row] = mean if square[row] == 0 else 0.95 * square[row] + 0.05 * mean
            value[row] -= 1e-2 * g / (square[row].sqrt() + 1e-8)
    # float32 against float64 over at most 20 steps of about 1e-2
    torch.testing.assert_close(table.weight.detach().double(), value, rtol=0, atol=1e-6)
    assert optimizer.state[table.weight][SQUARE].shape == (ROWS, 1)


def test_rowwise_rmsprops_first_step_of_a_row_is_lr_long_whenever_it_comes():
    table = Table(ROWS, DIM)
    optimizer = RowwiseRMSprop([table], lr=1e-2, beta2=0.95)
    for row in range(ROWS):
        before = table.weight[row].detach().clone()
        stepped(optimizer, (torch.tensor([row]), torch.randn(1, DIM) * 10.0 ** (row % 7 - 3)))
        # Its square's root, one quotient and one difference, rounded to 2^-24 each.
        moved = (table.weight[row].detach() - before).square().mean().sqrt()
        assert moved.item() == pytest.approx(1e-2, rel=1e-4)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untouched_rows_keep_values_and_moments(make, dtype):
    table = Table(ROWS, DIM, dtype=dtype)
    optimizer = make([table])
    stepped(optimizer, drawn(ROWS))
    before = copy.deepcopy({"weight": table.weight.detach(), **optimizer.state[table.weight]})
    rows, gradient = drawn(9)
    stepped(optimizer, (rows, gradient))
    rest = torch.ones(ROWS, dtype=torch.bool)
    rest[rows] = False
    after = {"weight": table.weight.detach(), **optimizer.state[table.weight]}
    del after["step"]
    for name, tensor in after.items():
        assert tensor.shape[0] == ROWS
        assert torch.equal(tensor[rest], before[name][rest])
        assert not torch.equal(tensor[rows], before[name][rows])


@both
def test_rows_are_moved_alike_whatever_the_size_of_blocks(make, monkeypatch):
    tables = [Table(ROWS, DIM) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    gradients = [drawn(23) for _ in range(5)]
    touched = []
    for table, size in zip(tables, (2**18, 3 * DIM), strict=True):
        monkeypatch.setattr("engram_lm.train.row_optimizer.CPU_BLOCK", size)
        optimizer = make([table])
        for gradient in gradients:
            stepped(optimizer, gradient)
        touched.append(optimizer.touched())
    assert torch.equal(tables[0].weight, tables[1].weight) and touched[0] == touched[1]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_for_bit(make, dtype):
    tables = [Table(ROWS, DIM, dtype=dtype) for _ in range(2)]
    optimizers = [make([table], seed=3) for table in tables]
    for _ in range(3):
        stepped(optimizers[0], drawn(11))
    tables[1].load_state_dict(tables[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for _ in range(3):
        gradient = drawn(11)
        for optimizer in optimizers:
            stepped(optimizer, gradient)
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert optimizers[0].touched() == optimizers[1].touched()
    for name, value in optimizers[0].state[tables[0].weight].items():
        other = optimizers[1].state[tables[1].weight][name]
        assert value.dtype == torch.float32 == other.dtype and torch.equal(value, other)


@both
def test_gradients_of_several_backward_passes_act_as_their_sum(make):
    tables = [Table(ROWS, DIM) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    optimizers = [make([table]) for table in tables]
    for _ in range(4):
        parts = [drawn(9) for _ in range(3)]
        dense = torch.zeros(ROWS, DIM)
        for rows, gradient in parts:
            dense[rows] += gradient  # the same order of summation: the same bits
        rows = torch.cat([rows for rows, _ in parts]).unique()
        stepped(optimizers[0], *parts)
        stepped(optimizers[1], (rows, dense[rows]))
    assert torch.equal(tables[0].weight, tables[1].weight)


@both
def test_touched_rows_are_counted_once_and_again_after_loading(make):
    table = Table(ROWS, DIM)
    optimizer = make([table])
    assert optimizer.touched() == [0]
    seen: set[int] = set()
    for _ in range(6):
        rows, gradient = drawn(5)
        gradient[0] = 0.0  # read, but not moved
        stepped(optimizer, (rows, gradient))
        seen |= set(rows[1:].tolist())
        assert optimizer.touched() == [len(seen)]
    other = make([Table(ROWS, DIM)])
    other.load_state_dict(optimizer.state_dict())
    assert other.touched() == [len(seen)]
    other.state[other.tables[0].weight] = copy.deepcopy(optimizer.state[table.weight])
    assert other.touched() == [len(seen)]


@both
def test_update_rms_is_that_of_the_rows_that_moved(make):
    table = Table(ROWS, DIM)
    optimizer = make([table], lr=1e-2)
    for _ in range(3):
        before = table.weight.detach().clone()
        rows, gradient = drawn(7)
        stepped(optimizer, (rows, gradient))
        moved = (table.weight.detach() - before)[rows].double().square().mean().sqrt()
        assert optimizer.update_rms() == [pytest.approx(moved.item(), rel=1e-5)]  # float32 sums
    optimizer.step()
    assert optimizer.update_rms() == [0.0]


@both
def test_materialised_state_is_that_of_before_the_first_step(make):
    tables = [Table(ROWS, DIM) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    optimizers = [make([table]) for table in tables]
    optimizers[0].materialise()
    state = optimizers[0].state[tables[0].weight]
    assert not any(tensor.any() for tensor in state.values())
    gradient = drawn(9)
    for optimizer in optimizers:
        stepped(optimizer, gradient)
    assert state.keys() == optimizers[1].state[tables[1].weight].keys()
    assert torch.equal(tables[0].weight, tables[1].weight)


@both
def test_what_cannot_be_trained_is_refused_by_name(make):
    with pytest.raises(ConfigError, match=r"torch.float16: float32 and bfloat16"):
        make([Table(ROWS, DIM, dtype=torch.float16)])
    with pytest.raises(ConfigError, match=r"lr=-1.0"):
        make([Table(ROWS, DIM)], lr=-1.0)
    with pytest.raises(ConfigError, match="beta"):
        RowAdam([Table(ROWS, DIM)], betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="beta2=1.0"):
        RowwiseRMSprop([Table(ROWS, DIM)], beta2=1.0)


def test_rounding_takes_a_neighbour_and_is_right_on_average():
    values = torch.cat([torch.randn(4, 7), torch.randn(4, 7) * 1e-3, torch.zeros(1, 7)])
    rows, repeats = torch.arange(len(values)), 4096
    down = (values.view(torch.int32) & -(2**16)).view(torch.float32)
    up = ((values.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    total = torch.zeros_like(values, dtype=torch.float64)
    for step in range(repeats):
        rounded = round_to_bf16(values, rows, (0, 0, step)).float()
        assert ((rounded == down) | (rounded == up)).all()
        total += rounded
    # A mean of `repeats` draws between two neighbours; six standard deviations for all 63 values.
    bound = 6 * 0.5 / math.sqrt(repeats) * (up - down).abs().double()
    assert ((total / repeats - values).abs() <= bound).all()
    assert torch.equal(round_to_bf16(down, rows, (1, 2, 3)).float(), down)  # exact values stay


def test_rounding_is_a_function_of_row_step_table_and_seed():
    values, rows = torch.randn(64, DIM), torch.arange(64) * 7 + 2**33
    whole = round_to_bf16(values, rows, (5, 0, 9))
    some = torch.randperm(64)[:20]
    assert torch.equal(round_to_bf16(values[some], rows[some], (5, 0, 9)), whole[some])
    for other in ((6, 0, 9), (5, 1, 9), (5, 0, 10)):
        changed = round_to_bf16(values, rows, other) != whole
        assert 0.2 < changed.float().mean() < 0.5  # two fair draws differ for a third of values
    columns = round_to_bf16(torch.full((512, DIM), 1 + 2**-8), torch.arange(512), (0, 0, 0)) > 1
    agree = (columns.T[:, None] == columns.T[None]).float().mean(-1) - torch.eye(DIM)
    # Halfway between neighbours each column is a coin: 512 tosses of two agree half the time.
    assert (agree.fill_diagonal_(0.5) - 0.5).abs().max() < 6 * 0.5 / math.sqrt(512)


@both
def test_small_updates_of_bf16_rows_do_not_vanish(make):
    table = Table(512, DIM, dtype=torch.bfloat16)
    nn.init.ones_(table.weight)
    optimizer = make([table], lr=2.0**-12)  # a 32nd of the distance to the neighbour below 1
    nearest = torch.ones(512, DIM, dtype=torch.bfloat16)
    for _ in range(64):
        stepped(optimizer, (torch.arange(512), torch.ones(512, DIM)))
        nearest -= torch.tensor(2.0**-12)
    assert (nearest == 1).all()
    moved = 1 - table.weight.detach().double().mean().item()
    # 4,096 values, each after 64 draws of 2^-8 with probability 1/16, or a half below 1: a standard
    # deviation of at most 2^-8 * sqrt(64 / 16), six of them by the root of 4,096.
    assert moved == pytest.approx(64 * 2.0**-12, abs=6 * 2.0**-8 * 2 / 64)


def test_gradients_of_bf16_rows_are_summed_in_float32():
    table = Table(3, 2, dtype=torch.bfloat16)
    values = torch.full((1000, 2), 1.0, dtype=torch.bfloat16)
    table.accumulate(torch.zeros(1000, dtype=torch.int64), values)
    assert table.row_gradient.values_UE.tolist() == [[1000.0, 1000.0]]  # bfloat16 stops at 256
