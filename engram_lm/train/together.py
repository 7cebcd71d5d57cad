"""Work on files that all workers do at once: it may take long, and it fails on all or on none."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from engram_lm.errors import DataError, EngramError, WorkerError
from engram_lm.train.workers import lost

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""Workers have different amounts to write, on disks of different speed. One that dies is noticed at
once all the same: its connections close."""


class Together:
    """The workers of a run, or one alone. All of them make it, and call `do` equally often."""

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(timeout=PATIENCE, backend="gloo")

    @property
    def main(self) -> bool:
        """True for the one worker that writes what is written once."""
        return self.rank == 0

    def do(self, path: Path, function: Callable[[], T]) -> T:
        """What the function returns here, when it has returned everywhere.

        Where it fails on one worker, all raise: an EngramError as it is, an OSError as DataError
        that names the path.
        """
        result: T | None = None
        failure: Exception | None = None
        told: EngramError | None = None
        try:
            result = function()
        except EngramError as error:
            failure = told = error
        except OSError as error:
            failure = told = DataError(f"{error.filename or path}: {reason(error)}")
        except Exception as error:
            failure, told = error, WorkerError(f"worker {self.rank} failed: {reason(error)}")
        if self.group is not None:
            everyone: list[EngramError | None] = [None] * self.size
            try:
                dist.all_gather_object(everyone, told, group=self.group)
            except RuntimeError as error:
                raise lost(error, self.rank, self.size, str(path)) from error
            failure = failure or next((each for each in everyone if each is not None), None)
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def tell(self, value: T) -> T:
        """The first worker's value, on all of them: what one has looked up, all act on."""
        if self.group is None:
            return value
        told = [value]
        try:
            dist.broadcast_object_list(told, group_src=0, group=self.group)
        except RuntimeError as error:
            raise lost(error, self.rank, self.size, "the first worker's answer") from error
        return told[0]


def reason(error: BaseException) -> str:
    """Why, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
