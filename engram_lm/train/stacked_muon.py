"""torch's Muon for matrices that are stored stacked, as experts are."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import (
    DEFAULT_A,
    DEFAULT_B,
    DEFAULT_C,
    _adjust_lr,
    _zeropower_via_newtonschulz,
)

from engram_lm.train.parallel import local

COEFFICIENTS = (DEFAULT_A, DEFAULT_B, DEFAULT_C)


class StackedMuon(torch.optim.Optimizer):
    """torch.optim.Muon on every matrix of a stack (E, out, in), as if each were a parameter.

    torch.optim.Muon takes 2-D parameters only. Splitting the stack would change checkpoint keys, so
    the stack stays and torch's own orthogonalisation is mapped over it: one batched product instead
    of E small ones. Momentum is Nesterov's, and the step is scaled to match AdamW's, so that one
    learning rate serves all. Gate and up projections are stored, and orthogonalised, as one matrix.
    """

    def __init__(
        self,
        stacks: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(stacks, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every stack that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for stack in group["params"]:
                if stack.grad is None:
                    continue
                state = self.state[stack]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(stack)
                # fully_shard cuts a stack between its matrices: each worker moves its own.
                own, gradient, average = local([stack, stack.grad, state["momentum_buffer"]])
                if len(own):
                    _update(own, gradient, average, group)
        return loss


def _update(stack: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]) -> None:
    average.lerp_(gradient, 1 - group["momentum"])
    update = gradient.lerp(average, group["momentum"])
    update = torch.vmap(lambda matrix: _zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7))(
        update
    )
    stack.mul_(1 - group["lr"] * group["weight_decay"])
    step = _adjust_lr(group["lr"], "match_rms_adamw", stack.shape[1:])
    stack.add_(update, alpha=-step)
