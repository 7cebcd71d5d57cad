"""The training loop of one model, by one process or by several workers.

A Run is stepped by its caller, so that a study can take turns between two models and the drift of
the machine falls on both. Everything it leaves is in its directory: config.json, metrics.jsonl,
tensorboard/, checkpoints/ and, at the end, model/.
"""

import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import MismatchError
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.model.budget import ledger
from engram_lm.model.config import TABLE_DTYPES
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.precision import DTYPES, Precision, choose
from engram_lm.train import telemetry
from engram_lm.train.balance import Balancer
from engram_lm.train.batches import Batches, check_step
from engram_lm.train.checkpoint import Checkpoints
from engram_lm.train.config import TrainConfig
from engram_lm.train.export import export
from engram_lm.train.freeze import freeze
from engram_lm.train.journal import Journal
from engram_lm.train.objective import Objective
from engram_lm.train.optimizers import Optimizers
from engram_lm.train.parallel import replicate, shard, synchronised, whole
from engram_lm.train.provenance import command, commit, machine
from engram_lm.train.sharded_table import ShardedTable, shard_tables
from engram_lm.train.state import State
from engram_lm.train.stream import Stream
from engram_lm.train.telemetry import Telemetry
from engram_lm.train.together import Together
from engram_lm.train.workers import Workers

_NOT_OF_A_MODEL = ("transformers_version", "_name_or_path")
"""What a saved configuration says of how it was saved."""


