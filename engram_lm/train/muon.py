"""Muon for matrices, alone or stacked as experts are, in a precision of one's choice.

torch.optim.Muon orthogonalises in bfloat16 whatever it is given, and takes 2-D parameters only. On
a CPU without bfloat16 products that is four fifths of a step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _adjust_lr

from engram_lm.errors import ConfigError
from engram_lm.train.parallel import local


def orthogonalised(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Each matrix (..., out, in) with all singular values moved near 1, by five Newton-Schulz
    steps computed in `dtype`; the result has that dtype.

    Coefficients and order of operations are those of torch.optim.Muon: in bfloat16 a 2-D tensor
    comes out with torch's own bits. A 3-D tensor is one batched product instead of many small ones.
    """
    update = matrices.to(dtype)
    tall = update.shape[-2] > update.shape[-1]
    if tall:
        update = update.mT
    alone = update.ndim == 2
    multiply_add: Callable[..., Tensor] = torch.addmm if alone else torch.baddbmm
    norm = update.norm() if alone else update.flatten(1).norm(dim=1)[:, None, None]
    update = update / norm.clamp(min=EPS)  # the largest singular value is at most the norm
    for _ in range(DEFAULT_NS_STEPS):
        gram = update @ update.mT
        gram = multiply_add(gram, gram, gram, beta=DEFAULT_B, alpha=DEFAULT_C)
        update = multiply_add(update, gram, update, beta=DEFAULT_A)
    return update.mT if tall else update


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, for parameters (out, in) and stacks (E, out, in) of which every matrix is
    updated as if it were a parameter.

    Nesterov momentum; the step is scaled to match AdamW's, so that one learning rate serves both.
    dtype: of the orthogonalisation. Experts stay stacked because checkpoint keys would change
    otherwise; their gate and up projections are stored, and orthogonalised, as one matrix.
    Raises ConfigError for parameters of another rank.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "dtype": dtype}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ConfigError(
                        f"a parameter of shape {tuple(parameter.shape)}: Muon takes matrices "
                        "(out, in) and stacks of them"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                own, gradient, average = parameter, parameter.grad, state["momentum_buffer"]
                if parameter.ndim == 3:
                    # fully_shard cuts a stack between its matrices: each worker moves its own.
                    own, gradient, average = local([own, gradient, average])
                if len(own):
                    self._update(own, gradient, average, group)
        return loss

    def _update(
        self, own: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]
    ) -> None:
        average.lerp_(gradient, 1 - group["momentum"])
        # States of torch's own Muon, and of ours before it had a choice, name no dtype.
        dtype = group.get("dtype", torch.bfloat16)
        update = orthogonalised(gradient.lerp(average, group["momentum"]), dtype)
        own.mul_(1 - group["lr"] * group["weight_decay"])
        step = _adjust_lr(group["lr"], "match_rms_adamw", own.shape[-2:])
        own.add_(update, alpha=-step)
