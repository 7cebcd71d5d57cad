"""transformers.Trainer trains our models with our updates, and resumes them bit for bit."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import VOCABULARY, phrases, tiny_model
from transformers import Trainer, TrainingArguments

from engram_lm.errors import ConfigError
from engram_lm.train.joint_optimizer import JointOptimizer, param_groups
from engram_lm.train.optimizers import Optimizers
from engram_lm.train.replicas import replicate_tables
from engram_lm.train.row_adam import RowAdam
from engram_lm.train.trainer_callback import EngramCallback

SEQUENCES = phrases(24, 20, seed=0)


class Phrases(torch.utils.data.Dataset):
    """Labels are masked at the start, each sequence's by another count: unequal shares."""

    def __len__(self):
        return len(SEQUENCES)

    def __getitem__(self, index):
        labels = SEQUENCES[index].clone()
        labels[: index % 12] = -100
        return {"input_ids": SEQUENCES[index], "labels": labels}


ALONE = {"max_grad_norm": 0.0, "fp16": False, "world_size": 1, "n_gpu": 0, "process_index": 0}
ALONE |= {"label_smoothing_factor": 0.0}
"""What EngramCallback reads of Trainer's arguments, in one process on a CPU."""


def tiny_trained(seed=0):
    """A model to train; `seed` changes every weight."""
    model = tiny_model().train()
    if seed:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def arguments(out, **changes):
    settings = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "max_grad_norm": 0.0,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def plain_trainer(model, out, clip=0.5, **changes):
    args = arguments(out, **changes)
    return Trainer(
        model=model,
        args=args,
        train_dataset=Phrases(),
        optimizers=(JointOptimizer(model, lr=args.learning_rate, clip=clip), None),
        callbacks=[EngramCallback(0.01)],
    )


