"""One step in time: rows are asked for when it starts, and each layer waits for what is missing.

Shapes: G layers with a memory, K tiers.
"""

from collections.abc import Sequence
from typing import NamedTuple

from engram_lm.simulate.tiers import Queue


class StepTimes(NamedTuple):
    """Seconds. `waits`: of each Engram layer; `slowed`: by which reading held compute up."""

    end: float
    waits: tuple[float, ...]
    slowed: float


class Busy(NamedTuple):
    """A stretch in which rows are gathered, and the speed that is left to compute."""

    begin: float
    end: float
    speed: float


def step_times(
    start: float,
    compute: Sequence[float],
    rows_GK: Sequence[Sequence[int]],
    queues: Sequence[Queue],
    *,
    early: bool = True,
    taken: float = 0.0,
) -> StepTimes:
    """When a step that starts at `start` ends.

    compute: seconds before each Engram layer, and after the last, G + 1 of them. rows_GK: what each
    layer reads of each tier. early: all layers ask at the start and one thread gathers them in
    turn; else each asks when it is reached. taken: seconds that compute loses for each CPU second
    of gathering: 0 where others gather, 1 / cores where all compute and threads share evenly.
    """
    assert len(compute) == len(rows_GK) + 1
    busy: list[Busy] = []
    there = [0.0] * len(rows_GK)
    thread = start
    if early:
        read_G = [_read(start, rows_K, queues) for rows_K in rows_GK]
        for layer, (rows_K, read) in enumerate(zip(rows_GK, read_G, strict=True)):
            cpu = _cpu(rows_K, queues)
            there[layer] = max(read, thread + cpu)
            if cpu and taken:
                speed = max(0.0, 1 - taken * cpu / (there[layer] - thread))
                busy.append(Busy(thread, there[layer], speed))
            thread = there[layer]
    now, waits = start, []
    for layer, rows_K in enumerate(rows_GK):
        now = _advance(now, compute[layer], busy)
        if not early:
            there[layer] = max(_read(now, rows_K, queues), now + _cpu(rows_K, queues))
        waits.append(max(0.0, there[layer] - now))
        now += waits[-1]
    end = _advance(now, compute[-1], busy)
    return StepTimes(end, tuple(waits), max(0.0, end - start - sum(waits) - sum(compute)))


def _read(asked: float, rows_K: Sequence[int], queues: Sequence[Queue]) -> float:
    return max(queue.read(asked, rows) for queue, rows in zip(queues, rows_K, strict=True))


def _cpu(rows_K: Sequence[int], queues: Sequence[Queue]) -> float:
    tiers = [(queue.tier, rows) for queue, rows in zip(queues, rows_K, strict=True) if rows]
    return sum(tier.request_cpu + tier.cpu * rows for tier, rows in tiers)


def _advance(now: float, work: float, busy: Sequence[Busy]) -> float:
    """When `work` seconds of compute are done, slower where rows are being gathered."""
    for begin, end, speed in busy:
        if end <= now:
            continue
        before = max(0.0, begin - now)
        if work <= before:
            break
        work -= before
        now = max(now, begin)
        done = (end - now) * speed
        if work <= done:
            return now + work / speed
        work -= done
        now = end
    return now + work
