"""The training loop of one model on one machine.

A Run is stepped by its caller, so that a study can take turns between two models and the drift of
the machine falls on both. Everything it leaves is in its directory: config.json, metrics.jsonl,
tensorboard/, checkpoint.pt and, at the end, model/.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import MismatchError
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.model.budget import ledger
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.train import checkpoint, telemetry
from engram_lm.train.balance import Balancer
from engram_lm.train.batches import Batches
from engram_lm.train.config import TrainConfig
from engram_lm.train.console import Display
from engram_lm.train.freeze import freeze
from engram_lm.train.journal import Journal
from engram_lm.train.objective import Objective
from engram_lm.train.optimizers import Optimizers
from engram_lm.train.provenance import command, commit, machine
from engram_lm.train.stopping import Stopping
from engram_lm.train.stream import Stream
from engram_lm.train.telemetry import Telemetry


class Run:
    """One model being trained. Goes on from the checkpoint in `out`, bit for bit, where there is
    one.

    training, validation: token streams, of whose documents the model is told where they start.
    """

    def __init__(
        self,
        model: EngramLMForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        config: TrainConfig,
        out: Path,
        *,
        training: Stream,
        validation: Stream,
    ) -> None:
        self.model, self.tokenizer, self.config, self.out = model, tokenizer, config, out
        self.validation = validation
        model.set_attn_implementation(config.attention)
        self.batches = Batches(
            training, batch=config.batch, context=config.context, seed=config.seed
        )
        self.autocast = torch.bfloat16 if config.precision == "bf16" else None
        self.objective = Objective(model)
        freeze(model, config.frozen)
        self.optimizers = Optimizers(
            model,
            lr=config.lr,
            table_lr_multiplier=config.table_lr_multiplier,
            weight_decay=config.weight_decay,
        )
        self.balancer = Balancer(model, config.balance_rate)
        self.telemetry = Telemetry(model)
        self.step_number = 0
        self.seconds = 0.0
        """Spent in steps, validation and saving left out."""
        out.mkdir(parents=True, exist_ok=True)
        self._resume(training)
        self.journal = Journal(out, self.step_number)
        self._describe()

    @property
    def done(self) -> bool:
        return self.step_number >= self.config.steps

    def step(self) -> dict[str, float]:
        """One optimiser step, and what is due after it; returns what it logged, loss in nats."""
        config, model = self.config, self.model
        started = time.perf_counter()
        model.train()
        loss = self._backward()
        factor = config.factor(self.step_number)
        self.optimizers.set_factor(factor)
        norm = self.optimizers.clip(config.clip)
        self.optimizers.step()
        self.optimizers.zero_grad()
        loads_LE = self.balancer.step()
        norms = self.optimizers.gradient_norms
        found = telemetry.read(
            {"loss": loss, "gradient_norm": norm, "loads": loads_LE}
            | {"gates": self.telemetry.take()}
            | {f"gradient_norm/{name}": value for name, value in norms.items()}
        )
        seconds = time.perf_counter() - started
        text_bytes = self.batches.text_bytes(self.step_number)
        self.step_number += 1
        self.seconds += seconds
        tokens = config.batch * config.context
        ((loss_nats,), loads, gates) = (found.pop(name) for name in ("loss", "loads", "gates"))
        record = {
            "step": self.step_number,
            "tokens": self.step_number * tokens,
            "loss": loss_nats,
            "bpb": loss_nats * tokens / math.log(2) / text_bytes,
            "lr": config.lr * factor,
            **{name: value for name, (value,) in found.items()},
            **telemetry.load_figures(self.balancer.routers, loads),
            **telemetry.gate_figures(self.telemetry.gates, self.telemetry.streams, gates),
            **telemetry.memory_figures(model.device),
            "seconds": self.seconds,
            "tokens_per_second": tokens / seconds,
        }
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"loss is {record['loss']} at step {self.step_number}")
        if self.step_number % config.evaluate_every == 0 and not self.done:
            record |= self.validate(config.validation_tokens)
        if self.done:
            record |= self.validate(len(self.validation))
        self.journal.write(record)
        if self.done or self.step_number % config.checkpoint_every == 0:
            self.save_checkpoint()
        if self.done:
            self.export()
        return record

    def _backward(self) -> Tensor:
        """Leaves the step's gradient with parameters and tables; returns its loss, nats a token."""
        batch = self.batches[self.step_number]
        total = torch.zeros((), device=self.model.device)
        for part in batch.split(self.config.micro_batches):
            # Weighted by tokens: parts of unequal size count for what is in them.
            share = part.targets_BT.numel() / batch.targets_BT.numel()
            loss = self.objective(part.to(self.model.device), self.autocast) * share
            loss.backward()
            total += loss.detach()
        return total

    def validate(self, tokens: int) -> dict[str, float]:
        """Loss on about `tokens` validation tokens, the first, in nats a token and bits a byte."""
        tokens, size = self.validation.judged(tokens)
        losses = token_losses(
            self.model,
            self.validation.read(0, tokens),
            starts_T=self.validation.starts(0, tokens),
            context=self.config.context,
            batch=self.config.batch,
            autocast=self.autocast,
        )
        total = float(losses.sum(dtype=np.float64))
        bits = total / math.log(2) / size
        return {"validation_loss": total / len(losses), "validation_bpb": bits}

    def save_checkpoint(self) -> None:
        """Everything that going on needs, atomically."""
        self.journal.sync()
        checkpoint.save(
            self.out,
            {
                "identity": self._identity,
                "step": self.step_number,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizers": self.optimizers.state_dict(),
            },
        )

    def export(self) -> None:
        """The model in `out/model`, as from_pretrained reads it, with its tokenizer."""
        self.model.eval()
        self.model.save_pretrained(self.out / "model")
        self.tokenizer.save_pretrained(self.out / "model")

    def close(self) -> None:
        """Ends the logs; the model is left without hooks."""
        self.journal.close()
        self.balancer.close()
        self.telemetry.close()

    def _resume(self, training: Stream) -> None:
        self._identity = {
            "train": json.loads(json.dumps(asdict(self.config))),
            "model": json.loads(self.model.config.to_json_string(use_diff=False)),
            "data_sha256": training.sha256,
        }
        memory = self.model.config.memory_config
        if memory is not None:
            self._identity["specification_sha256"] = memory.specification.digest
        state = checkpoint.load(self.out, self._identity)
        if state is None:
            return
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:  # written by a version whose models had other tensors
            reason = " ".join(str(error).split())
            raise MismatchError(f"{self.out / checkpoint.FILE_NAME}: {reason}") from error
        self.optimizers.load_state_dict(state["optimizers"])
        self.step_number, self.seconds = state["step"], state["seconds"]

    def _describe(self) -> None:
        counts = ledger(self.model.config, self.config.context).to_dict()
        start = {
            "step": self.step_number,
            "commit": commit(),
            "command": command(),
            "machine": machine(),
        }
        self.journal.describe({**self._identity, "ledger": counts}, start)


def train(runs: list[Run], names: list[str]) -> None:
    """Steps the runs in turn until all are done, showing the progress of each.

    On SIGTERM, or on Ctrl-C, saves all between two steps and raises SystemExit: status 143, 130.
    """
    steps = [run.config.steps for run in runs]
    done = [run.step_number for run in runs]
    console = Console(stderr=True)
    with Stopping() as stopping, Display(names, steps, done, console) as display:
        while not all(run.done for run in runs):
            if stopping.due():
                break
            for index, run in enumerate(runs):
                if not run.done:
                    display.show(index, run.step())
        else:
            return
        for run in runs:
            run.save_checkpoint()
            run.close()
    at = ", ".join(f"step {run.step_number} of {run.config.steps} in {run.out}" for run in runs)
    console.print(f"asked to stop: saved at {at}; the same command goes on", soft_wrap=True)
    raise SystemExit(stopping.status)
