"""Steps of a small model with its tables in memory and on disk, measured in turn; and what a
simulation is told of the machine: seconds of compute, of reads, of CPU.

    python benchmarks/serving_steps.py

A dense model of 40M parameters, two Engram layers, 24 rows of 256 bytes a layer and token, 614 MB
of tables. Arms: tables in memory, rows in files behind a cache of 25 % and behind one of 2.5 %, and
rows read when their layer asks. Every step is of new text. Pages of the files are dropped before
the first step, and the store hands back what it reads, so what its cache lacks is read cold. The
simulation's prediction of each cell is set beside it; ceiling: the tables in memory. Writes
results/serving_steps.json; the last line printed is its summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from serving_check import check
from torch import Tensor

from engram_lm import corpus
from engram_lm.config import FusionConfig, MemoryConfig
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.lookup import Memory, Pending
from engram_lm.memory.rows import Request, RowStore
from engram_lm.memory.served import Served
from engram_lm.memory.specification import Specification
from engram_lm.memory.window import Window
from engram_lm.model import EngramLMConfig, EngramLMForCausalLM
from engram_lm.store.cache import Cache
from engram_lm.studies.record import Record

BUDGETS = {"cached": "154MB", "disk": "15MB", "sync": "15MB"}
ARMS = ("ram", *BUDGETS)
PHASES = {"decode/b1": (1, 1, 80), "decode/b4": (4, 1, 60), "prefill/b1": (1, 256, 12)}
"""Sequences, tokens of a step of each, and steps."""
FIRST = 24
"""Tokens of a sequence before its first decoded one."""
WARM = 2


class Late(Served):
    """A layer's rows, read when they are waited for and not before."""

    def start(self, rows_M: Tensor) -> Request:
        return _Reading(self.store, rows_M)


class _Reading(NamedTuple):
    store: RowStore
    rows_M: Tensor

    def wait(self) -> Tensor:
        return self.store.format.decode(self.store.gather(self.rows_M))


class Watch:
    """Seconds since a step began at which rows had been asked for, and each layer wanted its own;
    and the rows that each layer missed in its cache."""

    def __init__(self, model: Any) -> None:
        self.begun, self.asked = 0.0, 0.0
        self.reached: dict[int, float] = {}
        self.missed = dict[int, int]()
        for layer, served in _layers(model).items():
            assert isinstance(served.store, Cache)
            self._count(layer, served.store.slower)

    def _count(self, layer: int, disk: Any) -> None:
        gather = disk.gather
        self.missed[layer] = 0

        def counted(rows_M: Tensor) -> Tensor:
            self.missed[layer] += len(rows_M)
            return gather(rows_M)

        disk.gather = counted


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    start, wait = Memory.start_window, Pending.wait

    def timed_start(self: Memory, window: Window) -> Pending:
        pending = start(self, window)
        watch.asked = time.perf_counter() - watch.begun
        return pending

    def timed_wait(self: Pending, layer: int) -> Tensor:
        watch.reached[layer] = time.perf_counter() - watch.begun
        return wait(self, layer)

    Memory.start_window, Pending.wait = timed_start, timed_wait  # type: ignore[method-assign]
    watch.begun = time.perf_counter()
    try:
        yield
    finally:
        Memory.start_window, Pending.wait = start, wait  # type: ignore[method-assign]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_flush_denormal(True)
    record = Record("serving_steps")
    measured = measure()
    summary: dict[str, float] = dict(measured["machine"])
    for cell, found in check(measured).items():
        name = cell.replace("/", "_")
        memory = median(measured["cells"][f"{cell.rpartition('/')[0]}/ram"]["seconds"])
        summary[f"{name}_ms"] = found["measured"] * 1e3
        summary[f"{name}_predicted_ms"] = found["predicted"] * 1e3
        summary[f"{name}_predicted_over_measured"] = found["predicted"] / found["measured"]
        summary[f"{name}_memory_over_measured"] = memory / found["measured"]
    record.write(summary, measured, seeds=[0, 1])
    print(json.dumps(summary))


