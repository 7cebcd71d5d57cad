"""What `transformers.Trainer` does not do by itself for a model with experts and tables."""

import warnings
from typing import Any

from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from engram_lm.errors import ConfigError, UntrainedRowsWarning, number
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.table import Table
from engram_lm.model.adapters import has_adapter
from engram_lm.train.balance import Balancer
from engram_lm.train.sharded_table import ShardedTable
from engram_lm.train.workers import Workers


class EngramCallback(TrainerCallback):
    """Balances the router after each step, and refuses what would treat rows wrongly.

    balance_rate: how far a routing bias moves per step; the bias is saved with the model.
    ConfigError at the start of training, and again before its first step, whatever was done to the
    model in between and in which order: for max_grad_norm above 0, which clips all gradients but
    those of rows (JointOptimizer's clip is for both); for fp16, whose scaler does not see them; for
    label smoothing, which takes the place of the model's own loss; for several workers without
    `replicate_tables`; for an optimiser that has not all of the memory, or of torch's own, which
    moves no row; for tables frozen after the optimiser was made, for rows that have no gradient at
    the first step, and for resuming with an adapter, which Trainer either brings back without
    memory (PEFT) or not at all (`add_adapter`).
    UntrainedRowsWarning for tables that are frozen, as get_peft_model freezes them.
    """

    def __init__(self, balance_rate: float = 1e-3) -> None:
        self.balance_rate = number("balance_rate", balance_rate, least=0)
        self.balancer: Balancer | None = None
        self._checked = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Starts counting what routers choose."""
        if args.max_grad_norm > 0:
            raise ConfigError(
                f"max_grad_norm={args.max_grad_norm}: it does not see the gradients of rows; set 0 "
                "and give JointOptimizer the limit, as clip"
            )
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} GPUs in one process: Trainer would copy the tables and drop their "
                "gradients; start a process for each GPU with torchrun"
            )
        if args.fp16:
            raise ConfigError("fp16=True: its scaler does not see the gradients of rows; set bf16")
        if args.label_smoothing_factor > 0:
            raise ConfigError(
                f"label_smoothing_factor={args.label_smoothing_factor}: Trainer's smoothing takes "
                "the place of the model's own loss, the balance of experts included; set 0"
            )
        if not isinstance(model, PreTrainedModel) and state.global_step > 0:
            raise ConfigError(
                f"step {state.global_step}: a checkpoint of PEFT holds the adapter and no memory; "
                "save both apart, and begin anew from them"
            )
        if has_adapter(model) and state.global_step > 0:
            raise ConfigError(
                f"step {state.global_step}: Trainer fills no adapter of add_adapter from a "
                "checkpoint; open the checkpoint's directory, and begin anew from it"
            )
        _check_tables(model, optimizer, args.world_size)
        _say_frozen(model)
        self._checked = False
        workers = Workers(args.process_index, args.world_size, model.device)
        self.balancer = Balancer(model, self.balance_rate, workers)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Looks again before the first step: what was attached, wrapped or frozen since counts."""
        if self._checked:
            return
        _check_tables(model, optimizer, args.world_size)
        for name, table in model.named_modules():
            trained = isinstance(table, Table) and table.weight.requires_grad
            if trained and not table.holds_gradient:
                raise ConfigError(
                    f"{name}: no gradient has reached its rows by the first step; the model that "
                    "is trained does not read them, or the optimiser is of another copy"
                )
        self._checked = True

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Moves the routing biases by the loads of all workers; not after a step that was skipped.

        accelerate wraps the optimiser.
        """
        assert self.balancer is not None
        inner = getattr(optimizer, "optimizer", optimizer)
        self.balancer.step(move=getattr(inner, "taken", True))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops counting."""
        if self.balancer is not None:
            self.balancer.close()
            self.balancer = None


def _say_frozen(model: nn.Module) -> None:
    tables = {n: each for n, each in model.named_modules() if isinstance(each, Table)}
    frozen = [name for name, table in tables.items() if not table.weight.requires_grad]
    if frozen:
        warnings.warn(
            f"{', '.join(frozen)}: frozen, so rows keep their values in this training; where that "
            "is not meant, as after get_peft_model, give requires_grad back and make the optimiser "
            "afterwards",
            UntrainedRowsWarning,
            stacklevel=2,
        )
    silent = [
        name
        for name, fuse in model.named_modules()
        if isinstance(fuse, Fuse)
        and not fuse.kv.weight.requires_grad
        and not bool(fuse.kv.weight[-fuse.width :].any())
    ]
    if silent:
        warnings.warn(
            f"{', '.join(silent)}: frozen, and its value projection is zero, so no gradient "
            "reaches its rows; train the fusion too",
            UntrainedRowsWarning,
            stacklevel=2,
        )


def _check_tables(model: nn.Module, optimizer: Any, workers: int) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    kind = type(getattr(optimizer, "optimizer", optimizer))
    for name, table in model.named_modules():
        if not isinstance(table, Table):
            continue
        if workers > 1 and not isinstance(table, ShardedTable):
            raise ConfigError(
                f"{name}: each of {workers} workers would train rows of its own; call "
                "replicate_tables(model) before the optimiser is made"
            )
        if not table.weight.requires_grad:
            if id(table.weight) in held:
                raise ConfigError(
                    f"{name}: in the optimiser, but frozen since, as get_peft_model does; give "
                    "requires_grad back, and make JointOptimizer afterwards"
                )
            continue
        if id(table.weight) not in held:
            raise ConfigError(
                f"{name}: not in the optimiser, so its rows would stay as they are; make "
                "JointOptimizer of this model, after replicate_tables, or freeze the table"
            )
        if kind.__module__.startswith("torch.optim"):
            raise ConfigError(
                f"{name}: {kind.__name__} does not see the gradients of rows, which would stay as "
                "they are; give Trainer optimizers=(JointOptimizer(model, ...), None)"
            )
    for name, fuse in model.named_modules():
        for part, parameter in fuse.named_parameters() if isinstance(fuse, Fuse) else ():
            if parameter.requires_grad and id(parameter) not in held:
                raise ConfigError(
                    f"{name}.{part}: not in the optimiser, so it would stay as it is; make "
                    "JointOptimizer of this model, or freeze it"
                )
