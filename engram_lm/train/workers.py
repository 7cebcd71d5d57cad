"""The processes that train one model: alone, or those that torchrun started."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from engram_lm.errors import ConfigError, WorkerError, instance, whole_number

if TYPE_CHECKING:  # not in a torch that is built without torch.distributed
    from torch._C._distributed_c10d import Store

PATIENCE = timedelta(seconds=50)
"""How long a collective waits for another worker. A worker that dies closes its connections and is
noticed at once; this is for one that hangs, or whose machine is gone."""

_FAILED = "failed"

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""


@dataclass(frozen=True)
class Workers:
    """This process's place among the workers of a run. Made by `join`, or alone by `Workers()`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        rank, size = whole_number("rank", self.rank, 0), whole_number("size", self.size, 1)
        if rank >= size:
            raise ConfigError(f"rank={rank}: with size={size} it is below {size}")
        instance("device", self.device, torch.device)

    @classmethod
    def join(cls, device: str = "cpu") -> "Workers":
        """Meets the other workers where torchrun started this process; otherwise it is alone.

        device: "cpu" (gloo), or "cuda" (NCCL, with gloo for what is on the CPU), of which each
        worker of a machine takes its own. No worker may keep others waiting longer than PATIENCE.
        ConfigError where the environment is half set or names a GPU that is not there; WorkerError
        where the others cannot be met.
        """
        instance("device", device, str)
        given = [name for name in VARIABLES if name in os.environ]
        if not {"RANK", "WORLD_SIZE"} & set(given):
            return cls(device=torch.device(device))
        if missing := [name for name in VARIABLES if name not in given]:
            raise ConfigError(
                f"{given[0]} is set and {missing[0]} is not: torchrun sets {', '.join(VARIABLES)}"
            )
        rank, size, local = (_whole(name) for name in VARIABLES[:3])
        if not rank < size:
            raise ConfigError(f"RANK={rank}: with WORLD_SIZE={size} it is below {size}")
        place = torch.device(device)
        if place.type == "cuda":
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"LOCAL_RANK={local}: this machine has {torch.cuda.device_count()} GPUs, and "
                    "each worker takes one"
                )
            place = torch.device("cuda", local)
            torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        workers = cls(rank, size, place)
        with workers.guard("meeting the other workers"):
            dist.init_process_group(backend, timeout=PATIENCE)
        return workers

    @property
    def main(self) -> bool:
        """True for the one worker that writes what is written once."""
        return self.rank == 0

    @property
    def store(self) -> "Store":
        """Where the workers met: for small notes that need no collective."""
        return dist.distributed_c10d._get_default_store()

    @contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """Inside, main is alone until it has left; the others wait for it as long as it takes.

        Where it fails, main raises, and the others end with exit status 2 and no word.
        """
        note = f"engram_lm/done/{what}"
        with self.guard(f"waiting for {what}"):
            while not self.main and not self.store.check([note]):
                time.sleep(0.05)
            if not self.main and self.store.get(note) == _FAILED.encode():
                raise SystemExit(2)  # main has said why
        outcome = _FAILED
        try:
            yield
            outcome = ""
        finally:
            if self.main and self.size > 1:
                self.store.set(note, outcome)

    def share(self, total: int) -> range:
        """This worker's part of `total` things: contiguous, sizes differing by 1 at most.

        Empty for the last workers where there are fewer things than workers.
        """
        size, larger = divmod(total, self.size)
        first = self.rank * size + min(self.rank, larger)
        return range(first, first + size + (self.rank < larger))

    def grid(self, shards: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """(group, replicas) for `shard_tables`: `shards` neighbours hold a table together.

        1: every worker holds all rows. `size`: each row is held once. Every worker must call it.
        """
        if shards < 1 or self.size % shards:
            raise ConfigError(f"shards={shards}: a divisor of the number of workers, {self.size}")
        if self.size == 1:
            return None, None
        first = self.rank - self.rank % shards
        group = dist.new_group(
            list(range(first, first + shards)), PATIENCE, use_local_synchronization=True
        )
        replicas = dist.new_group(
            list(range(self.rank % shards, self.size, shards)),
            PATIENCE,
            use_local_synchronization=True,
        )
        return group, replicas

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all workers, the same bits on each; `values` stay as they are."""
        total = values.detach().clone()
        if self.size > 1:
            with self.guard("a sum over all workers"):
                dist.all_reduce(total)
        return total

    def close(self) -> None:
        """Leaves the others."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Inside, a collective that fails (DDP's and fully_shard's too) raises WorkerError."""
        try:
            yield
        except RuntimeError as error:
            found = lost(error, self.rank, self.size, doing)
            if found is error:
                raise
            raise found from error


def lost(error: RuntimeError, rank: int, size: int, doing: str) -> RuntimeError | WorkerError:
    """What a failed collective means, in one line; any other error is given back as it is."""
    said = str(error).strip()
    collective = isinstance(error, dist.DistError) or "gloo/" in said or "ProcessGroup" in said
    if not collective:
        return error
    line = said.splitlines()[0].rpartition("] ")[2].split(". ")[0] if said else type(error).__name__
    return WorkerError(
        f"worker {rank} of {size}: another worker died or does not answer ({doing}: {line[:200]})"
    )


def _whole(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r}: a whole number, as torchrun sets it")
    return int(text)
