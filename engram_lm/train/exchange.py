"""Messages between the workers of a group, sent by a thread while the model goes on computing.

Shapes: W workers, N along the first dimension.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engram_lm.train.workers import PATIENCE, lost

T = TypeVar("T")

_BLOCK = 2**26
"""Bytes of rows sent at once."""


class Answer(Generic[T]):
    """What a job will give."""

    def __init__(self, future: "Future[T]") -> None:
        self._future = future

    def wait(self) -> T:
        """The job's result, or its error: WorkerError where another worker is lost."""
        return self._future.result()


class Exchange:
    """The workers of one group, and the jobs that they do together, in the order of `submit`.

    Every worker submits the same jobs in the same order, from its main thread. They run on one
    thread, over connections of its own, so that their order against the collectives of DDP and
    fully_shard is free. After an error every further job gives that error.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        ranks = dist.get_process_group_ranks(group)
        self.rank, self.size, self.device = dist.get_rank(group), len(ranks), device
        self._group = dist.new_group(ranks, PATIENCE, use_local_synchronization=True)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any], Any]] = SimpleQueue()
        self._error: BaseException | None = None
        # A daemon: a worker that gives up must not wait for a message that never comes.
        threading.Thread(target=self._work, name="engram-exchange", daemon=True).start()

    def submit(self, job: Callable[[], T]) -> Answer[T]:
        """Has the job done after those before it; returns at once."""
        future: Future[T] = Future()
        event = None if self._stream is None else torch.cuda.current_stream().record_event()
        self._jobs.put((job, future, event))
        return Answer(future)

    def mine(self, values: Tensor) -> Tensor:
        """A job's tensor, safe to use and to free on the caller's stream."""
        if self._stream is not None:
            values.record_stream(torch.cuda.current_stream())
        return values

    def counts(self, outgoing: list[int]) -> list[int]:
        """A number to each worker, and one from each. Inside a job only."""
        sent_W = torch.tensor(outgoing, dtype=torch.int64, device=self.device)
        received_W = torch.empty_like(sent_W)
        _finish(dist.all_to_all_single(received_W, sent_W, group=self._group, async_op=True))
        result: list[int] = received_W.tolist()
        return result

    def all_to_all(self, values: Tensor, outgoing: list[int], incoming: list[int]) -> Tensor:
        """(sum(outgoing), ...) -> (sum(incoming), ...), by rank. Inside a job only."""
        received = values.new_empty(sum(incoming), *values.shape[1:])
        _finish(
            dist.all_to_all_single(
                _bytes(received), _bytes(values), incoming, outgoing, self._group, async_op=True
            )
        )
        return received

    def sum(self, values: Tensor) -> Tensor:
        """Over all workers, the same bits on each. Inside a job only."""
        total = values.clone()
        _finish(dist.all_reduce(total, group=self._group, async_op=True))
        return total

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """Every worker's (N, ...), N of its own for each. Inside a job only."""
        sizes_W = self.counts([len(values)] * self.size)
        # all_gather wants equal sizes, so the largest decides what is sent.
        padded = values.new_zeros(max(sizes_W), *values.shape[1:])
        padded[: len(values)] = values
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        parts = [_bytes(part) for part in everyone]
        _finish(dist.all_gather(parts, _bytes(padded), self._group, async_op=True))
        return [part[:size] for part, size in zip(everyone, sizes_W, strict=True)]

    def spread(self, values_NE: Tensor) -> None:
        """Overwrites everyone's rows with those of the first worker of the group."""

        def send() -> None:
            for block_NE in values_NE.split(max(1, _BLOCK // max(1, values_NE[:1].nbytes))):
                _finish(
                    dist.broadcast(_bytes(block_NE), group=self._group, group_src=0, async_op=True)
                )

        self.submit(send).wait()

    def _work(self) -> None:
        while True:
            self._answer(*self._jobs.get())

    def _answer(self, job: Callable[[], Any], future: "Future[Any]", event: Any) -> None:
        try:
            if self._error is None:
                future.set_result(self._do(job, event))
                return
        except RuntimeError as error:
            self._error = lost(error, self.rank, self.size, "rows of a sharded table")
        except BaseException as error:
            self._error = error
        future.set_exception(self._error)

    @torch.no_grad()
    def _do(self, job: Callable[[], Any], event: Any) -> Any:
        if self._stream is None:
            return job()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(event)
            result = job()
            # This thread alone waits: what the job read may then be freed, what it made be read.
            self._stream.synchronize()
        return result


def _finish(work: Any) -> None:
    # Asked, not waited for: a thread inside wait() while the interpreter ends would abort it, and
    # a worker that gives up ends while others' messages are outstanding.
    pause = 50e-6
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)  # the longer it has taken, the less a millisecond matters
    work.wait()  # raises what went wrong


def _bytes(values: Tensor) -> Tensor:
    # Every backend sends bytes, whatever the dtype.
    return values.unsqueeze(-1).view(torch.uint8)
