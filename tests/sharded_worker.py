"""One worker of a launch that trains a small model in many ways; run by test_sharded.py.

    sharded_worker.py OUT CASE[:STEPS]...    (RANK, WORLD_SIZE and the like as torchrun sets them)

OUT/CASE[:STEPS].pt is what training left, whole, written by the first worker. `train` with a worker
that is alone is the run that all are measured against. A last case may end in an error: one line,
status 2.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import phrases, tiny_model
from torch.distributed.tensor import DTensor

from engram_lm.errors import EngramError, WorkerError
from engram_lm.train.balance import Balancer
from engram_lm.train.batches import Batch
from engram_lm.train.objective import Objective
from engram_lm.train.optimizers import Optimizers
from engram_lm.train.parallel import replicate, shard, synchronised
from engram_lm.train.sharded_table import shard_tables
from engram_lm.train.workers import Workers

STEPS = 20
CASES = {
    "ddp": {},
    "fsdp": {"backbone": shard},
    "fsdp-muon": {"backbone": shard, "muon": True},
    "ddp-muon": {"muon": True},
    "uneven": {"sequences": 5},
    "no-tokens": {"sequences": 1},
    "fsdp-no-tokens": {"sequences": 1, "backbone": shard},
    "accumulated": {"parts": 2, "checkpointing": True},
    "fsdp-accumulated": {"parts": 2, "checkpointing": True, "backbone": shard},
    "one-sided": {"repeated": True, "below": 50},
    "replicated": {"shards": 1},
    "pairs": {"shards": 2},
    "frozen": {"frozen": True},
    "corrupted": {"steps": 1, "fault": "corrupted"},
    "death": {"steps": 3, "fault": "death"},
}


def settings(name: str) -> dict:
    """A case's arguments for `train`; "ddp:5" takes 5 steps."""
    case, _, steps = name.partition(":")
    return {"steps": int(steps or STEPS), **CASES[case]}


def batch_of(step: int, sequences: int, repeated: bool) -> Batch:
    """A step's sequences; repeated: all alike, so that most rows of most shards are never hit."""
    ids = phrases(sequences, 13, seed=0 if repeated else step)
    if repeated:
        ids = ids[:1].expand(sequences, -1)
    return Batch(ids[:, :-1], ids[:, 1:], None)


