"""One of two workers under transformers.Trainer; test_trainer.py starts it through torchrun."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_trainer import bits, losses, plain_trainer, replicated_trainer, tiny_trained

from engram_lm.errors import ConfigError


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for name, seed, batches, origin in (
        ("whole", 0, {"per_device_train_batch_size": 4}, None),
        ("resumed", 5, {"per_device_train_batch_size": 4}, out / "whole" / "checkpoint-3"),
        ("accumulated", 0, parts, None),
    ):
        # Another model on each worker: the first one's weights and rows are what all train.
        model = tiny_trained(seed + 10 * int(os.environ["RANK"]))
        run = replicated_trainer(model, out / name, **batches)
        run.train(resume_from_checkpoint=None if origin is None else str(origin))
        found[name], found[f"{name}_losses"] = bits(model), losses(run)
    try:
        plain_trainer(tiny_trained(), out / "refused").train()
    except ConfigError as error:
        found["refused"] = str(error)
    torch.save(found, out / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
