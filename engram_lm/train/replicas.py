"""Tables of which every worker holds all rows, in training loops that are not ours."""

import torch.distributed as dist
from torch import nn

from engram_lm.errors import instance
from engram_lm.train.parallel import leave_tables_out
from engram_lm.train.sharded_table import shard_tables
from engram_lm.train.workers import Workers


def replicate_tables(model: nn.Module) -> None:
    """Prepares a model for DDP: row gradients are averaged over all workers, by the rows touched.

    To be called by every worker after the process group exists and before the optimiser is made.
    DDP leaves the tables alone from then on. A worker that is by itself changes nothing.
    """
    instance("model", model, nn.Module)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    shard_tables(model, *Workers(dist.get_rank(), dist.get_world_size()).grid(1))
    leave_tables_out(model)
