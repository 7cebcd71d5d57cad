"""Row gradients that an optimiser, zero_grad, clipping or a scaler does not see are said; whatever
takes them in its own order is not bothered. Warnings are errors in this suite."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from accelerate import Accelerator
from attached_worker import given, tables, with_lora
from families import attached
from peft import LoraConfig, get_peft_model
from test_trainer import SEQUENCES, bits, differing
from tiny import tiny_model
from torch.optim.lr_scheduler import LambdaLR

from engram_lm import JointOptimizer, RowAdam, RowwiseRMSprop, Table, UntrainedRowsWarning
from engram_lm.errors import ConfigError
from engram_lm.memory import untaken
from engram_lm.memory.table import RowGradient
from engram_lm.train.freeze import freeze

pytestmark = [
    # transformers' new names for what PEFT still calls by the old ones.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]


def loss(model, index=0, **changes):
    ids = SEQUENCES[4 * index : 4 * index + 4]
    return model(input_ids=ids, labels=ids, use_cache=False, **changes).loss


def rows_of(model):
    return [table.weight.detach().clone() for table in tables(model).values()]


def moved(model, before):
    return [not torch.equal(a, b) for a, b in zip(before, rows_of(model), strict=True)]


def dense(model):
    mine = {id(table.weight) for table in tables(model).values()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in mine]


class Row(torch.nn.Module):
    """A table in a module of one's own."""

    def __init__(self):
        super().__init__()
        self.table, self.head = Table(20, 4), torch.nn.Linear(4, 1)

    def forward(self):
        return self.head(self.table.start(torch.tensor([3, 5, 3])).wait()).sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.AdamW(model.parameters()),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: torch.optim.Adam([t.weight for t in tables(model).values()], fused=True),
    ],
)
def test_an_optimiser_that_has_a_table_and_leaves_its_rows_is_named_after_its_step(make):
    for model in (attached("llama").train(), tiny_model().train(), with_lora(attached("llama"))):
        optimizer = make(model)
        loss(model).backward()
        with pytest.warns(
            UntrainedRowsWarning, match=r"tables\.0: .* has stepped this model"
        ) as caught:
            optimizer.step()
            optimizer.zero_grad()
            for _ in range(2):  # once a model
                loss(model).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert len(caught) == 1 and type(optimizer).__name__ in str(caught[0].message)
    model = Row()
    optimizer = make(model)
    model().backward()
    with pytest.warns(UntrainedRowsWarning, match=r"a table of \(20, 4\): "):
        optimizer.step()


@pytest.mark.parametrize("clear", ["optimizer", "nobody"])
def test_an_optimiser_of_the_rest_alone_is_named_when_the_rows_are_asked_for_again(clear):
    for kind in ("everything", "lora"):
        model = given(kind)
        optimizer = torch.optim.AdamW(dense(model))
        loss(model).backward()
        optimizer.step()
        if clear == "optimizer":
            optimizer.zero_grad()
        with torch.no_grad():
            loss(model)
        with pytest.warns(UntrainedRowsWarning, match="AdamW has stepped this model"):
            loss(model)
        held = [table.row_gradient is not None for table in tables(model).values()]
        assert held == [clear == "nobody"] * 2


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", [RowAdam, RowwiseRMSprop])
@pytest.mark.parametrize("everything", [False, True])
def test_two_optimisers_in_any_order_are_not_bothered(order, kind, everything):
    model = attached("llama").train()
    before = rows_of(model)
    rest = torch.optim.AdamW(model.parameters() if everything else dense(model), fused=True)
    optimizers = [rest, kind(tables(model).values(), lr=0.01)][::order]
    schedule = LambdaLR(optimizers[0], lambda step: 0.5)
    for step in range(3):
        for part in range(2):
            loss(model, part).backward()
        for optimizer in optimizers:
            optimizer.step()
        schedule.step()
        if step % 2:
            rest.zero_grad()  # what was taken is dropped without a word
        else:
            for optimizer in optimizers:
                optimizer.zero_grad()
        model.eval().generate(SEQUENCES[:1, :5], max_new_tokens=2, do_sample=False)
        model.train()
    assert all(moved(model, before))


