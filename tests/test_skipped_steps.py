"""Steps whose gradients have no finite norm: nothing changes, they are counted, and then it ends.
Frozen tables, and what tables are spared."""

import copy

import pytest
import torch
from tiny import phrases, tiny_model

from engram_lm.errors import ConfigError
from engram_lm.train.optimizers import Optimizers

KINDS = ("matrices", "stacks", "others", "tables")


def made(table_optimizer: str = "adam", table_dtype: str | None = None, **settings):
    model = tiny_model(table_dtype=table_dtype).train()
    settings = {"lr": 1e-2, "table_lr_multiplier": 5, "weight_decay": 0.1} | settings
    return model, Optimizers(model, table_optimizer=table_optimizer, **settings)


def backward(model, seed: int) -> None:
    ids = phrases(4, 20, seed=seed)
    model(ids, labels=ids, use_cache=False).loss.backward()


def poison(optimizers: Optimizers, kind: str, value: float) -> None:
    first = getattr(optimizers.groups, kind)[0]
    gradient = first.row_gradient.values_UE if kind == "tables" else first.grad
    gradient.view(-1)[3] = value


def step(model, optimizers: Optimizers, seed: int, kind: str | None = None, value=0.0) -> bool:
    backward(model, seed)
    if kind is not None:
        poison(optimizers, kind, value)
    optimizers.clip(1.0)
    taken = optimizers.step()
    optimizers.zero_grad()
    return taken


def everything(model, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    states = {
        f"{name} {index} {key}": value
        for name, each in optimizers.each.items()
        for index, state in enumerate(each.state.values())
        for key, value in state.items()
    }
    return copy.deepcopy({**model.state_dict(), **states})


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_norm_changes_nothing(kind, value):
    model, optimizers = made()
    assert step(model, optimizers, 0)
    before = everything(model, optimizers)
    assert not step(model, optimizers, 1, kind, value)
    assert equal(everything(model, optimizers), before)
    assert optimizers.skipped == 1
    assert step(model, optimizers, 2)
    assert not equal(everything(model, optimizers), before)
    assert optimizers.skipped == 1 and optimizers.skipped_in_a_row == 0


@pytest.mark.parametrize("table_optimizer", ["adam", "rowwise"])
@pytest.mark.parametrize("table_dtype", [None, "bf16"])
def test_training_goes_on_as_if_a_skipped_step_had_not_been(table_optimizer, table_dtype):
    ends = []
    for skips in (False, True):
        model, optimizers = made(table_optimizer, table_dtype)
        for seed in range(4):
            if skips and seed == 2:
                assert not step(model, optimizers, 7, "others", float("inf"))
            assert step(model, optimizers, seed)
        ends.append(everything(model, optimizers))
    assert equal(*ends)


def test_the_norm_is_taken_where_nothing_was_clipped():
    model, optimizers = made()
    backward(model, 0)
    poison(optimizers, "tables", float("nan"))
    assert not optimizers.step() and optimizers.skipped == 1


def test_ten_skipped_steps_in_a_row_end_training_with_one_line():
    model, optimizers = made()
    for seed in range(9):
        assert not step(model, optimizers, seed, "tables", float("nan"))
    assert step(model, optimizers, 0)
    for seed in range(9):
        assert not step(model, optimizers, seed, "matrices", float("nan"))
    with pytest.raises(ConfigError, match=r"^lr=0.01: the norm .* nan in 10 steps in a row") as end:
        step(model, optimizers, 0, "matrices", float("nan"))
    assert "\n" not in str(end.value) and optimizers.skipped == 19


def test_counts_of_skipped_steps_survive_a_state_dict():
    model, optimizers = made()
    for seed in range(3):
        step(model, optimizers, seed, "tables", float("nan"))
    _, others = made()
    others.load_state_dict(optimizers.state_dict())
    assert (others.skipped, others.skipped_in_a_row) == (3, 3)


def test_a_frozen_table_is_read_unmerged_and_has_neither_gradient_nor_state():
    model, _ = made()
    frozen, trained = model.model.tables.values()
    frozen.requires_grad_(False)
    optimizers = Optimizers(model, lr=1e-2, table_lr_multiplier=5, weight_decay=0.1)
    before = frozen.weight.clone()
    ids = phrases(4, 20, seed=0)
    requests = model.model.memory.start(ids).requests
    assert not hasattr(requests[0], "merged") and hasattr(requests[2], "merged")
    assert step(model, optimizers, 0)
    assert torch.equal(frozen.weight, before) and frozen.row_gradient is None
    assert optimizers.rows.tables == [trained]
    assert list(optimizers.rows.state) == [trained.weight]


@pytest.mark.parametrize("table_optimizer", ["adam", "rowwise"])
def test_rows_are_not_decayed(table_optimizer):
    model, optimizers = made(table_optimizer, weight_decay=0.5)
    backward(model, 0)
    tables = optimizers.groups.tables
    for table in tables:
        table.row_gradient.values_UE.zero_()
    before = [table.weight.clone() for table in tables]
    matrix = optimizers.groups.matrices[0].clone()
    optimizers.step()
    assert all(torch.equal(a, table.weight) for a, table in zip(before, tables, strict=True))
    assert not torch.equal(matrix, optimizers.groups.matrices[0])


@pytest.mark.parametrize("table_optimizer", ["adam", "rowwise"])
def test_the_multiplier_scales_the_steps_of_rows(table_optimizer):
    moved = []
    for multiplier in (1.0, 4.0):
        model, optimizers = made(table_optimizer, table_lr_multiplier=multiplier)
        (table, _) = optimizers.groups.tables
        before = table.weight.detach().double()
        step(model, optimizers, 0)
        moved.append(table.weight.detach().double() - before)
    # Values of about 1, rounded to 2^-24; steps of 1e-2 and 4e-2.
    torch.testing.assert_close(moved[1], 4 * moved[0], rtol=0, atol=1e-6)