def train(
    workers: Workers,
    *,
    backbone=replicate,
    muon: bool = False,
    sequences: int = 8,
    parts: int = 1,
    checkpointing: bool = False,
    repeated: bool = False,
    below: int | None = None,
    shards: int | None = None,
    frozen: bool = False,
    fault: str | None = None,
    steps: int,
) -> dict:
    """What a run leaves: losses, norms, and whole weights, moments, biases and traffic."""
    model = tiny_model(4, hc_sinkhorn_iters=4).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.model.tables["0"].requires_grad_(not frozen)
    tables = shard_tables(model, *workers.grid(shards or workers.size))
    if below is not None:  # only the first rows of each table are ever asked for
        addresses = model.model.addresses
        anywhere = addresses.window_rows
        addresses.window_rows = lambda window: anywhere(window) % below
    if fault is not None:
        break_something(fault, model, workers)
    module = Objective(model)
    if workers.size > 1:
        module = backbone(module)
    optimizers = Optimizers(model, lr=1e-3, table_lr_multiplier=5, weight_decay=0.1)
    if not muon:  # its rounds in bfloat16 make much of last bits: judged by itself
        matrices = [*optimizers.groups.matrices, *optimizers.groups.stacks]
        optimizers.each["adam"].add_param_group({"params": matrices})
        del optimizers.each["muon"], optimizers.each["stacked_muon"]
    # Far above rounding errors: else Adam makes a whole step of the sign of one.
    for name in ("adam", "row_adam"):
        for group in optimizers.each[name].param_groups:
            group["eps"] = 1e-4
    balancer = Balancer(model, 0.02, workers)
    left = {"losses": [], "norms": [], "rows": []}
    for step in range(steps):
        batch = batch_of(step, sequences, repeated)
        total = torch.zeros(())
        for part in range(parts):
            mine = workers.share(sequences // parts)
            first = part * (sequences // parts)
            own = Batch(*(x[first + mine.start : first + mine.stop] for x in batch[:2]), None)
            weight = own.targets_BT.numel() * workers.size / batch.targets_BT.numel()
            with synchronised(module, part == parts - 1):
                loss = module(own) * weight
                loss.backward()
            total += loss.detach()
        left["losses"].append(workers.sum(total).item() / workers.size)
        trained = [table for table in tables if table.row_gradient is not None]
        rows = [table.row_gradient.rows_U + table.first_row for table in trained]
        left["rows"].append([gathered(each, workers, shards) for each in rows])
        if step == 0:
            left["gradients"] = [
                gathered(table.row_gradient.values_UE, workers, shards) for table in trained
            ] + [whole(p.grad) for p in parameters(model)]
        left["norms"].append(optimizers.clip(0.5).item())
        optimizers.step()
        optimizers.zero_grad()
        balancer.step()
    balancer.close()
    left["validation"] = validate(module, batch_of(99, sequences, repeated), workers)
    with model.model.without_memory():
        left["validation"] += validate(module, batch_of(98, sequences, repeated), workers)
    state = optimizers.each["row_adam"].state
    left["replicas"] = [table.weight.detach().clone() for table in tables]
    left["tables"] = [gathered(table.weight.detach(), workers, shards) for table in tables]
    left["moments"] = [
        gathered(state[table.weight][name], workers, shards)
        for table in trained
        for name in ("exp_avg", "exp_avg_sq")
    ]
    left["parameters"] = [whole(p.detach()) for p in parameters(model)]
    left["biases"] = [r.e_score_correction_bias.clone() for r in balancer.routers.values()]
    left["traffic"] = [vars(table.traffic) for table in tables]
    left["owned"] = [(table.first_row, table.last_row) for table in tables]
    return left


@torch.no_grad()
def validate(module, batch: Batch, workers: Workers) -> list[float]:
    """The loss of a batch, each worker reading its share."""
    mine = workers.share(len(batch.targets_BT))
    own = Batch(*(x[mine.start : mine.stop] for x in batch[:2]), None)
    module.eval()
    loss = module(own) * own.targets_BT.numel() / batch.targets_BT.numel()
    module.train()
    return [workers.sum(loss).item()]


def break_something(fault: str, model, workers: Workers) -> None:
    """corrupted: row numbers arrive with their bytes shifted by one. death: in a forward pass."""
    if fault == "corrupted":
        exchange = model.model.tables["0"].shards
        faultless = exchange.all_to_all

        def shifted(values, outgoing, incoming):
            received = faultless(values, outgoing, incoming)
            return received << 8 if received.dtype == torch.int64 else received

        exchange.all_to_all = shifted
    elif workers.rank == 1:
        passes = []

        def die(*_) -> None:
            passes.append(1)
            if len(passes) == 2:
                os._exit(9)

        model.model.layers[1].register_forward_hook(die)


def parameters(model) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".tables." not in name]


def whole(values: torch.Tensor) -> torch.Tensor:
    return (values.full_tensor() if isinstance(values, DTensor) else values).clone()


def gathered(values: torch.Tensor, workers: Workers, shards: int | None) -> torch.Tensor:
    """The parts of the workers that hold one copy of a table together, behind each other."""
    if workers.size == 1:
        return values.clone()
    parts: list = [None] * workers.size
    dist.all_gather_object(parts, values)
    return torch.cat(parts[: shards or workers.size])


def main(out: str, *names: str) -> int:
    workers = Workers.join()
    for name in names:
        try:
            with workers.guard("a step"):
                left = train(workers, **settings(name))
        except EngramError as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if isinstance(error, WorkerError):
                return 2
            continue
        own = {key: left.pop(key) for key in ("replicas", "traffic", "owned")}
        every: list = [None] * workers.size
        dist.all_gather_object(every, own)
        if workers.main:
            torch.save(left | {"workers": every}, Path(out) / f"{name}.pt")
    workers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
