"""Serving simulated step by step: hits of each tier, waits of each layer, tokens a second.

Nothing is read and nothing computed but row numbers. Rows are those of a trace, and what is merged
in a step and found in a tier is counted row by row; only time is a model (`step_time.py`).

Shapes: T positions of a step, G layers with a memory, K tiers, U distinct rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engram_lm.errors import ConfigError, DataError
from engram_lm.simulate.batching import Batcher, Request, Share
from engram_lm.simulate.compute_time import Backbone, Node
from engram_lm.simulate.outcome import Outcome
from engram_lm.simulate.row_trace import RowTrace
from engram_lm.simulate.step_time import StepTimes, step_times
from engram_lm.simulate.tier_stack import Tiers
from engram_lm.simulate.tiers import Tier

LOOK = 256
"""Positions of a waiting prompt that are looked ahead at together."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How requests are served. Raises ConfigError."""

    step_tokens: int = 8192
    """That a step computes, at most; prompts are cut into chunks that fit."""
    sequences: int = 256
    """Requests that are under way at once, at most."""
    ahead_bytes: int = 0
    """Of rows of waiting prompts that may be kept before their step; they are read when a tier has
    nothing else to do."""
    early: bool = True
    """Rows are asked for when a step starts; False: when their layer is reached."""

    def __post_init__(self) -> None:
        for name in ("step_tokens", "sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"serving.{name}={getattr(self, name)}: 1 or more")
        if self.ahead_bytes < 0:
            raise ConfigError(f"serving.ahead_bytes={self.ahead_bytes}: 0 or more")


@dataclass(kw_only=True)
class Simulation:
    """Requests on a node with tiers. `run` serves them all, once."""

    trace: RowTrace
    layers: tuple[int, ...]
    row_bytes: int
    tiers: Sequence[Tier]
    backbone: Backbone
    node: Node
    serving: Serving

    def __post_init__(self) -> None:
        self.places = Tiers(self.tiers, self.trace.rows, self.row_bytes)

    def warm(self, tokens: int) -> None:
        """Has the first positions of the trace asked for in no time: tiers are not empty then."""
        for first in range(0, tokens, self.serving.step_tokens):
            last = min(first + self.serving.step_tokens, tokens)
            for rows_U in self.places.distinct(self.trace.rows_GTH[:, first:last]):
                self.places.take(rows_U)

    def run(self, requests: Sequence[Request], *, loop: int | None = None) -> Outcome:
        """DataError where requests go beyond the trace."""
        last = max(request.first + request.prompt + request.output for request in requests)
        if last > len(self.trace):
            raise DataError(f"requests end at token {last} of a trace of {len(self.trace)}")
        batcher = Batcher(
            requests,
            step_tokens=self.serving.step_tokens,
            sequences=self.serving.sequences,
            loop=loop,
        )
        queues = self.places.queues
        found = Outcome(
            reads={queue.tier.name: 0 for queue in queues},
            waits={layer: [] for layer in self.layers},
        )
        ahead = dict.fromkeys(requests, 0)
        ahead_rows, now = 0, 0.0
        while not batcher.finished:
            shares = batcher.shares(now)
            if not shares:
                now = max(now, batcher.next_arrival())
                continue
            times, compute = self._step(now, shares, found)
            read = 0
            if self.serving.ahead_bytes:
                read = self._look_ahead(batcher, shares, ahead, now, times.end)
                ahead_rows += read
            # Rows read ahead take compute's cores as well.
            slowed = times.slowed + self.node.taken * read * queues[-1].tier.cpu
            now = times.end + slowed - times.slowed
            found.steps += 1
            found.compute += compute
            found.slowed += slowed
            for layer, wait in zip(self.layers, times.waits, strict=True):
                found.waits[layer].append(wait)
            batcher.computed(shares, now)
        found.seconds = now
        found.ahead_hits = self.places.ahead_hits
        for queue in queues:
            name = queue.tier.name
            reads = found.reads[name] + (ahead_rows if queue is queues[-1] else 0)
            found.bytes[name] = reads * queue.tier.moved(self.row_bytes)
            found.busy[name] = queue.busy / now
        for request in requests:
            found.first_token.append(request.tokens[0] - request.arrival)
            if request.output > 1:
                spread = request.tokens[-1] - request.tokens[0]
                found.next_token.append(spread / (request.output - 1))
        return found

    def _step(self, now: float, shares: Sequence[Share], found: Outcome) -> tuple[StepTimes, float]:
        positions_T = np.concatenate([np.arange(s.first, s.first + s.tokens) for s in shares])
        rows_GTH = self.trace.rows_GTH[:, positions_T]
        distinct = self.places.distinct(rows_GTH)
        rows_GK = [self.places.take(rows_U) for rows_U in distinct]
        found.asked += rows_GTH.size
        found.distinct += sum(map(len, distinct))
        for rows_K in rows_GK:
            for queue, rows in zip(self.places.queues, rows_K, strict=True):
                found.reads[queue.tier.name] += rows
        prompt = sum(share.tokens for share in shares if share.prompting)
        decode = len(positions_T) - prompt
        ending = sum(s.request.computed + s.tokens >= s.request.prompt for s in shares)
        found.prompt_tokens += prompt
        found.output_tokens += decode
        compute = self.node.compute(self.backbone, self.layers, prompt, decode, ending)
        times = step_times(
            now,
            compute,
            rows_GK,
            self.places.queues,
            early=self.serving.early,
            taken=self.node.taken,
        )
        return times, sum(compute)

    def _look_ahead(
        self,
        batcher: Batcher,
        shares: Sequence[Share],
        ahead: dict[Request, int],
        since: float,
        until: float,
    ) -> int:
        """Rows read, of prompts in the order in which they will be computed."""
        room, total = self.serving.ahead_bytes // self.row_bytes, 0
        reached = {share.request: share.request.computed + share.tokens for share in shares}
        for request in (*batcher.running, *batcher.waiting):
            while True:
                first = max(ahead[request], reached.get(request, request.computed))
                last = min(first + LOOK, request.prompt)
                if first >= last:
                    break
                begin = request.first
                rows_GTH = self.trace.rows_GTH[:, begin + first : begin + last]
                rows_U = np.concatenate(self.places.distinct(rows_GTH))
                read, whole = self.places.look_ahead(rows_U, room, (since, until))
                total += read
                if not whole:
                    return total
                ahead[request] = last
        return total
