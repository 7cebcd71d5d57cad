"""Continuous batching: which tokens of which requests a step computes. Bookkeeping only, no time.

As vLLM schedules: requests that run go first, each with one token or the next chunk of its prompt;
then waiting ones join in the order of their arrival, while tokens and places are left.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(kw_only=True, eq=False)
class Request:
    """One prompt and its continuation. `first`: the position of its first token in the trace."""

    arrival: float
    first: int
    prompt: int
    output: int
    """Tokens sampled; the last of them is never computed with."""
    computed: int = 0
    """Tokens that steps have computed."""
    tokens: list[float] = field(default_factory=list)
    """When each token was sampled."""

    @property
    def prompting(self) -> bool:
        return self.computed < self.prompt

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.output


class Share(NamedTuple):
    """What a step computes of one request: so many tokens from a position of the trace on."""

    request: Request
    first: int
    tokens: int
    prompting: bool


class Batcher:
    """Requests in the order of their arrival, at most `sequences` of them at once.

    step_tokens: that one step computes, at most. loop: None, or how many requests are under way in
    a closed loop: the next arrives when one is done, whatever its arrival says.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        step_tokens: int,
        sequences: int,
        loop: int | None = None,
    ) -> None:
        self.step_tokens, self.sequences, self.loop = step_tokens, sequences, loop
        self._coming = deque(requests)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        if loop is not None:
            self._let_in(loop, 0.0)

    @property
    def finished(self) -> bool:
        return not (self._coming or self.waiting or self.running)

    def next_arrival(self) -> float:
        return self._coming[0].arrival

    def shares(self, now: float) -> list[Share]:
        """The next step; empty where nobody is there yet."""
        while self.loop is None and self._coming and self._coming[0].arrival <= now:
            self.waiting.append(self._coming.popleft())
        left, found = self.step_tokens, list[Share]()
        for request in self.running:
            left -= self._share(request, left, found)
        while left and self.waiting and len(self.running) < self.sequences:
            self.running.append(self.waiting.popleft())
            left -= self._share(self.running[-1], left, found)
        return found

    def computed(self, shares: Sequence[Share], now: float) -> None:
        """A step is over: whoever has all of its prompt computed has one more token."""
        over = 0
        for request, _, tokens, _ in shares:
            request.computed += tokens
            if not request.prompting:
                request.tokens.append(now)
                over += request.done
        if over:
            self.running = [request for request in self.running if not request.done]
            if self.loop is not None:
                self._let_in(over, now)

    def _share(self, request: Request, left: int, found: list[Share]) -> int:
        """Tokens that it takes of those left."""
        prompting = request.prompting
        tokens = min(left, request.prompt - request.computed) if prompting else min(left, 1)
        if tokens:
            found.append(Share(request, request.first + request.computed, tokens, prompting))
        return tokens

    def _let_in(self, count: int, now: float) -> None:
        for _ in range(min(count, len(self._coming))):
            request = self._coming.popleft()
            request.arrival = now
            self.waiting.append(request)
