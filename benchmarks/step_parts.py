"""Where the time of a training step goes: stopwatches around the calls that a step is made of.

They cost little, but not nothing, so that steps which are counted for speed run without them.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from engram_lm.memory.fuse import Fuse, Fused
from engram_lm.memory.lookup import Memory, Pending
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.table import Merged
from engram_lm.train.batches import Batches
from engram_lm.train.loop import Run
from engram_lm.train.objective import Objective

Milliseconds = dict[str, float]

CALLS: tuple[tuple[Any, str, str], ...] = (
    (Batches, "__getitem__", "batch"),
    (Objective, "forward", "forward"),
    (Memory, "start_window", "forward: start"),
    (Addresses, "window_rows", "forward: start: addressing"),
    (Merged, "of", "forward: start: merging"),
    (Pending, "wait", "forward: wait: gather and expand"),
    (Tensor, "backward", "backward"),
    (Merged, "sum", "backward: sum of repeats"),
)


class Stopwatch:
    """Time spent in named parts of one step; a part inside another counts for both."""

    def __init__(self) -> None:
        self.parts: Milliseconds = defaultdict(float)

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same call, its time added to `part`."""

        def run(*positional: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = call(*positional, **named)
            self._add(part, started)
            return result

        return run

    def fuse(self, forward: Callable[..., Fused]) -> Callable[..., Fused]:
        """Fuse.forward, timed, and its backward: from its update's gradient to its vectors'."""
        timed = self.timed(forward, "forward: fuse")

        def run(module: Fuse, hidden: Tensor, vectors: Tensor, *rest: Any) -> Fused:
            fused: Fused = timed(module, hidden, vectors, *rest)
            begun = 0.0

            def begin(gradient: Tensor) -> None:
                nonlocal begun
                begun = time.perf_counter()

            fused.update_BTSD.register_hook(begin)
            vectors.register_hook(lambda gradient: self._add("backward: fuse", begun))
            return fused

        return run

    def _add(self, part: str, started: float) -> None:
        self.parts[part] += 1e3 * (time.perf_counter() - started)


@contextmanager
def watched(run: Run) -> Iterator[Milliseconds]:
    """Inside, what the parts of a run's step take is added up; no other model may take one."""
    watch = Stopwatch()
    with ExitStack() as patches:
        for owner, name, part in CALLS:
            timed = watch.timed(getattr(owner, name), part)
            # A class method is bound already, and must not be bound to an object again.
            value = staticmethod(timed) if owner is Merged and name == "of" else timed
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(mock.patch.object(Fuse, "forward", watch.fuse(Fuse.forward)))
        objects: list[tuple[Any, str, str]] = [
            (run, "step", "step"),
            (run.optimizers, "clip", "clip"),
            (run.balancer, "step", "balancer"),
            *((each, "step", f"update: {name}") for name, each in run.optimizers.each.items()),
        ]
        for owner, name, part in objects:
            timed = watch.timed(getattr(owner, name), part)
            patches.enter_context(mock.patch.object(owner, name, timed))
        yield watch.parts
