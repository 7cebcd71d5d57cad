"""Which parameter gets which update: Muon, Adam, or a row optimiser; the norm of all their
gradients, and what happens when it is not finite.

Section 4.1 of arXiv 2601.07372: Muon for matrices, Adam for the rest, tables Adam at 5 times the
learning rate without weight decay.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from engram_lm.errors import ConfigError
from engram_lm.memory.table import Table
from engram_lm.train.muon import Muon
from engram_lm.train.parallel import local, whole_norms
from engram_lm.train.row_adam import RowAdam
from engram_lm.train.row_optimizer import RowOptimizer
from engram_lm.train.rowwise_rmsprop import RowwiseRMSprop

BETAS = (0.9, 0.95)
SKIPS_IN_A_ROW = 10
"""Steps without a finite gradient norm, one after another, after which training stops."""


class Groups(NamedTuple):
    """Every trainable parameter of a model, once."""

    matrices: list[nn.Parameter]
    """(out, in), for Muon."""
    stacks: list[nn.Parameter]
    """Experts, (E, out, in), for Muon one by one."""
    others: list[nn.Parameter]
    """Embedding, head, router, mHC, norms, biases and conv, for Adam."""
    tables: list[Table]
    """Rows, for a row optimiser. Frozen ones are in no group."""


def groups(model: nn.Module) -> Groups:
    """Sorts a model's parameters by the kind of update they get."""
    result = Groups([], [], [], [])
    head = model.get_output_embeddings()  # type: ignore[operator]
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, Table):
            if module.weight.requires_grad:
                result.tables.append(module)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            if isinstance(module, DeepseekV3Experts):
                result.stacks.append(parameter)
            elif isinstance(module, nn.Linear) and name == "weight" and module is not head:
                result.matrices.append(parameter)
            else:
                result.others.append(parameter)
    return result


class Optimizers:
    """The four of them as one. Learning rates are `factor` times what they were made with.

    table_optimizer: "adam" or "rowwise" (RowwiseRMSprop). seed: of the rounding of bfloat16 rows.
    muon_dtype: of Muon's products.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        table_lr_multiplier: float,
        weight_decay: float,
        table_optimizer: str = "adam",
        seed: int = 0,
        muon_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.groups, self._lr = groups(model), lr
        self.table_names = {
            module: f"table_{name.rpartition('.')[2]}"  # the last part is its layer
            for name, module in model.named_modules()
            if isinstance(module, Table)
        }
        self.gradient_norms: dict[str, Tensor] = {}
        self.rows: RowOptimizer | None = None
        """The row optimiser, where there is a table to train."""
        self.skipped = 0
        """Steps that were not taken, of all so far."""
        self.skipped_in_a_row = 0
        self._norm: Tensor | None = None
        each: dict[str, torch.optim.Optimizer] = {}
        if self.groups.matrices:
            each["muon"] = Muon(self.groups.matrices, lr, weight_decay, dtype=muon_dtype)
        if self.groups.stacks:
            each["stacked_muon"] = Muon(self.groups.stacks, lr, weight_decay, dtype=muon_dtype)
        if self.groups.others:
            each["adam"] = torch.optim.Adam(self.groups.others, lr, betas=BETAS, fused=True)
        if self.groups.tables:
            tables, table_lr = self.groups.tables, lr * table_lr_multiplier
            if table_optimizer == "rowwise":
                self.rows = RowwiseRMSprop(tables, table_lr, BETAS[1], seed=seed)
                each["rowwise_rmsprop"] = self.rows
            else:
                self.rows = _row_adam()(tables, table_lr, BETAS, seed=seed)
                each["row_adam"] = self.rows
        self.each = each
        self._base = {name: optimizer.param_groups[0]["lr"] for name, optimizer in each.items()}

    def set_factor(self, factor: float) -> None:
        """Scales every learning rate; the schedule calls it each step."""
        for name, optimizer in self.each.items():
            optimizer.param_groups[0]["lr"] = self._base[name] * factor

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scales all gradients, rows too, to a joint norm of at most max_norm; returns the norm.

        `gradient_norms` has the norms before scaling, by group and by table.
        """
        gradients = self._gradients()
        norm = self._norm = self._take_norms(gradients)
        flat = local([gradient for each in gradients.values() for gradient in each])
        torch._foreach_mul_(flat, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _take_norms(self, gradients: dict[str, list[Tensor]]) -> Tensor:
        tables = {name: table for table, name in self.table_names.items()}
        norms = {
            name: [tables[name].gradient_norm()] if name in tables else whole_norms(each)
            for name, each in gradients.items()
            if each
        }
        norm = torch.linalg.vector_norm(torch.stack([n for each in norms.values() for n in each]))
        self.gradient_norms = {
            name: torch.linalg.vector_norm(torch.stack(each)) for name, each in norms.items()
        }
        return norm

    def _gradients(self) -> dict[str, list[Tensor]]:
        dense = {
            name: [parameter.grad for parameter in parameters if parameter.grad is not None]
            for name, parameters in zip(self.groups._fields[:3], self.groups[:3], strict=True)
        }
        rows = {
            self.table_names[table]: [table.row_gradient.values_UE]
            for table in self.groups.tables
            if table.row_gradient is not None
        }
        return dense | rows

    def step(self) -> bool:
        """One step of each; whether it was taken. Where the norm that `clip` found (before it, one
        is taken here) is not finite, nothing changes: no weight, no moment, no count of steps.

        ConfigError after SKIPS_IN_A_ROW of those.
        """
        norm = self._take_norms(self._gradients()) if self._norm is None else self._norm
        self._norm = None
        if not torch.isfinite(norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
                raise ConfigError(
                    f"lr={self._lr:g}: the norm of the gradients was {norm.item()} in "
                    f"{SKIPS_IN_A_ROW} steps in a row; a smaller lr, or a checkpoint from before, "
                    "is needed"
                )
            return False
        self.skipped_in_a_row = 0
        for optimizer in self.each.values():
            optimizer.step()
        return True

    def zero_grad(self) -> None:
        for optimizer in self.each.values():
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        each = {name: optimizer.state_dict() for name, optimizer in self.each.items()}
        return {**each, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.each.items():
            optimizer.load_state_dict(state[name])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


def _row_adam() -> type[RowAdam]:
    """The compiled one, equal bit for bit, where numba is installed."""
    if find_spec("numba") is None:
        return RowAdam
    from engram_lm.train.row_adam_numba import CompiledRowAdam

    return CompiledRowAdam