def test_taken_rows_are_cleared_with_the_dense_gradients_and_not_taken_twice():
    results = []
    for clears in (False, True):
        model = attached("llama").train()
        rest, rows = torch.optim.SGD(dense(model), lr=0.01), RowAdam(tables(model).values(), lr=0.1)
        for step in range(3):
            value = loss(model, step)
            rest.zero_grad()  # between forward and backward, as many loops have it
            if clears:
                rows.zero_grad()
            value.backward()
            rest.step()
            rows.step()
        results.append(bits(model))
    assert differing(*results) == []


def accumulate(model, discarded, clear):
    """The rows' gradients of one batch, after another that was given up."""
    if discarded:
        loss(model, 1).backward()
        clear(model)
    loss(model).backward()
    return [table.row_gradient for table in tables(model).values()]


def to_zero(model):
    torch.nn.Module.zero_grad(model, set_to_none=False)


def to_zero_at_once(model):
    torch.optim.SGD(dense(model), foreach=True).zero_grad(set_to_none=False)


@pytest.mark.parametrize("kind", ["memory", "everything", "lora"])
@pytest.mark.parametrize("clear", [torch.nn.Module.zero_grad, to_zero, to_zero_at_once])
def test_a_batch_that_was_given_up_is_in_no_step(kind, clear):
    model = given(kind)
    wanted = accumulate(given(kind), False, None)
    with pytest.warns(UntrainedRowsWarning, match="an earlier backward pass are dropped"):
        results = accumulate(model, True, clear)
    for one, other in zip(results, wanted, strict=True):
        assert torch.equal(one.rows_U, other.rows_U)
        assert torch.equal(one.values_UE, other.values_UE)
    clear(model)
    loss(model).backward()  # said once
    # The model's own, and that of our optimisers, reach rows and are silent.
    model = given(kind)
    own = model.base_model.model if kind == "lora" else model
    for clear_rows in (own.zero_grad, JointOptimizer(model, lr=0.01).zero_grad):
        loss(model, 1).backward()
        clear_rows()
        assert all(table.row_gradient is None for table in tables(model).values())


def test_a_batch_that_is_given_up_between_forward_and_backward_pass_is_in_no_step():
    wanted, model = accumulate(given(), False, None), given()
    loss(model, 1).backward()
    value = loss(model)
    torch.nn.Module.zero_grad(model)
    with pytest.warns(UntrainedRowsWarning, match="dropped"):
        value.backward()
    for table, other in zip(tables(model).values(), wanted, strict=True):
        assert torch.equal(table.row_gradient.values_UE, other.values_UE)


