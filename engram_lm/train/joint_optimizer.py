"""All updates of a model as one torch optimiser, for training loops that are not ours.

`transformers.Trainer` and accelerate step one optimiser, schedule its `param_groups`, and save its
`state_dict`. They clip by `.grad`, where rows have none, and clear gradients through the model,
which does not reach rows either: so both are done here, inside `step`.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engram_lm.errors import ConfigError, UntrainedRowsWarning, number
from engram_lm.memory import untaken
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.table import Table
from engram_lm.precision import choose
from engram_lm.train.optimizers import Optimizers, groups
from engram_lm.train.row_optimizer import UNSCALED


def param_groups(
    model: nn.Module, *, lr: float, table_lr_multiplier: float = 5.0, weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """Every trainable parameter once, as torch's optimisers take them: params, lr, weight_decay.

    name: matrices (out, in) and stacks (experts, out, in), meant for Muon; others (embeddings,
    router, norms, biases, convolution), meant for Adam; tables, meant for RowAdam. A table's
    gradient is not in `.grad`: an optimiser that does not read `row_gradient` leaves its rows.
    """
    _check(model, lr, table_lr_multiplier, weight_decay)
    found = groups(model)
    sorted_by_update = {
        "matrices": (found.matrices, lr, weight_decay),
        "stacks": (found.stacks, lr, weight_decay),
        "others": (found.others, lr, 0.0),
        "tables": ([table.weight for table in found.tables], lr * table_lr_multiplier, 0.0),
    }
    return [
        {"name": name, "params": params, "lr": rate, "weight_decay": decay}
        for name, (params, rate, decay) in sorted_by_update.items()
        if params
    ]


def _check(model: nn.Module, lr: float, table_lr_multiplier: float, weight_decay: float) -> None:
    """ConfigError for what is no model, or no rate."""
    if not callable(getattr(model, "get_output_embeddings", None)):
        raise ConfigError(f"model={type(model).__name__}: a model of transformers is needed")
    rates = {"lr": lr, "table_lr_multiplier": table_lr_multiplier, "weight_decay": weight_decay}
    for name, rate in rates.items():
        number(name, rate, least=0)


def _muon_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What `precision` comes to; all workers must take the same, or their weights drift apart."""
    dtype = choose(precision, device).dtype
    if precision == "auto" and dist.is_available() and dist.is_initialized():
        half = torch.tensor(int(dtype == torch.bfloat16), device=device)
        dist.all_reduce(half, op=dist.ReduceOp.MIN)
        return torch.bfloat16 if half.item() else torch.float32
    return dtype


class JointOptimizer(torch.optim.Optimizer):
    """Muon, Adam and row Adam as one; `step` first clips the joint norm of all gradients, rows too.

    clip: that norm's limit, None for no limit. precision: of Muon's products, "bf16", "fp32" or
    "auto", which is bf16 where the devices of all workers multiply it in hardware; it is kept in
    the state. `norm`: what the last step found, a scalar; `taken`: False where it was not finite,
    and nothing moved.
    Schedulers scale each group's own learning rate. Row gradients are used up by `step`.
    UntrainedRowsWarning for a model whose memory is all frozen, as get_peft_model leaves it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        table_lr_multiplier: float = 5.0,
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
        precision: str = "auto",
    ) -> None:
        if clip is not None and not number("clip", clip) > 0:
            raise ConfigError(f"clip={clip}: above 0, or None for no limit")
        _check(model, lr, table_lr_multiplier, weight_decay)
        memory = [part for part in model.modules() if isinstance(part, Table | Fuse)]
        trained = (p.requires_grad for part in memory for p in part.parameters())
        if memory and not any(trained):
            warnings.warn(
                f"{type(model).__name__}: all of its memory is frozen, as get_peft_model leaves "
                "it, and will stay as it is; where that is not meant, give its parameters "
                "requires_grad_(True) before JointOptimizer is made",
                UntrainedRowsWarning,
                stacklevel=2,
            )
        self.optimizers = Optimizers(
            model,
            lr=lr,
            table_lr_multiplier=table_lr_multiplier,
            weight_decay=weight_decay,
            muon_dtype=_muon_dtype(precision, next(model.parameters()).device),
        )
        self.clip = float("inf") if clip is None else clip
        self.norm: Tensor | None = None
        self.taken = True
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        # The very dictionaries that the optimisers read: a scheduler writes into them.
        return [group for each in self.optimizers.each.values() for group in each.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips, moves everything that has a gradient, and drops the row gradients.

        ConfigError where somebody has clipped or unscaled the gradients in `.grad` before, which
        does not reach those of rows.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(untaken.changed(table) for table in self.optimizers.groups.tables):
            raise ConfigError(
                "JointOptimizer: the memory's gradients in .grad were clipped or unscaled after "
                "the backward pass, those of its rows were not; leave clipping to clip=, and "
                "use bfloat16 instead of a GradScaler"
            )
        self.norm = self.optimizers.clip(self.clip)
        self.taken = self.optimizers.step()
        for table in self.optimizers.groups.tables:
            table.row_gradient = None
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        raise ConfigError(UNSCALED)  # GradScaler looks here before it steps an optimiser

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, those of rows too."""
        super().zero_grad(set_to_none)
        for table in self.optimizers.groups.tables:
            untaken.cleared(table)
            table.row_gradient = None

    def state_dict(self) -> dict[str, Any]:
        """Of each optimiser by its name: muon, stacked_muon, adam, row_adam."""
        return self.optimizers.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.optimizers.load_state_dict(state_dict)
        self.param_groups = self._groups()
