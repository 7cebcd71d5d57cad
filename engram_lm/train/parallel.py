"""An Objective's backbone on several workers: each has all of it, or each has a part.

Tables stay outside of both: they are shared by `shard_tables`, before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from engram_lm.memory.table import Table
from engram_lm.train.objective import Objective


def replicate(objective: Objective) -> DistributedDataParallel | Objective:
    """The objective under DDP: every worker holds the whole backbone. As it is where rows alone
    are trained, which DDP refuses.

    Buffers are not sent before each step: the router's bias moves by the load of all workers, and
    so is the same on each already.
    """
    tables = {table.weight for _, table in _tables(objective)}
    if not any(p.requires_grad for p in objective.parameters() if p not in tables):
        return objective
    leave_tables_out(objective)
    device = objective.model.device
    return DistributedDataParallel(
        objective,
        device_ids=None if device.type == "cpu" else [device],
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def leave_tables_out(module: nn.Module) -> None:
    """Has DDP neither send the tables of a module nor wait for gradients of theirs."""
    outside = [f"{name}.weight" for name, _ in _tables(module)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, outside)


def shard(objective: Objective, mesh: DeviceMesh | None = None) -> Objective:
    """The objective under fully_shard: every worker holds a part of each parameter.

    Block by block, then the rest; parameters become DTensors, so optimisers are made afterwards.
    mesh: of all workers, as fully_shard takes it.
    """
    if mesh is None:
        mesh = init_device_mesh(objective.model.device.type, (dist.get_world_size(),))
    for block in objective.model.model.layers:
        fully_shard(block, mesh=mesh)
    outside = {table.weight for _, table in _tables(objective)}
    fully_shard(objective, mesh=mesh, ignored_params=outside)
    return objective


@contextmanager
def synchronised(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, backward passes average dense gradients over workers only where it is `wanted`.

    For accumulation: the last of a step's backward passes, and the forward pass before it, want it.
    Row gradients travel in each; their sum is the same.
    """
    if isinstance(module, DistributedDataParallel) and not wanted:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
    yield


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, the model may be called without its objective, as validation does; after the first
    step, in which fully_shard learns which module is outermost."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this worker holds of each: its part of a DTensor, all of any other; not a copy."""
    return [each.to_local() if isinstance(each, DTensor) else each for each in tensors]


def whole_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each, on every worker; DTensors are all on one mesh, as fully_shard leaves them.

    One sum over the workers for all, however many there are.
    """
    norms = list(torch._foreach_norm(local(tensors)))
    cut = [index for index, each in enumerate(tensors) if isinstance(each, DTensor)]
    if cut:
        first = tensors[cut[0]]
        assert isinstance(first, DTensor)
        squares = torch.stack([norms[index] for index in cut]).square_()
        for dim, placement in enumerate(first.placements):
            if placement.is_shard():
                dist.all_reduce(squares, group=first.device_mesh.get_group(dim))
        for index, square in zip(cut, squares, strict=True):
            norms[index] = square.sqrt()
    return norms


def _tables(module: nn.Module) -> list[tuple[str, Table]]:
    return [(name, each) for name, each in module.named_modules() if isinstance(each, Table)]