def replicated_trainer(model, out, **changes):
    arguments(out, **changes)  # which is where workers meet
    replicate_tables(model)
    return plain_trainer(model, out, **changes)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def losses(run):
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps of eight sequences without a pause: the run, its weights, its directory."""
    out = tmp_path_factory.mktemp("whole")
    model = tiny_trained()
    before = bits(model)
    run = plain_trainer(model, out, per_device_train_batch_size=8)
    run.train()
    return run, before, bits(model), out


def test_trainer_trains_rows_backbone_and_routing_bias(whole):
    run, before, after, _ = whole
    assert losses(run)[-1] < losses(run)[0] - 0.3
    for part in ("tables.0", "engram.kv", "experts", "embed_tokens", "e_score"):
        assert any(name in differing(before, after) for name in before if part in name), part
    assert all(table.row_gradient is None for table in run.model.model.tables.values())


def test_trainer_resumes_bit_for_bit(whole, tmp_path):
    run, _, after, out = whole
    model = tiny_trained(seed=5)
    resumed = plain_trainer(model, tmp_path, per_device_train_batch_size=8)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-3"))
    assert differing(bits(model), after) == []
    assert losses(resumed) == losses(run)


def test_trainers_accumulation_weighs_every_label_alike(whole, tmp_path):
    run, _, _, out = whole
    parts = plain_trainer(
        tiny_trained(), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    parts.train()
    assert_alike(tmp_path, losses(parts), losses(run), out)


def assert_alike(out, run, reference, reference_out):
    """Step 1 has a learning rate of 0, so that moments are that step's clipped gradients, times a
    constant: sums of some hundred float32 in another order, 1e-5 of the largest. From there on Adam
    and Muon make steps of full size of gradients near zero: losses agree to 1 %.
    """
    saved = (each / "checkpoint-1" / "optimizer.pt" for each in (out, reference_out))
    found, wanted = map(torch.load, saved)
    compared = 0
    for name in ("muon", "stacked_muon", "adam", "row_adam"):
        for parameter, state in wanted[name]["state"].items():
            moment = "momentum_buffer" if "muon" in name else "exp_avg"
            gradient, other = state[moment], found[name]["state"][parameter][moment]
            assert (gradient - other).abs().max() <= 1e-5 * gradient.abs().max(), (name, parameter)
            compared += bool(gradient.any())
    assert compared > 30
    assert run[0] == pytest.approx(reference[0], rel=1e-5)
    assert run == pytest.approx(reference, rel=1e-2)


def test_the_loss_is_the_sum_over_the_number_of_items_where_it_is_given():
    model = tiny_model()
    ids = torch.randint(2, VOCABULARY, (3, 11))
    labels = ids.clone()
    labels[0, :7] = -100
    mean = model(ids, labels=labels, use_cache=False).loss
    # Labels at the first position are nobody's target.
    count = int((labels[:, 1:] != -100).sum())
    shared = model(ids, labels=labels, use_cache=False, num_items_in_batch=4 * count).loss
    torch.testing.assert_close(shared * 4, mean)


def backward(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (2, 19), generator=generator)
    model(ids, labels=ids, use_cache=False).loss.backward()


def test_a_joint_step_is_ours_bit_for_bit_and_clips_rows_with_the_rest():
    ours, joint = tiny_trained(), tiny_trained()
    four = Optimizers(ours, lr=0.01, table_lr_multiplier=5.0, weight_decay=0.1)
    one = JointOptimizer(joint, lr=0.01, clip=0.5, precision="bf16")
    for seed in range(3):
        backward(ours, seed)
        backward(joint, seed)
        norm = four.clip(0.5)
        four.step()
        four.zero_grad()
        one.step()
        assert torch.equal(one.norm, norm) and norm > 0.5
        assert all(table.row_gradient is None for table in joint.model.tables.values())
        joint.zero_grad()  # as Trainer does; it does not reach rows
        assert differing(bits(ours), bits(joint)) == []


@pytest.mark.parametrize("finite", [True, False])
def test_a_step_that_is_skipped_leaves_the_routing_bias_too(finite):
    model = tiny_trained()
    joint = JointOptimizer(model, lr=0.01)
    callback, settings = EngramCallback(), SimpleNamespace(**ALONE)
    callback.on_train_begin(settings, None, None, model=model, optimizer=joint)
    backward(model)
    if not finite:
        model.model.tables["0"].row_gradient.values_UE[0] = float("nan")
    before = bits(model)
    joint.step()
    callback.on_optimizer_step(settings, None, None, optimizer=joint)
    callback.on_train_end(settings, None, None)
    moved = differing(before, bits(model))
    assert joint.taken == finite and any("bias" in name for name in moved) == bool(moved) == finite


def test_a_scheduler_reaches_every_group_after_a_state_was_loaded_too():
    model = tiny_trained()
    optimizer = JointOptimizer(model, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    backward(model)
    optimizer.step()
    schedule.step()
    rates = {name: each.param_groups[0]["lr"] for name, each in optimizer.optimizers.each.items()}
    assert rates == {"muon": 5e-3, "stacked_muon": 5e-3, "adam": 5e-3, "row_adam": 2.5e-2}
    backward(model)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(table.row_gradient is None for table in model.model.tables.values())
    with pytest.raises(ConfigError, match="clip=0: above 0, or None"):
        JointOptimizer(model, lr=0.01, clip=0)


def test_param_groups_hold_every_parameter_once_with_its_rate_and_decay():
    model = tiny_trained()
    found = param_groups(model, lr=0.02, table_lr_multiplier=3.0, weight_decay=0.1)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in found} == {
        "matrices": (0.02, 0.1),
        "stacks": (0.02, 0.1),
        "others": (0.02, 0.0),
        "tables": (0.06, 0.0),
    }
    held = [parameter for group in found for parameter in group["params"]]
    assert set(held) == set(model.parameters()) and len(held) == len(set(held))


def test_param_groups_go_with_any_optimiser_and_a_row_optimiser_beside_it():
    model = tiny_trained()
    *dense, tables = param_groups(model, lr=0.02)
    before = bits(model)
    optimizer = torch.optim.AdamW(dense)
    rows = RowAdam(model.model.tables.values(), lr=tables["lr"])
    backward(model)
    optimizer.step()
    assert not any("tables" in name for name in differing(before, bits(model)))
    rows.step()
    moved = differing(before, bits(model))
    assert {name for name, _ in model.named_parameters()} - {*moved, "lm_head.weight"} == set()


def test_what_would_treat_rows_wrongly_is_refused_in_one_line():
    model = tiny_trained()
    joint = JointOptimizer(model, lr=0.01)
    for settings, optimizer, words in (
        ({"max_grad_norm": 1.0}, joint, "max_grad_norm=1.0: it does not see the gradients of rows"),
        ({"fp16": True}, joint, "fp16=True: its scaler does not see"),
        ({"world_size": 2}, joint, "model.tables.0: each of 2 workers would train rows of its own"),
        ({}, torch.optim.SGD(model.lm_head.parameters()), "model.tables.0: not in the optimiser"),
    ):
        with pytest.raises(ConfigError, match=words):
            EngramCallback().on_train_begin(
                SimpleNamespace(**{**ALONE, **settings}),
                None,
                None,
                model=model,
                optimizer=optimizer,
            )


def test_two_workers_train_and_resume_as_one_does(whole, tmp_path):
    run, _, _, out = whole
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).with_name("trainer_worker.py")
    subprocess.run(
        [sys.executable, *launch, str(worker), str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert differing(first["whole"], second["whole"]) == []
    for found in (first, second):
        assert differing(found["whole"], found["resumed"]) == []
        assert found["refused"].startswith(
            "a table of one worker among 2: its rows would part from"
        )
    # The same eight sequences a step, four a worker, with unequal counts of labels.
    for name in ("whole", "accumulated"):
        assert_alike(tmp_path / name, first[f"{name}_losses"], losses(run), out)
