"""Memory given to another family's model: ours (`attach`) beside engram-peft's.

    python benchmarks/compare_retrofit.py --peft DIR

DIR is what `pip install --target DIR --no-deps engram-peft==1.2.7 jaxtyping wadler-lindig` makes.
First the matrix of retrofit_matrix.py: small random models of nine families, every way of decoding
compared with the plain forward pass; engram-peft also with its convolution at zero, as it is before
training. Where the bare model deviates or raises, nothing is held against anybody.

Then training: a frozen Llama of 23M parameters with random weights, WordNet text, two layers of
memory with the same rows, dimensions and heads in both (by default 200 MB of float32 rows), each
with its project's optimiser. Arms: `ours` (attach, JointOptimizer: Muon for matrices, row Adam),
`peft` (hc_mult=1, get_optimizer: sparse gradients, SparseAdam; its collator hashes outside the time
measured), `peft_dense` (use_sparse_embeddings=False, Adam: what it does by itself on several
workers), `bare` (the backbone alone, forwards, and backwards down to the first memory layer: the
ceiling of speed and the floor of memory). Nobody clips (engram-peft scales a copy of its sparse
gradients).

Every arm is a process of its own; each round takes some steps of every arm, in an order drawn anew,
while the others wait. Beside tokens a second stand those of a second of CPU time, which other work
on the machine moves less. Peak memory is the process's high-water mark after all rounds. Writes
results/compare_retrofit.json; the last line printed is the summary.
"""

import engram_lm.openmp

import argparse
import json
import multiprocessing
import os
import random
import statistics
import time
from collections import Counter
from importlib.metadata import distributions
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from retrofit_matrix import CELLS, STEP_0, Cell, matrix
from retrofit_subjects import find_peft, load_peft, peft_config
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import engram_lm
from engram_lm import CanonicalMap, JointOptimizer, MemoryConfig, Specification, corpus
from engram_lm.studies.record import Record

ARMS = ("bare", "ours", "peft", "peft_dense")
COLUMNS = {
    "ours": "ours",
    "peft": "engram-peft",
    "peft_no_conv": "engram-peft, convolution at zero",
}
LAYERS, HEADS, HEAD_DIM = (1, 3), 8, 32
BATCH, T = 4, 256
OUR_RATE, PEFT_RATE = 4e-3, 4e-4
"""What each project's documents train with: Muon takes more than Adam. Rows have five times it."""


def memory_of(megabytes: int) -> MemoryConfig:
    """Of rows that take about as much in float32."""
    heads = len(LAYERS) * 2 * HEADS
    rows = megabytes * 10**6 // (4 * HEAD_DIM * heads)
    specification = Specification(layers=LAYERS, rows_per_head=(rows, rows), heads=HEADS, pad_id=1)
    return MemoryConfig(specification=specification, head_dim=HEAD_DIM)