class Run:
    """One model being trained. Goes on from the checkpoint in `out`, bit for bit, where there is
    one.

    training, validation: token streams, of whose documents the model is told where they start.
    origin: of the saved model that the weights are from; the run goes on only with the same.
    workers: those that share each step's sequences; all make the same Run, and main writes.
    ConfigError or DataError where there is not a sequence for each of their micro-batches.

    `precision` is what "auto" came to, and `config` says so too.
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
        workers: Workers | None = None,
        origin: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.out = model, tokenizer, out
        self.validation, self.workers = validation, workers or Workers()
        self.together = Together()
        self.checkpoints = Checkpoints(out, self.together)
        self.precision = self._choose(config.precision)
        self.config = config = replace(config, precision=self.precision.name)
        model.set_attn_implementation(config.attention)
        check_step(training, config, self.workers)
        self.batches = Batches(
            training,
            batch=config.batch,
            context=config.context,
            seed=config.seed,
            rows=self.workers.share(config.batch),
        )
        objective = Objective(model)
        if self.workers.size > 1 and not _shared(model):
            shard_tables(model)
        freeze(model, config.frozen)
        _check_dtype(model, config.table_dtype)
        self.objective: Objective | DistributedDataParallel = objective
        if self.workers.size > 1:
            each_whole = config.backbone == "ddp"
            self.objective = replicate(objective) if each_whole else shard(objective)
        self.optimizers = Optimizers(
            model,
            lr=config.lr,
            table_lr_multiplier=config.table_lr_multiplier,
            weight_decay=config.weight_decay,
            table_optimizer=config.table_optimizer,
            seed=config.seed,
            muon_dtype=self.precision.dtype,
        )
        self.state = State(model, self.optimizers)
        self.balancer = Balancer(model, config.balance_rate, self.workers)
        self.telemetry = Telemetry(model)
        self.step_number = 0
        self.seconds = 0.0
        """Spent in steps, validation and saving left out."""
        self._saved: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)
        self._resume(training, origin)
        self.journal = Journal(out, self.step_number) if self.workers.main else None
        self._describe()

    @property
    def done(self) -> bool:
        return self.step_number >= self.config.steps

    def step(self) -> dict[str, float]:
        """One optimiser step, and what is due after it; returns what it logged, loss in nats.

        WorkerError where another worker is lost.
        """
        with self.workers.guard(f"step {self.step_number + 1}"):
            return self._step()

    def _step(self) -> dict[str, float]:
        config = self.config
        started = time.perf_counter()
        sent = telemetry.exchanged_bytes(self.model.model.tables.values())
        self.model.train()
        loss = self._backward()
        factor = config.factor(self.step_number)
        self.optimizers.set_factor(factor)
        norm = self.optimizers.clip(config.clip)
        taken = self.optimizers.step()
        loads_LE = self.balancer.step(move=taken)
        found = self._read(loss, norm, loads_LE, taken, sent)
        self.optimizers.zero_grad()
        seconds = time.perf_counter() - started
        self.step_number += 1
        self.seconds += seconds
        tokens = config.batch * config.context
        record = {
            "step": self.step_number,
            "tokens": self.step_number * tokens,
            **found,
            "lr": config.lr * factor,
            "skipped": self.optimizers.skipped,
            "seconds": self.seconds,
            "tokens_per_second": tokens / seconds,
            **self._saved,
        }
        self._saved = {}
        if self.step_number % config.evaluate_every == 0 and not self.done:
            record |= self.validate(config.validation_tokens)
        if self.done:
            record |= self.validate(len(self.validation))
        if self.journal is not None:
            self.journal.write(record)
        if self.done:
            self.export()  # first: a run that is killed here takes its last steps again
        if self.done or self.step_number % config.checkpoint_every == 0:
            self.save_checkpoint()
        return record

    def _backward(self) -> Tensor:
        """Leaves the step's gradient with parameters and tables; returns this worker's part of the
        loss in nats a token, of which the workers' mean is the step's.
        """
        config, device = self.config, self.model.device
        batch = self.batches[self.step_number]
        total = torch.zeros((), device=device)
        parts = batch.split(config.micro_batches)
        for index, part in enumerate(parts):
            # Gradients are averaged over workers: weighted by tokens, unequal parts count for what
            # is in them.
            share = part.targets_BT.numel() / (config.batch * config.context)
            with synchronised(self.objective, index == len(parts) - 1):
                loss = self.objective(part.to(device), self.precision.autocast)
                loss = loss * (share * self.workers.size)
                loss.backward()
            total += loss.detach()
        return total

    def _read(
        self, loss: Tensor, norm: Tensor, loads_LE: Tensor, taken: bool, sent: int
    ) -> dict[str, float]:
        """A step's figures, those of all workers taken together."""
        bytes_here = telemetry.memory_figures(self.model.device)
        if self.workers.size > 1:
            tables = self.model.model.tables.values()
            bytes_here["exchanged_bytes"] = telemetry.exchanged_bytes(tables) - sent
        bytes_of_text = self.batches.text_bytes(self.step_number)
        norms = self.optimizers.gradient_norms
        rows = telemetry.row_sums(self.optimizers.rows, taken)
        apart = torch.tensor([bytes_of_text, *rows, *bytes_here.values()], dtype=torch.float64)
        sums = torch.cat([loss.double()[None], self.telemetry.take(), apart.to(loss.device)])
        values = telemetry.read(
            {"sums": self.workers.sum(sums), "loads": loads_LE, "gradient_norm": norm}
            | {f"gradient_norm/{name}": value for name, value in norms.items()}
        )
        loads, (loss_sum, *sums_read) = values.pop("loads"), values.pop("sums")
        size, *together = sums_read[-len(apart) :]
        gates = self.telemetry.gates
        names = [self.optimizers.table_names[table] for table in self.optimizers.groups.tables]
        nats = loss_sum / self.workers.size
        tokens = self.config.batch * self.config.context
        return {
            "loss": nats,
            "bpb": nats * tokens / math.log(2) / size,
            **{name: value for name, (value,) in values.items()},
            **telemetry.load_figures(self.balancer.routers, loads),
            **telemetry.gate_figures(gates, self.telemetry.streams, sums_read[: -len(apart)]),
            **telemetry.row_figures(names, together[: len(rows)]),
            **dict(zip(bytes_here, together[len(rows) :], strict=True)),
        }

    def validate(self, tokens: int) -> dict[str, float]:
        """Loss on about `tokens` validation tokens, the first, in nats a token and bits a byte."""
        tokens, size = self.validation.judged(tokens)
        with whole(self.objective):
            losses = token_losses(
                self.model,
                self.validation.read(0, tokens),
                starts_T=self.validation.starts(0, tokens),
                context=self.config.context,
                # As many at once as a step takes: its memory bounds validation's too.
                batch=-(-self.config.batch // self.config.micro_batches),
                autocast=self.precision.autocast,
                share=self.workers.share,
            )
        mine = torch.tensor(losses.sum(dtype=np.float64), device=self.model.device)
        total = self.workers.sum(mine).item()
        bits = total / math.log(2) / size
        return {"validation_loss": total / len(losses), "validation_bpb": bits}

    def save_checkpoint(self) -> None:
        """Everything that going on needs, atomically; time and size are logged a step later."""
        if self.journal is not None:
            self.journal.sync()
        record = {"identity": self._identity, "step": self.step_number, "seconds": self.seconds}
        saved = self.checkpoints.save(self.state.tensors(self.together.rank), record)
        self._saved = {"checkpoint_seconds": saved.seconds, "checkpoint_bytes": saved.bytes}

    def export(self) -> None:
        """The model in `out/model`, as from_pretrained reads it, with its tokenizer."""
        self.model.eval()
        export(self.model, self.tokenizer, self.out / "model", self.together)

    def close(self) -> None:
        """Ends the logs; the model is left without hooks."""
        if self.journal is not None:
            self.journal.close()
        self.balancer.close()
        self.telemetry.close()

    def _choose(self, wanted: str) -> Precision:
        """What the last checkpoint was trained with, where nothing else is wanted; else what suits
        the devices of all workers."""
        begun = self.checkpoints.setting("precision")
        if wanted == "auto" and begun in DTYPES:
            return Precision(begun, "as this run began")
        chosen = choose(wanted, self.model.device)
        half = torch.tensor(float(chosen.name == "bf16"), device=self.workers.device)
        if wanted == "auto" and 0 < self.workers.sum(half).item() < self.workers.size:
            return Precision("fp32", "not every worker multiplies bfloat16 in hardware")
        return chosen

    def _resume(self, training: Stream, origin: str | None) -> None:
        model = json.loads(self.model.config.to_json_string(use_diff=False))
        self._identity = {
            "train": json.loads(json.dumps(asdict(self.config))),
            "model": {name: value for name, value in model.items() if name not in _NOT_OF_A_MODEL},
            "data_sha256": training.sha256,
        }
        if origin is not None:
            self._identity["origin_sha256"] = origin
        memory = self.model.config.memory_config
        if memory is not None:
            self._identity["specification_sha256"] = memory.specification.digest
        found = self.checkpoints.last(self._identity)
        if found is None:
            return
        self.state.load(found, self.checkpoints)
        self.step_number, self.seconds = found.record["step"], found.record["seconds"]
        if self.workers.main:
            print(f"going on from step {self.step_number} ({found.path})", file=sys.stderr)

    def _describe(self) -> None:
        if self.journal is None:
            return
        counts = ledger(self.model.config, self.config.context).to_dict()
        start = {
            "step": self.step_number,
            "commit": commit(),
            "command": command(),
            "workers": self.workers.size,
            "precision": str(self.precision),
            "machine": machine(),
        }
        self.journal.describe({**self._identity, "ledger": counts}, start)


def _shared(model: EngramLMForCausalLM) -> bool:
    return all(isinstance(table, ShardedTable) for table in model.model.tables.values())


def _check_dtype(model: EngramLMForCausalLM, table_dtype: str) -> None:
    for name, table in model.model.tables.items():
        if table.weight.dtype != TABLE_DTYPES[table_dtype]:
            raise MismatchError(
                f"table_dtype={table_dtype!r}: the model's table of layer {name} is "
                f"{table.weight.dtype}; make it with table_dtype={table_dtype!r} as well"
            )
