"""Tables of which every worker holds all rows, in training loops that are not ours."""

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engram_lm.memory.table import Table
from engram_lm.train.sharded_table import shard_tables
from engram_lm.train.workers import Workers


def replicate_tables(model: nn.Module) -> None:
    """Prepares a model for DDP: row gradients are averaged over all workers, by the rows touched.

    To be called by every worker after the process group exists and before the optimiser is made.
    DDP leaves the tables alone from then on. A worker that is by itself changes nothing.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    shard_tables(model, *Workers(dist.get_rank(), dist.get_world_size()).grid(1))
    outside = [f"{name}.weight" for name, each in model.named_modules() if isinstance(each, Table)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, outside)
