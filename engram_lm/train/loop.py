"""The training loop of one model on one machine.

A Run is stepped by its caller, so that a study can take turns between two models and the drift of
the machine falls on both. Everything it leaves is in its directory: config.json, metrics.jsonl,
tensorboard/, checkpoints/ and, at the end, model/.
"""

import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from engram_lm.evaluate.token_losses import token_losses
from engram_lm.model.budget import ledger
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.train import checkpoint
from engram_lm.train.balance import Balancer
from engram_lm.train.batches import Batches
from engram_lm.train.config import TrainConfig
from engram_lm.train.objective import Objective
from engram_lm.train.optimizers import Optimizers
from engram_lm.train.state import State
from engram_lm.train.stream import Stream


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
        from torch.utils.tensorboard import SummaryWriter  # an extra: only training needs it

        self.model, self.tokenizer, self.config, self.out = model, tokenizer, config, out
        self.validation = validation
        model.set_attn_implementation(config.attention)
        self.batches = Batches(
            training, batch=config.batch, context=config.context, seed=config.seed
        )
        self.autocast = torch.bfloat16 if config.precision == "bf16" else None
        self.objective = Objective(model)
        self.optimizers = Optimizers(
            model,
            lr=config.lr,
            table_lr_multiplier=config.table_lr_multiplier,
            weight_decay=config.weight_decay,
        )
        self.state = State(model, self.optimizers)
        self.balancer = Balancer(model, config.balance_rate)
        self.step_number = 0
        self.seconds = 0.0
        """Spent in steps, validation and saving left out."""
        self._saved: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)
        self._resume(training)
        self._write_config()
        self._log = (out / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=self.step_number)

    @property
    def done(self) -> bool:
        return self.step_number >= self.config.steps

    def step(self) -> dict[str, float]:
        """One optimiser step, and what is due after it; returns what it logged, loss in nats."""
        config, model = self.config, self.model
        started = time.perf_counter()
        model.train()
        batch = self.batches[self.step_number].to(model.device)
        loss = self.objective(batch, self.autocast)
        loss.backward()
        factor = config.factor(self.step_number)
        self.optimizers.set_factor(factor)
        norm = self.optimizers.clip(config.clip)
        self.optimizers.step()
        self.optimizers.zero_grad()
        load = self.balancer.step()
        self.step_number += 1
        record = {
            "step": self.step_number,
            "tokens": self.step_number * config.batch * config.context,
            "loss": loss.item(),
            "lr": config.lr * factor,
            "gradient_norm": norm.item(),
            "expert_load": load,
            **self._saved,
        }
        self._saved = {}
        seconds = time.perf_counter() - started
        self.seconds += seconds
        record["seconds"] = self.seconds
        record["tokens_per_second"] = config.batch * config.context / seconds
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"loss is {record['loss']} at step {self.step_number}")
        if self.step_number % config.evaluate_every == 0 and not self.done:
            record |= self.validate(config.validation_tokens)
        if self.done:
            record |= self.validate(len(self.validation))
        self._write(record)
        if self.done or self.step_number % config.checkpoint_every == 0:
            self.save_checkpoint()
        if self.done:
            self.export()
        return record

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
        """Everything that going on needs, atomically; time and size are logged a step later."""
        self._log.flush()
        os.fsync(self._log.fileno())
        record = {
            "identity": self._identity,
            "step": self.step_number,
            "seconds": self.seconds,
        }
        saved = checkpoint.save(self.out, self.state.tensors(), record)
        self._saved = {"checkpoint_seconds": saved.seconds, "checkpoint_bytes": saved.bytes}

    def export(self) -> None:
        """The model in `out/model`, as from_pretrained reads it, with its tokenizer."""
        self.model.eval()
        self.model.save_pretrained(self.out / "model")
        self.tokenizer.save_pretrained(self.out / "model")

    def close(self) -> None:
        """Ends the log; the model is left without hooks."""
        self._log.close()
        self._board.close()
        self.balancer.close()

    def _resume(self, training: Stream) -> None:
        self._identity = {
            "train": json.loads(json.dumps(asdict(self.config))),
            "model": json.loads(self.model.config.to_json_string(use_diff=False)),
            "data_sha256": training.sha256,
        }
        memory = self.model.config.memory_config
        if memory is not None:
            self._identity["specification_sha256"] = memory.specification.digest
        found = checkpoint.find(self.out, self._identity)
        metrics = self.out / "metrics.jsonl"
        if found is None:
            metrics.write_text("")
            return
        self.state.load(found)
        self.step_number, self.seconds = found.record["step"], found.record["seconds"]
        print(f"going on from step {self.step_number} ({found.path})", file=sys.stderr)
        # Steps after the checkpoint will be taken, and logged, again.
        kept = [line for line in read_metrics(self.out) if line["step"] <= self.step_number]
        aside = metrics.with_suffix(".partial")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(aside, metrics)

    def _write_config(self) -> None:
        record = {
            **self._identity,
            "ledger": ledger(self.model.config, self.config.context).to_dict(),
            "machine": machine(),
        }
        aside = self.out / "config.partial"
        aside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(aside, self.out / "config.json")

    def _write(self, record: dict[str, float]) -> None:
        self._log.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "tokens"):
                self._board.add_scalar(name, value, record["step"])


def train(runs: list[Run], names: list[str]) -> None:
    """Steps the runs in turn until all are done, with a progress bar each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = [
            progress.add_task(name, total=run.config.steps, completed=run.step_number, note="")
            for name, run in zip(names, runs, strict=True)
        ]
        notes = [""] * len(runs)
        while not all(run.done for run in runs):
            for index, run in enumerate(runs):
                if run.done:
                    continue
                record = run.step()
                if "validation_bpb" in record:
                    notes[index] = f"  bpb {record['validation_bpb']:.3f}"
                note = f"loss {record['loss']:.3f}{notes[index]}"
                note += f"  {record['tokens_per_second'] / 1000:.1f}k tok/s"
                progress.update(tasks[index], completed=run.step_number, note=note)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def machine() -> dict[str, str | int]:
    """Where this runs, and with which versions."""
    names = ("torch", "transformers", "tokenizers", "numpy", "engram-lm")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
