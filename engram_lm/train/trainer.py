"""`transformers.Trainer` that trains a memory with the rest, without anything to set up."""

import copy
import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from engram_lm.errors import ConfigError
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.table import Table
from engram_lm.model.pretrained import MemoryPreTrained
from engram_lm.train.joint_optimizer import JointOptimizer
from engram_lm.train.replicas import replicate_tables
from engram_lm.train.sharded_table import ShardedTable
from engram_lm.train.trainer_callback import EngramCallback

_logger = logging.get_logger("transformers.engram_lm")
"""Below transformers' own, so that its verbosity and handlers count here too."""
IGNORED = (
    *("optim", "optim_args", "optim_target_modules"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)
"""Settings of the optimiser that Trainer would have made."""


class EngramTrainerMixin:
    """Before a Trainer's class (`class T(EngramTrainerMixin, SFTTrainer)`): its optimiser is a
    JointOptimizer, which moves rows too, unless you give it another in `optimizers`.

    The optimiser is made when training begins, of what requires a gradient then, with the
    arguments' learning_rate and weight_decay; max_grad_norm is its joint clip, 0 for no limit, and
    `args` of the trainer, a copy, has 0 there, so that nothing is clipped twice. An EngramCallback
    is added where `callbacks` has none. Under torchrun the tables are replicated first.
    A memory that the constructor freezes, as SFTTrainer(peft_config=...) does, gets its gradients
    back; one that came frozen stays so.

    ConfigError for a model without memory, for one whose memory is all frozen, and for settings
    that would be ignored: optim, optim_args, adam_beta1 and others, optimizer_cls_and_kwargs.
    """

    model: Any
    args: Any
    optimizer: Any
    callback_handler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(super().__init__)
        given = signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if given.get("optimizer_cls_and_kwargs") is not None:
            raise ConfigError(
                "optimizer_cls_and_kwargs: EngramTrainer makes a JointOptimizer; hand an optimiser "
                "of your own over in optimizers=(optimizer, None)"
            )
        model = given.get("model")
        trained = _trained(model) if isinstance(model, nn.Module) else None
        super().__init__(*args, **kwargs)
        if trained is None and given.get("peft_config") is not None:  # a name: all of it trains
            trained = [p for part in _memory(self.model) for p in part.parameters()]
        for parameter in trained or ():
            parameter.requires_grad_(True)
        self._clip: float | None = None
        self._take_clip()
        callbacks = self.callback_handler.callbacks
        if not any(isinstance(each, EngramCallback) for each in callbacks):
            self.add_callback(EngramCallback())  # type: ignore[attr-defined]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser that was handed over, or a JointOptimizer."""
        model = self.model if model is None else model
        _check(model)
        if self.optimizer is None:
            self._check_settings()
            self._take_clip()  # a search over settings may have set it again
            if not any(isinstance(part, ShardedTable) for part in _memory(model)):
                replicate_tables(model)
            self.optimizer = JointOptimizer(
                model,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                clip=self._clip,
            )
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _take_clip(self) -> None:
        limit = self.args.max_grad_norm
        kept = getattr(self.optimizer, "clip", None)
        if limit <= 0 or (self.optimizer is not None and kept != limit):
            return
        self._clip = limit
        self.args = copy.copy(self.args)
        self.args.max_grad_norm = 0.0
        _logger.info(f"max_grad_norm={limit}: JointOptimizer clips, rows with the rest")

    def _check_settings(self) -> None:
        usual = {each.name: each.default for each in fields(self.args)}
        for name in IGNORED:
            value = getattr(self.args, name, None)
            if name in usual and value != usual[name]:
                shown = getattr(value, "value", value)
                raise ConfigError(
                    f"{name}={shown}: EngramTrainer makes a JointOptimizer (Muon, Adam, row Adam), "
                    "which has no such setting; leave it out, or hand an optimiser of your own "
                    "over in optimizers=(optimizer, None)"
                )


class EngramTrainer(EngramTrainerMixin, Trainer):
    """transformers.Trainer for a model with a memory: attach, construct, train().

    Arguments are those of Trainer; see EngramTrainerMixin for what differs.
    """


def _memory(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, Table | Fuse)]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for part in _memory(model) for p in part.parameters() if p.requires_grad]


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if not any(isinstance(part, MemoryPreTrained) for part in model.modules()):
        raise ConfigError(f"{name}: no memory to train; call engram_lm.attach on the model first")
    if _memory(model) and not _trained(model):
        hint = "" if isinstance(model, PreTrainedModel) else ", as get_peft_model does"
        raise ConfigError(
            f"{name}: the memory is frozen{hint}; give its parameters requires_grad_(True), or "
            "use Trainer to train the rest alone"
        )