def measure() -> dict[str, Any]:
    """Cells "PHASE/ARM" with the seconds of every step, and the machine."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        models = _models(Path(name))
        watches = {arm: Watch(model) for arm, model in models.items()}
        texts = iter(_texts())
        cells: dict[str, Any] = {}
        for phase, (sequences, tokens, steps) in PHASES.items():
            cells |= _phase(models, watches, Path(name), phase, texts, sequences, tokens, steps)
        machine = _machine(models["disk"], Path(name))
        for model in models.values():
            if model.model.served is not None:
                model.model.served.close()
        return {"cells": cells, "machine": machine}


def _models(directory: Path) -> dict[str, Any]:
    specification = Specification(
        layers=(1, 4), rows_per_head=(50_000,) * 3, heads=8, pad_id=1, boundary_rule="document"
    )
    memory = MemoryConfig(
        specification=specification, head_dim=64, fusion=FusionConfig(conv_kernel=None)
    )
    config = EngramLMConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        mlp_layer_types=["dense"] * 8,
        num_attention_heads=8,
        kv_lora_rank=128,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        streams=1,
        max_position_embeddings=1024,
        memory=memory.to_dict(),
    )
    model = EngramLMForCausalLM(config).eval()
    model.set_canonical_map(CanonicalMap.from_tokenizer(corpus.tokenizer_file()))
    model.save_pretrained(directory)
    del model
    models = {"ram": EngramLMForCausalLM.from_pretrained(directory)}
    for arm, budget in BUDGETS.items():
        models[arm] = EngramLMForCausalLM.from_pretrained(
            directory, memory="disk", memory_budget=budget
        )
    sync = models["sync"].model.served
    sync.layers = {layer: Late(served.store, sync._thread) for layer, served in sync.layers.items()}
    return {arm: model.eval() for arm, model in models.items()}


def _texts() -> Iterator[Tensor]:
    """Stretches that no step has had before."""
    ids_T = torch.from_numpy(np.asarray(corpus.tokens("train").ids, dtype=np.int64))
    for first in range(0, len(ids_T) - 512, 512):
        yield ids_T[first : first + 512]


def _layers(model: Any) -> dict[int, Served]:
    return {} if model.model.served is None else model.model.served.layers


def _drop(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _phase(
    models: dict[str, Any],
    watches: dict[str, Watch],
    directory: Path,
    phase: str,
    texts: Iterator[Tensor],
    sequences: int,
    tokens: int,
    steps: int,
) -> dict[str, Any]:
    """Every arm's steps on the same text, in turn."""
    decode = tokens == 1
    if decode:
        ids_BT = torch.stack([next(texts) for _ in range(sequences)])
    cells: dict[str, Any] = {}
    states = dict[str, Any]()
    for arm, model in models.items():
        cells[f"{phase}/{arm}"] = {
            **{name: [] for name in ("seconds", "asked", "reached", "missed")},
            "tokens": sequences * tokens,
            "rows": sequences * tokens * 24,
        }
        if decode:
            states[arm] = model(ids_BT[:, :FIRST], use_cache=True).past_key_values
    _drop(directory)
    for step in range(steps + WARM):
        if not decode:
            ids_BT = torch.stack([next(texts)[:tokens] for _ in range(sequences)])
        for arm, model in models.items():
            watch, cell = watches[arm], cells[f"{phase}/{arm}"]
            before = dict(watch.missed)
            given = ids_BT[:, FIRST + step : FIRST + step + 1] if decode else ids_BT
            with watched(watch):
                model(given, use_cache=decode, past_key_values=states.get(arm), logits_to_keep=1)
                seconds = time.perf_counter() - watch.begun
            if step >= WARM:
                cell["seconds"].append(seconds)
                cell["asked"].append(watch.asked)
                cell["reached"].append(list(watch.reached.values()))
                cell["missed"].append([watch.missed[layer] - before[layer] for layer in before])
    return cells


def _machine(model: Any, directory: Path) -> dict[str, float]:
    """What one layer's store does by itself, on rows that nobody has asked for."""
    served = _layers(model)[1]
    generator = np.random.default_rng(1)
    rows = iter(torch.from_numpy(generator.permutation(served.store.rows)))
    _drop(directory)

    def some(count: int) -> Tensor:
        return torch.stack([next(rows) for _ in range(count)])

    def seconds(count: int) -> tuple[float, float, float]:
        rows_M = some(count)
        begun, cpu = time.perf_counter(), time.process_time()
        gathering = served.start(rows_M)
        asked = time.perf_counter() - begun
        gathering.wait()
        return asked, time.perf_counter() - begun, time.process_time() - cpu

    found: dict[str, float] = {}
    names = ("asking", "seconds", "cpu")
    for count, times in ((24, 60), (6144, 10)):
        samples = [seconds(count) for _ in range(times)]
        for name, values in zip(names, zip(*samples, strict=True), strict=True):
            found[f"{name}_{count}"] = median(values)
    found["kept_cpu"] = _kept_cpu(served, some(4096))
    found["taken"] = _taken(served, [some(6144) for _ in range(8)])
    return found


def _kept_cpu(served: Served, rows_M: Tensor) -> float:
    """CPU seconds of a row that the cache has."""
    served.start(rows_M).wait()
    begun = time.process_time()
    for _ in range(10):
        served.start(rows_M).wait()
    return (time.process_time() - begun) / (10 * len(rows_M))


def _taken(served: Served, requests: list[Tensor]) -> float:
    """Seconds that matrix products lose for each CPU second of gathering beside them."""
    one, other = torch.randn(512, 512), torch.randn(512, 2048)

    def products(times: int) -> float:
        begun = time.perf_counter()
        for _ in range(times):
            one @ other
        return time.perf_counter() - begun

    products(200)
    each = products(1000) / 1000
    lost = cpu = 0.0
    for rows_M in requests:
        begun, before = time.perf_counter(), time.process_time()
        gathering: Any = served.start(rows_M)
        asked = time.perf_counter() - begun
        done, spent = 0, 0.0
        while not gathering.gathering.gathered.done():
            spent += products(20)
            done += 20
        gathering.wait()
        lost += spent - done * each
        # Products keep both cores busy: what is left of the CPU time gathered.
        cpu += time.process_time() - before - asked - done * each * torch.get_num_threads()
    return lost / cpu if cpu > 0 else 0.0


if __name__ == "__main__":
    main()
