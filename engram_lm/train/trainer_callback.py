"""What `transformers.Trainer` does not do by itself for a model with experts and tables."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from engram_lm.errors import ConfigError
from engram_lm.train.balance import Balancer


class EngramCallback(TrainerCallback):
    """Balances the router after each step, and refuses what would treat rows wrongly.

    balance_rate: how far a routing bias moves per step; the bias is saved with the model.
    ConfigError at the start of training for max_grad_norm above 0, which clips all gradients but
    those of rows (JointOptimizer's clip is for both), and for fp16, whose scaler does not see them.
    """

    def __init__(self, balance_rate: float = 1e-3) -> None:
        self.balance_rate = balance_rate
        self.balancer: Balancer | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Starts counting what routers choose."""
        if args.max_grad_norm > 0:
            raise ConfigError(
                f"max_grad_norm={args.max_grad_norm}: it does not see the gradients of rows; set 0 "
                "and give JointOptimizer the limit, as clip"
            )
        if args.fp16:
            raise ConfigError("fp16=True: its scaler does not see the gradients of rows; set bf16")
        assert model is not None
        self.balancer = Balancer(model, self.balance_rate)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the routing biases."""
        assert self.balancer is not None
        self.balancer.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops counting."""
        if self.balancer is not None:
            self.balancer.close()
            self.balancer = None
