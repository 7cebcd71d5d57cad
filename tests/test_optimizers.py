"""Updates against torch's own optimisers."""

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn

from engram_lm.memory.table import Table
from engram_lm.train.balance import Balancer
from engram_lm.train.optimizers import Optimizers, groups
from engram_lm.train.row_adam import RowAdam
from engram_lm.train.workers import Workers

ROWS, DIM = 40, 8


def test_row_adam_is_adam_bit_for_bit_where_every_row_is_touched():
    table, dense = Table(ROWS, DIM), nn.Parameter(torch.empty(ROWS, DIM))
    dense.data.copy_(table.weight)
    ours = RowAdam([table], lr=3e-2, betas=(0.9, 0.95), eps=1e-3)
    adam = torch.optim.Adam([dense], lr=3e-2, betas=(0.9, 0.95), eps=1e-3, foreach=False)
    for step in range(20):
        gradient = torch.randn(ROWS, DIM) * 10.0 ** (step % 5 - 3)
        dense.grad = gradient
        table.accumulate(torch.randperm(ROWS).sort().values, gradient)
        for optimizer in (ours, adam):
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(table.weight, dense)


def test_row_adam_touches_only_touched_rows():
    table = Table(ROWS, DIM)
    before = table.weight.detach().clone()
    optimizer = RowAdam([table])
    table.accumulate(torch.tensor([5, 17]), torch.ones(2, DIM))
    optimizer.step()
    changed = (table.weight != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [5, 17]
    moments = optimizer.state[table.weight]["exp_avg"]
    assert moments.any(dim=1).nonzero().flatten().tolist() == [5, 17]


def test_row_adam_on_some_rows_equals_adam_kept_for_those_rows():
    # A slow reference: Adam's formula in float64, moments moving only when their row is touched.
    table = Table(ROWS, DIM)
    optimizer = RowAdam([table], lr=1e-2, betas=(0.9, 0.95))
    value = table.weight.detach().double().clone()
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    for step in range(1, 21):
        rows, gradient = torch.randperm(ROWS)[:7], torch.randn(7, DIM)
        table.accumulate(rows, gradient)
        optimizer.step()
        optimizer.zero_grad()
        mean[rows] = 0.9 * mean[rows] + 0.1 * gradient
        square[rows] = 0.95 * square[rows] + 0.05 * gradient.double() ** 2
        scale = (square[rows] / (1 - 0.95**step)).sqrt() + 1e-8
        value[rows] -= 1e-2 * mean[rows] / (1 - 0.9**step) / scale
    # float32 against float64 over 20 steps of at most 1e-2
    torch.testing.assert_close(table.weight.detach().double(), value, rtol=0, atol=1e-6)


def test_row_adams_moments_survive_its_state_dict():
    tables = [Table(ROWS, DIM), Table(ROWS, DIM)]
    tables[1].load_state_dict(tables[0].state_dict())
    optimizers = [RowAdam([table]) for table in tables]
    gradient = (torch.arange(ROWS), torch.randn(ROWS, DIM))
    tables[0].accumulate(*gradient)
    optimizers[0].step()
    tables[1].load_state_dict(tables[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for table, optimizer in zip(tables, optimizers, strict=True):
        table.row_gradient = None
        table.accumulate(*gradient)
        optimizer.step()
    assert torch.equal(tables[0].weight, tables[1].weight)


def test_groups_hold_every_parameter_once():
    for streams in (1, 4):
        model = tiny_model(streams)
        found = groups(model)
        listed = [*found.matrices, *found.stacks, *found.others]
        listed += [table.weight for table in found.tables]
        assert len(listed) == len(set(listed)) == len(list(model.parameters()))
        assert len(found.tables) == 2 and len(found.stacks) == 4
        assert model.lm_head.weight in set(found.others)


def test_clipping_counts_row_gradients_like_any_other():
    model = tiny_model()
    tokens = torch.randint(2, 97, (2, 19))
    model(tokens, labels=tokens).loss.backward()
    optimizers = Optimizers(model, lr=1e-3, table_lr_multiplier=5, weight_decay=0)
    dense = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    rows = [table.row_gradient.values_UE.flatten() for table in model.model.tables.values()]
    wanted = torch.cat([*dense, *rows]).double().norm()
    before = rows[0].clone()
    norm = optimizers.clip(wanted.item() / 2)
    assert norm.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(model.model.tables["0"].row_gradient.values_UE.flatten(), before / 2)
    assert optimizers.clip(1e9).item() == pytest.approx(wanted.item() / 2, rel=1e-5)


def test_row_gradients_stay_out_of_grad_and_clip_grad_norm_still_works():
    model = tiny_model()
    tokens = torch.randint(2, 97, (2, 19))
    model(tokens, labels=tokens).loss.backward()
    assert all(table.weight.grad is None for table in model.model.tables.values())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_factor_scales_every_learning_rate():
    optimizers = Optimizers(tiny_model(), lr=1e-3, table_lr_multiplier=5, weight_decay=0.1)
    optimizers.set_factor(0.5)
    rates = {name: each.param_groups[0]["lr"] for name, each in optimizers.each.items()}
    assert rates == {"muon": 5e-4, "stacked_muon": 5e-4, "adam": 5e-4, "row_adam": 2.5e-3}


def test_balancing_evens_out_a_router_that_prefers_one_expert():
    model = tiny_model().train()
    balancer = Balancer(model, 0.02, Workers())
    router = next(iter(balancer.routers.values()))
    with torch.no_grad():
        router.weight[0] += router.weight.abs().max()
        router.e_score_correction_bias[0] = 2.0
    tokens = torch.randint(2, 97, (8, 50))
    loads = []
    for _ in range(150):
        with torch.no_grad():
            model(tokens)
        load_E = balancer.step()[0].double()
        loads.append(load_E.max() / load_E.mean())
    assert loads[0] > 1.9 and loads[-1] < 1.2
    assert router.weight.grad is None  # a bias moved by load: no loss, no gradient
    balancer.close()
    assert not router._forward_hooks


def test_evaluation_does_not_move_the_balance():
    model = tiny_model().eval()
    balancer = Balancer(model, 0.1, Workers())
    model(torch.randint(2, 97, (2, 9)))
    balancer.step()
    assert not any(router.e_score_correction_bias.any() for router in balancer.routers.values())
