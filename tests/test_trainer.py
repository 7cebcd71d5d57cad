"""transformers.Trainer trains our models with our updates: steps, clipping, checkpoints, resuming."""

import torch
from tiny import phrases, tiny_model
from transformers import Trainer, TrainingArguments

from engram_lm.train.joint_optimizer import JointOptimizer
from engram_lm.train.trainer_callback import EngramCallback

SEQUENCES = phrases(24, 20, seed=0)


class Phrases(torch.utils.data.Dataset):
    """Sequences whose labels are masked at the start by as many ids as their number: unequal shares."""

    def __len__(self):
        return len(SEQUENCES)

    def __getitem__(self, index):
        ids = SEQUENCES[index]
        labels = ids.clone()
        labels[: index % 12] = -100
        return {"input_ids": ids, "labels": labels}


def arguments(out, **changes):
    settings = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "max_grad_norm": 0.0,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def trainer(model, out, callbacks=(), clip=0.5, **changes):
    optimizer = JointOptimizer(model, lr=0.01, weight_decay=0.1, clip=clip)
    return Trainer(
        model=model,
        args=arguments(out, **changes),
        train_dataset=Phrases(),
        optimizers=(optimizer, None),
        callbacks=[EngramCallback(0.01), *callbacks],
    )


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])] == []


def test_trainer_trains_rows_backbone_and_routing_bias(tmp_path):
    model = tiny_model().train()
    before = bits(model)
    run = trainer(model, tmp_path, max_steps=40, save_strategy="no")
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    after = bits(model)
    for part in ("tables.0", "engram.kv", "experts", "embed_tokens", "e_score"):
        assert any(not torch.equal(before[n], after[n]) for n in before if part in n), part
    assert all(table.row_gradient is None for table in model.model.tables.values())
