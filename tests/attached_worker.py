"""Models with a memory attached, in training; as a program, one of two workers that do it.

    attached_worker.py OUT    (under torchrun; test_attached_training.py starts it)

OUT/rankN.pt: losses, gradients of the first step, and what was trained, by case.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from families import attached, bare, memory
from peft import LoraConfig, get_peft_model
from test_trainer import SEQUENCES, Phrases, arguments, bits, losses
from tiny import canonical_map
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

import engram_lm
from engram_lm import (
    EngramCallback,
    EngramTrainer,
    JointOptimizer,
    Table,
    replicate_tables,
    shard_tables,
)
from engram_lm.train.export import export
from engram_lm.train.freeze import freeze
from engram_lm.train.parallel import leave_tables_out
from engram_lm.train.together import Together

LORA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


class Watch(TrainerCallback):
    """Fails where a table gets a dense gradient; keeps the gradients of the first step."""

    def __init__(self, model):
        self.model, self.first = model, None
        for table in tables(model).values():
            if table.weight.requires_grad:
                table.weight.register_post_accumulate_grad_hook(self.refuse)

    def refuse(self, weight):  # called when a backward pass is through with the weight
        assert weight.grad is None, f"a dense gradient of {tuple(weight.shape)}"

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self.model.named_parameters():
            dense = parameter.requires_grad and ".tables." not in name
            assert (parameter.grad is not None) == dense, name
        rows = tables(self.model).values()
        assert all(each.weight.grad is None and each.row_gradient is not None for each in rows)
        self.first = self.first or gradients(self.model)


def tables(model):
    return {name: each for name, each in model.named_modules() if isinstance(each, Table)}


def gradients(model):
    """Of all that trains, by name: dense, and of rows (numbers in the whole table, values)."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, table in tables(model).items():
        found[f"{name}.rows"] = table.row_gradient.rows_U + table.first_row
        found[f"{name}.values"] = table.row_gradient.values_UE.clone()
    return found


def assert_alike(found, wanted, share=1e-5):
    """Sums of some hundred float32 in another order: `share` of each tensor's largest entry."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert found[name].shape == gradient.shape, name
        assert (found[name] - gradient).abs().max() <= share * gradient.abs().max(), name


def given(kind="memory", family="llama", seed=0):
    """A model that was just given a memory, or with LoRA beside it; `seed` changes every weight."""
    model = bare(family, seed)
    engram_lm.attach(model, canonical_map(), memory())
    if kind == "memory":
        freeze(model, ("backbone",))
    if kind == "lora":
        model = with_lora(model)
    return model.train()


def with_lora(model, **settings):
    model = get_peft_model(model, LoraConfig(**{**LORA, **settings}))
    for name, parameter in model.named_parameters():
        if ".engram." in name or ".tables." in name:
            parameter.requires_grad_(True)
    return model


def trainer(model, out, data=None, **changes):
    args = arguments(out, **{"save_strategy": "no", **changes})
    return Trainer(
        model=model,
        args=args,
        train_dataset=Phrases() if data is None else data,
        optimizers=(JointOptimizer(model, lr=args.learning_rate, clip=1.0), None),
        callbacks=[EngramCallback(), Watch(model)],
    )


def watched(run):
    (watch,) = (each for each in run.callback_handler.callbacks if isinstance(each, Watch))
    return watch.first


def under_trainer(kind: str, out: Path) -> dict:
    """Tables on each worker, eight sequences a step."""
    arguments(out)  # which is where workers meet
    # Another model on each worker: the first one's weights and rows are what all train.
    model = given(kind, seed=7 * int(os.environ["RANK"]))
    replicate_tables(model)
    run = trainer(model, out, max_steps=4, per_device_train_batch_size=8 // 2)
    run.train()
    return {"losses": losses(run), "first": watched(run), "bits": bits(model)}


def natural(out: Path) -> dict:
    """Everything is trained, with nothing set up by hand."""
    model = given("everything", seed=7 * int(os.environ["RANK"]))
    args = arguments(out, max_steps=4, max_grad_norm=1.0, save_strategy="no", weight_decay=0.1)
    run = EngramTrainer(model, args, train_dataset=Phrases())
    run.train()
    return {"losses": losses(run), "bits": bits(model)}


def accelerated(out: Path | None = None) -> dict:
    """A loop of one's own: each row on one worker, and all exported to `out`; or, without it, the
    one process that they are compared with."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = attached("llama").train()
    freeze(model, ("backbone",))
    if out is not None:
        shard_tables(model)
        leave_tables_out(model)
    optimizer = JointOptimizer(model, lr=0.01)
    loader = DataLoader(SEQUENCES, batch_size=8 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    trained, found = accelerator.unwrap_model(model), {"losses": []}
    for ids in loader:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        accelerator.backward(loss)
        found.setdefault("first", gradients(trained))
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(float(accelerator.reduce(loss.detach(), "mean")))
    found["dense"] = [
        name for name, each in tables(trained).items() if each.weight.grad is not None
    ]
    found["rows"] = {name: each.weight.detach().clone() for name, each in tables(trained).items()}
    if out is not None:
        export(trained, SimpleNamespace(save_pretrained=lambda directory: None), out, Together())
        found["exported"] = str(out)
    return found


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found = {kind: under_trainer(kind, out / kind) for kind in ("memory", "everything", "lora")}
    found["natural"] = natural(out / "natural")
    found["sharded"] = accelerated(out / "exported")
    torch.save(found, out / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