def backbone() -> Any:
    """The same random weights in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=T,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).requires_grad_(False).train()


class Arm:
    """One model in training."""

    def __init__(self, name: str, memory: MemoryConfig, peft_directory: Path) -> None:
        self.name, self.model = name, backbone()
        self.backbone_values = sum(each.numel() for each in self.model.parameters())
        self.more: Any = lambda ids_BT: {}
        self.optimizer: Any = None
        self.table_values = 0
        if name == "bare":
            self.model.model.layers[LAYERS[0]].register_forward_pre_hook(_begin_here)
        elif name == "ours":
            self._ours(memory)
        else:
            self._peft(memory, load_peft(peft_directory), sparse=name == "peft")
        self.trained_values = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _ours(self, memory: MemoryConfig) -> None:
        engram_lm.attach(self.model, CanonicalMap.from_tokenizer(corpus.tokenizer()), memory)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".engram." in name or ".tables." in name)
        self.optimizer = JointOptimizer(self.model, lr=OUR_RATE, weight_decay=0.0, clip=None)
        tables = self.model.model.tables.values()
        self.table_values = sum(table.weight.numel() for table in tables)

    def _peft(self, memory: MemoryConfig, peft: Any, sparse: bool) -> None:
        tokenizer: Any = corpus.tokenizer()
        config = peft_config(peft, memory, use_sparse_embeddings=sparse)
        self.model = peft.get_engram_model(self.model, config, tokenizer, train_mode="engram_only")
        self.model.train()
        by = "sparse_adam" if sparse else "adam"
        self.optimizer = peft.get_optimizer(
            self.model, base_learning_rate=PEFT_RATE, engram_sparse_optimizer=by
        )
        collate = peft.EngramDataCollator(tokenizer, config, compressor=self.model.compressor)

        def more(ids_BT: Tensor) -> dict[str, Tensor]:
            made = collate([{"input_ids": ids} for ids in ids_BT])
            return {"engram_hash_indices": made["engram_hash_indices"]}

        self.more = more
        tables = [each.multi_head_embedding for each in self.model.engram_layers.values()]
        self.table_values = sum(each.embedding.weight.numel() for each in tables)

    def steps(self, ids_SBT: Tensor) -> dict[str, list[float]]:
        """Seconds, seconds of CPU time and loss of each."""
        took: dict[str, list[float]] = {"seconds": [], "cpu_seconds": [], "losses": []}
        for ids_BT in ids_SBT:
            given = {"input_ids": ids_BT, "labels": ids_BT, **self.more(ids_BT)}
            begun, cpu = time.perf_counter(), time.process_time()
            loss = self.model(**given, use_cache=False).loss
            loss.backward()
            if self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad()
            took["seconds"].append(time.perf_counter() - begun)
            took["cpu_seconds"].append(time.process_time() - cpu)
            took["losses"].append(loss.item())
        return took

    def facts(self) -> dict[str, float]:
        """Values of each part, and the high-water mark so far."""
        return {
            "backbone_values": self.backbone_values,
            "table_values": self.table_values,
            "other_values": self.trained_values - self.table_values,
            "peak_bytes": _peak(),
        }


def _begin_here(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].detach().requires_grad_(), *args[1:])


def _peak() -> int:
    # Not getrusage's: after exec that still holds what the parent took.
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def work(pipe: Connection, name: str, memory: MemoryConfig, peft_directory: Path) -> None:
    """Does what the pipe asks for: (method, *arguments) -> result, until None."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    torch.set_flush_denormal(True)
    arm = Arm(name, memory, peft_directory)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        method, *arguments = request
        pipe.send(getattr(arm, method)(*arguments))


def work_matrix(pipe: Connection, peft_directory: Path) -> None:
    """Sends the matrix. Its models are too small for two threads."""
    torch.set_num_threads(1)
    pipe.send(matrix(peft_directory))