def test_frozen_fusion_is_told_by_what_else_trains_and_rows_alone_by_nothing():
    for parts, heard in ((("fusion",), True), (("fusion", "backbone"), False)):
        model = attached("llama").train()
        freeze(model, parts)
        loss(model, 1).backward()
        torch.nn.Module.zero_grad(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(model).backward()
        assert bool(caught) == heard


@pytest.mark.parametrize("kind", ["memory", "everything", "lora", "zero rows", "checkpointing"])
def test_accumulation_neither_warns_nor_drops(kind):
    """Also where all gradients of the memory are zero, as with rows of zeros, several forward
    passes stand before a backward pass, and what is trained changes in between."""
    model = given(kind if kind in ("memory", "lora") else "everything")
    if kind == "zero rows":
        model = attached("llama").train()
        for table in tables(model).values():
            torch.nn.init.zeros_(table.weight)
    if kind == "checkpointing":
        model.activation_checkpointing_enable()
    first = loss(model) + loss(model, 1)
    first.backward()
    for index in range(2, 4):
        loss(model, index).backward()
        with torch.no_grad():
            loss(model)
        wanted = [p for p in model.parameters() if p.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
        loss(model)
        for parameter in wanted:
            parameter.requires_grad_(True)
    whole = given(kind if kind in ("memory", "lora") else "everything")
    if kind == "zero rows":
        whole = attached("llama").train()
        for table in tables(whole).values():
            torch.nn.init.zeros_(table.weight)
    sum(loss(whole, index) for index in range(4)).backward()
    for one, other in zip(tables(model).values(), tables(whole).values(), strict=True):
        assert torch.equal(one.row_gradient.rows_U, other.row_gradient.rows_U)
        torch.testing.assert_close(one.row_gradient.values_UE, other.row_gradient.values_UE)


@pytest.mark.parametrize("clear", ["model", "rows"])
def test_a_step_that_left_rows_is_named_by_whoever_clears_them(clear):
    model = given()
    optimizer, never_stepped = torch.optim.AdamW(dense(model)), RowAdam(tables(model).values(), 0.1)
    before = rows_of(model)
    loss(model).backward()
    optimizer.step()
    with pytest.warns(UntrainedRowsWarning, match="AdamW has stepped this model and left"):
        (model if clear == "model" else never_stepped).zero_grad()
    assert not any(moved(model, before))
    loss(model).backward()
    optimizer.step()
    never_stepped.step()  # it has now
    model.zero_grad()


def test_gradients_around_a_frozen_fusion_may_be_masked_laid_out_anew_or_sparse():
    def masked(model):
        model.get_input_embeddings().weight.grad[:50] = 0

    def laid_out(model):
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.grad = weight.grad.t().contiguous().t()

    def nothing(model):
        pass

    for change in (masked, laid_out, nothing):
        model = attached("llama").train()
        freeze(model, ("fusion",))
        if change is nothing:
            model.get_input_embeddings().sparse = True
        optimizer = RowAdam(tables(model).values(), 0.1)
        loss(model).backward()
        change(model)
        before = rows_of(model)
        optimizer.step()
        assert all(moved(model, before))


def test_a_copy_in_the_middle_of_an_accumulation_has_no_gradient_at_all():
    model = given()
    loss(model).backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(table.row_gradient is None for table in tables(other).values())
        assert all(parameter.grad is None for parameter in copy.deepcopy(model).parameters())
    assert all(table.row_gradient is not None for table in tables(model).values())


def test_models_and_their_optimisers_do_not_hear_of_each_other():
    one, other = attached("llama").train(), attached("llama", seed=1).train()
    step = JointOptimizer(one, lr=0.01)
    loss(one).backward()
    loss(other).backward()
    step.step()
    loss(other, 1).backward()
    loss(one).backward()


def test_a_closure_that_clears_is_followed():
    model = given()
    optimizer = torch.optim.LBFGS(dense(model), max_iter=3)

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    with pytest.warns(UntrainedRowsWarning, match="dropped"):
        optimizer.step(closure)
    joint = JointOptimizer(model, lr=0.01)
    with pytest.warns(UntrainedRowsWarning, match="LBFGS has stepped this model"):
        joint.zero_grad()

    def ours():
        joint.zero_grad()
        value = loss(model)
        value.backward()
        return value

    before = rows_of(model)
    joint.step(ours)
    assert all(moved(model, before))


def scaler_unscales(model, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)


CLIPS = {
    "norm": lambda model, _: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "value": lambda model, _: torch.nn.utils.clip_grad_value_(model.parameters(), 1e-5),
    "mean": lambda model, _: [p.grad.div_(4) for p in model.parameters() if p.grad is not None],
    "accelerate": lambda m, _: Accelerator(cpu=True).clip_grad_norm_(m.parameters(), 1e-3),
    "unscale": scaler_unscales,
}


@pytest.mark.parametrize("clip", CLIPS)
def test_what_changes_the_dense_gradients_alone_is_refused_or_said(clip):
    for kind in ("memory", "everything", "lora"):
        model = given(kind)
        joint = JointOptimizer(model, lr=0.01)
        before = bits(model)
        loss(model).backward()
        CLIPS[clip](model, joint)
        with pytest.raises(ConfigError, match="were clipped or unscaled after the backward pass"):
            joint.step()
        assert differing(before, bits(model)) == []
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1)):
        model = given()
        rest, rows = torch.optim.AdamW(dense(model)), RowAdam(tables(model).values(), lr=0.1)
        loss(model).backward()
        acts = [lambda: CLIPS[clip](model, rest), rest.step, rows.step]  # noqa: B023
        with pytest.warns(UntrainedRowsWarning, match="were clipped or unscaled") as caught:
            for act in order:
                acts[act]()
        assert len(caught) == 1


