"""Ablations do what they say, to models of ours, attached ones and rows on disk, and undo it."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from families import attached, bare
from rows_read import rows_read
from test_analysis import hooks
from tiny import phrases, trained_model

from engram_lm import AttachedForCausalLM, EngramLMForCausalLM
from engram_lm.analysis import ablation
from engram_lm.errors import ConfigError
from engram_lm.memory.fuse import Fuse

EVERY = {
    "memory off": ablation.memory_off,
    "layer off": lambda model: ablation.layer_off(model, 2),
    "order off": lambda model: ablation.order_off(model, 3),
    "heads off": lambda model: ablation.heads_off(model, [0]),
    "gates held": lambda model: ablation.gates_held(model, {0: torch.full((1,), 0.3)}),
    "updates held": lambda model: ablation.updates_held(model, {0: torch.full((1, 32), 0.3)}),
    "rows permuted": ablation.rows_permuted,
    "rows random": ablation.rows_random,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return phrases(2, 19, seed=8)


@pytest.fixture(scope="module", params=["ours", "attached", "on disk", "attached, on disk"])
def model(request, tmp_path_factory):
    made = trained_model(1, True, 2) if request.param.startswith("ours") else None
    if request.param == "on disk":
        made = trained_model(1, True, 2)
    made = attached("llama") if made is None else made
    if "on disk" in request.param:
        directory = tmp_path_factory.mktemp("model")
        made.save_pretrained(directory)
        kind = EngramLMForCausalLM if request.param == "on disk" else AttachedForCausalLM
        made = kind.from_pretrained(directory, memory="disk", memory_budget="1MB").eval()
    return made


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", EVERY)
def test_each_changes_what_is_said_and_leaves_no_trace(model, ids, name):
    before, hooked = logits(model, ids), hooks(model)
    with EVERY[name](model):
        within = logits(model, ids)
        again = logits(model, ids)
    assert torch.equal(within, again) and (within - before).abs().max() > 1e-3
    with pytest.raises(ZeroDivisionError), EVERY[name](model):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), before)
    assert hooks(model) == hooked


def test_all_layers_off_is_memory_off(model, ids):
    with ablation.memory_off(model):
        wanted = logits(model, ids)
    with ablation.layer_off(model, 0), ablation.layer_off(model, 2):
        assert torch.equal(logits(model, ids), wanted)


def test_gates_held_at_zero_are_memory_off_and_gates_as_they_are_change_nothing(model, ids):
    with ablation.memory_off(model):
        wanted = logits(model, ids)
    with ablation.gates_held(model, {0: torch.zeros(1), 2: torch.zeros(1)}):
        assert torch.equal(logits(model, ids), wanted)
    one = ids[:1, :1]  # where there is one token, the mean gate is its own
    with ablation.mean_gates(model) as means:
        plain = logits(model, one)
    with ablation.gates_held(model, means):
        assert (logits(model, one) - plain).abs().max() < 1e-6


def test_mean_gates_are_the_means_of_all_tokens(ids):
    model = trained_model(4, True, 2)
    seen = []
    hook = model.model.layers[2].engram.gate.register_forward_hook(
        lambda _m, _i, gate_BTS: seen.append(gate_BTS)
    )
    with hook, ablation.mean_gates(model) as means:
        logits(model, ids)
        logits(model, ids[:1, :7])
    wanted = torch.cat([gate_BTS.flatten(0, 1) for gate_BTS in seen]).double().mean(0)
    assert torch.equal(means[2].float(), wanted.float()) and means[0].shape == (4,)


def test_updates_held_at_zero_are_memory_off_and_means_are_those_of_all_tokens(model, ids):
    with ablation.memory_off(model):
        wanted = logits(model, ids)
    nothing = torch.zeros(1, model.config.hidden_size)
    with ablation.updates_held(model, {0: nothing, 2: nothing}):
        assert torch.equal(logits(model, ids), wanted)
    seen = []
    (fuse,) = (
        module
        for name, module in model.named_modules()
        if isinstance(module, Fuse) and ".2." in name
    )
    hook = fuse.register_forward_hook(lambda _m, _i, fused: seen.append(fused.update_BTSD))
    with hook, ablation.mean_updates(model) as means:
        logits(model, ids)
        logits(model, ids[:1, :7])
    wanted = torch.cat([update_BTSD.flatten(0, 1) for update_BTSD in seen]).double().mean(0)
    assert torch.allclose(means[2], wanted, atol=1e-12)  # sums in another order
    one = ids[:1, :1]  # where there is one token, the mean update is its own
    with ablation.mean_updates(model) as means:
        plain = logits(model, one)
    with ablation.updates_held(model, means):
        assert (logits(model, one) - plain).abs().max() < 1e-6


@pytest.mark.parametrize(("order", "heads"), [(2, [0, 1]), (3, [2, 3])])
def test_an_order_off_reads_zeros_where_its_heads_stand(ids, order, heads):
    model = copy.deepcopy(trained_model(1, True, 2))
    with ablation.order_off(model, order):
        found = logits(model, ids)
    offsets = model.model.addresses.specification.offsets
    for layer, table in model.model.tables.items():
        ends = [*offsets(int(layer))[1:], len(table.weight)]
        for head in heads:
            table.weight[offsets(int(layer))[head] : ends[head]] = 0
    assert torch.equal(logits(model, ids), found)


def test_ablations_stand_inside_one_another(model, ids):
    before = logits(model, ids)
    with ablation.heads_off(model, [0, 1, 2, 3]):
        every = logits(model, ids)
    with ablation.order_off(model, 2):
        second = logits(model, ids)
        with ablation.order_off(model, 3):
            assert torch.equal(logits(model, ids), every)
        assert torch.equal(logits(model, ids), second)
    assert torch.equal(logits(model, ids), before)


def test_permuted_rows_are_a_bijection_of_each_heads_rows(ids):
    model = trained_model(1, True, 2)
    with rows_read(model) as calls:
        logits(model, ids)
        with ablation.rows_permuted(model, seed=3):
            logits(model, ids)
    plain, permuted = calls.rows
    assert not torch.equal(plain, permuted)
    specification = model.model.addresses.specification
    for index, layer in enumerate(specification.layers):
        primes = [p for order in specification.primes[layer] for p in order]
        for head, (first, rows) in enumerate(
            zip(specification.offsets(layer), primes, strict=True)
        ):
            one, other = (each[index, :, :, head].flatten().tolist() for each in (plain, permuted))
            assert all(first <= row < first + rows for row in other)
            assert len(dict(zip(one, other, strict=True))) == len(set(other))
            assert sorted(Counter(one).values()) == sorted(Counter(other).values())


def test_random_rows_keep_their_norms_and_are_the_same_for_a_row_every_time():
    rows = torch.tensor([[5, 9, 5], [2**40, 9, 0]])
    found = ablation.directions(rows, 64, seed=1)
    assert torch.equal(found[0, 0], found[0, 2]) and torch.equal(found[0, 1], found[1, 1])
    assert (found.norm(dim=-1) - 1).abs().max() < 1e-6
    many = ablation.directions(torch.arange(4000), 16, seed=2)
    assert not torch.equal(many, ablation.directions(torch.arange(4000), 16, seed=3))
    # Means and products of independent directions, within 5 standard errors.
    assert (many.mean(0).abs() < 5 * 0.25 / 4000**0.5).all()
    products = (many[:-1] * many[1:]).sum(1)
    assert abs(products.mean()) < 5 * products.std() / 4000**0.5
    assert products.std().item() == pytest.approx(0.25, rel=0.05)
    assert np.abs(np.corrcoef(many.T.numpy()) - np.eye(16)).max() < 0.1


def test_random_rows_are_read_with_the_norms_of_those_that_they_replace(ids):
    model = trained_model(1, True, 2)
    read: dict[str, list[torch.Tensor]] = {"rows": [], "random": []}

    def kept(name):
        def keep(_layer, vectors_BTM, _rows_BTH):
            read[name].append(vectors_BTM.unflatten(-1, (-1, model.config.memory_config.head_dim)))
            return vectors_BTM

        return ablation.altered(ablation.memory_decoder(model), keep)

    with kept("rows"):
        logits(model, ids)
    with ablation.rows_random(model), kept("random"):
        logits(model, ids)
    for rows, drawn in zip(*read.values(), strict=True):
        assert torch.allclose(rows.norm(dim=-1), drawn.norm(dim=-1), rtol=1e-5)
        assert rows.norm(dim=-1).std() > 1e-4 and not torch.allclose(rows, drawn, atol=1e-3)


def test_memory_off_inside_memory_off_stays_off(model, ids):
    with ablation.memory_off(model):
        wanted = logits(model, ids)
        with ablation.memory_off(model):
            pass
        assert torch.equal(logits(model, ids), wanted)


def test_what_is_not_there_is_refused():
    model = trained_model(1, True, 2)
    for wrong, words in (
        (ablation.layer_off(model, 1), "layer 1: memory is on 0, 2"),
        (ablation.order_off(model, 4), "order 4: this memory has orders 2 to 3"),
        (ablation.heads_off(model, [4]), "head 4: this memory has heads 0 to 3"),
        (ablation.memory_off(bare("llama")), "no memory of its own"),
    ):
        with pytest.raises(ConfigError, match=words), wrong:
            pass