class Process:
    """A process and the pipe to it."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        self.pipe.send(request)
        return self.pipe.recv()


def train(memory: MemoryConfig, peft_directory: Path, rounds: int, steps: int) -> dict[str, Any]:
    """What every arm took and found in every round; the first does not count."""
    needed = (rounds + 1) * steps * BATCH * T
    ids = torch.from_numpy(corpus.tokens("train", needed).ids.astype("int64"))
    ids_RSBT = ids.view(rounds + 1, steps, BATCH, T)
    arms = {name: Process(work, name, memory, peft_directory) for name in ARMS}
    for arm in arms.values():
        arm.pipe.recv()
    rounds_of: dict[str, list[dict[str, list[float]]]] = {name: [] for name in ARMS}
    order, drawn = list(ARMS), random.Random(0)
    console = Console(stderr=True)
    for ids_SBT in track(ids_RSBT, "training", console=console):
        drawn.shuffle(order)
        for name in order:
            rounds_of[name].append(arms[name].ask("steps", ids_SBT))
    facts = {name: arm.ask("facts") for name, arm in arms.items()}
    for arm in arms.values():
        arm.pipe.send(None)
    return {"rounds": rounds_of, "facts": facts}


def summarise(
    cells: dict[str, dict[str, dict[str, Cell]]], trained: dict[str, Any]
) -> dict[str, float]:
    """Cells by status, tokens a second, ratios of rounds, megabytes, numbers of values."""
    summary: dict[str, float] = {"families": len(cells), "cells": sum(map(len, cells.values()))}
    summary["bare_model_deviates"] = sum(_deviates(c) for f in cells.values() for c in f.values())
    for who in COLUMNS:
        counted = [c for f in cells.values() for c in f.values() if not _deviates(c)]
        statuses = Counter(cell[who].status for cell in counted)
        differences = [c[who].difference for c in counted if c[who].status == "ok"]
        summary |= {f"{who}_{status}": statuses[status] for status in ("ok", "wrong", "refused")}
        summary[f"{who}_ok_worst_difference"] = max(d for d in differences if d is not None)
    for name, rounds in trained["rounds"].items():
        facts = trained["facts"][name]
        summary[f"{name}_tokens_per_second"] = statistics.median(_rates(rounds, "seconds"))
        summary[f"{name}_tokens_per_cpu_second"] = statistics.median(_rates(rounds, "cpu_seconds"))
        summary[f"{name}_peak_mb"] = facts["peak_bytes"] / 1e6
        summary[f"{name}_table_values"] = facts["table_values"]
        summary[f"{name}_other_values"] = facts["other_values"]
        summary[f"{name}_first_loss"] = rounds[0]["losses"][0]
        summary[f"{name}_last_loss"] = rounds[-1]["losses"][-1]
    for name, (unit, suffix) in product(ARMS, (("seconds", ""), ("cpu_seconds", "_cpu"))):
        if name != "ours":
            each = (_rates(trained["rounds"][arm], unit) for arm in ("ours", name))
            ratios = [our / their for our, their in zip(*each, strict=True)]
            summary[f"ours_over_{name}{suffix}"] = statistics.median(ratios)
            summary[f"ours_over_{name}{suffix}_least"] = min(ratios)
            summary[f"ours_over_{name}{suffix}_most"] = max(ratios)
    summary["backbone_values"] = trained["facts"]["bare"]["backbone_values"]
    summary["table_mb"] = summary["ours_table_values"] * 4 / 1e6
    return summary


def _rates(rounds: list[dict[str, list[float]]], unit: str) -> list[float]:
    return [BATCH * T * len(each[unit]) / sum(each[unit]) for each in rounds[1:]]


def _deviates(cell: dict[str, Cell]) -> bool:
    return "bare" in cell and cell["bare"].status != "ok"


def told(found: dict[str, dict[str, Cell]], who: str) -> str:
    """One field of the printed matrix: of all families."""
    parts = []
    for status in ("ok", "wrong", "refused"):
        named = [f for f, c in found.items() if c[who].status == status and not _deviates(c)]
        differences = [found[f][who].difference or 0.0 for f in named]
        worst = f", up to {max(differences):.2g}" if any(differences) else ""
        if named:
            parts.append(f"{status} {len(named)}{worst if status == 'wrong' else ''}")
            if status == "refused":
                parts.append(found[named[0]][who].message)
    return "; ".join(parts)


def shown(cells: dict[str, dict[str, dict[str, Cell]]], summary: dict[str, float]) -> list[Table]:
    """Both columns of both comparisons."""
    correct = Table("way", *COLUMNS.values(), "bare model deviates", title=f"{len(cells)} families")
    for name, title in {"step_0": STEP_0, **{n: t for n, (t, _) in CELLS.items()}}.items():
        found = {family: cells[family][name] for family in cells}
        bare = ", ".join(family for family, cell in found.items() if _deviates(cell))
        correct.add_row(title, *(told(found, who) for who in COLUMNS), bare)
    speed = Table("", *ARMS, title="training the memory")
    for what in (
        *("tokens_per_second", "tokens_per_cpu_second", "peak_mb"),
        *("table_values", "other_values", "first_loss", "last_loss"),
    ):
        digits = 3 if "loss" in what else 0
        values = [f"{summary[f'{name}_{what}']:,.{digits}f}" for name in ARMS]
        speed.add_row(what, *values)
    return [correct, speed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peft", type=Path, required=True, help="where engram-peft is installed")
    parser.add_argument("--megabytes", type=int, default=200, help="of float32 rows")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="of each arm in a round")
    arguments = parser.parse_args()
    find_peft(arguments.peft)
    record = Record("compare_retrofit")
    cells = Process(work_matrix, arguments.peft).pipe.recv()
    memory = memory_of(arguments.megabytes)
    trained = train(memory, arguments.peft, arguments.rounds, arguments.steps)
    summary = summarise(cells, trained)
    (version,) = (d.version for d in distributions(name="engram-peft", path=[str(arguments.peft)]))
    raw = {
        "engram_peft": version,
        "matrix": {
            family: {
                name: {who: each._asdict() for who, each in cell.items()}
                for name, cell in found.items()
            }
            for family, found in cells.items()
        },
        **trained,
    }
    record.write(summary, raw, seeds=[0])
    console = Console(width=150)
    for table in shown(cells, summary):
        console.print(table)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