def test_clipping_that_reaches_rows_or_changes_nothing_is_let_pass():
    model = given()
    joint = JointOptimizer(model, lr=0.01)
    rest, rows = torch.optim.AdamW(dense(model)), RowAdam(tables(model).values(), lr=0.1)
    for optimizers in ((joint,), (rest, rows), (rows, rest)):
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))  # Trainer takes norms so
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        loss(model).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        gradients += [table.row_gradient.values_UE for table in tables(model).values()]
        torch._foreach_mul_(gradients, 0.5)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        for table in tables(model).values():
            rows_U, values_UE = table.row_gradient
            table.row_gradient = RowGradient(rows_U, values_UE * 1e-3)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_would_leave_rows_scaled_is_refused_or_said(fused):
    model = given()
    joint, rows = JointOptimizer(model, lr=0.01), RowAdam(tables(model).values(), lr=0.1)
    rest, scaler = torch.optim.AdamW(dense(model), fused=fused), torch.amp.GradScaler("cpu")
    before = bits(model)
    scaler.scale(loss(model)).backward()
    for optimizer in (joint, rows):
        with pytest.raises(ConfigError, match="GradScaler: it divides the gradients in .grad"):
            scaler.step(optimizer)
    assert differing(before, bits(model)) == []
    scaler.step(rest)
    with pytest.warns(UntrainedRowsWarning, match="were clipped or unscaled"):
        rows.step()
    switched_off = torch.amp.GradScaler("cpu", enabled=False)
    model.zero_grad()
    switched_off.scale(loss(model)).backward()
    switched_off.step(joint)


def test_watching_keeps_nothing_alive_and_is_no_part_of_a_model():
    model = given()
    loss(model).backward()
    again = copy.deepcopy(model)
    loss(again).backward()
    pickle.loads(pickle.dumps(tables(model)))
    table = weakref.ref(next(iter(tables(model).values())))
    gc.collect()
    here = len(untaken._WATCHES)
    del model
    gc.collect()
    assert table() is None and len(untaken._WATCHES) == here - 2
    torch.optim.AdamW(again.lm_head.parameters()).step()


def test_a_graph_that_is_exported_reads_rows_as_the_model_does():
    model, ids = attached("llama"), SEQUENCES[:2, :9]
    graph = torch.export.export(model, (ids,), {"use_cache": False}, strict=False).module()
    for other in (ids, ids.flip(1)):
        wanted = model(other, use_cache=False).logits
        assert torch.equal(graph(other, use_cache=False).logits, wanted)
    graph(ids, use_cache=False).logits.sum().backward()
    model(ids, use_cache=False).logits.sum().backward()
    for name, table in tables(model).items():
        rows, values = table.row_gradient
        whole = torch.zeros_like(table.weight).index_copy_(0, rows, values)
        torch.testing.assert_close(
            graph.get_parameter(f"{name}.weight").grad, whole, rtol=1e-4, atol=1e-4
        )


def test_lora_around_a_frozen_memory_leaves_nothing_to_say():
    model = get_peft_model(attached("llama"), LoraConfig(task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
