"""One process of benchmarks/offload.py: a backbone, and the ways it may get its rows.

Shapes: B sequences, T tokens.
"""

import engram_lm.openmp  # noqa: F401

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from engram_lm.memory.lookup import Pending
from engram_lm.memory.rows import RowFormat, RowStore
from engram_lm.memory.served import ServedTables
from engram_lm.model import serve
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.store.disk import Disk
from engram_lm.store.resident import Resident
from engram_lm.store.source import open_sources
from engram_lm.train.allocator import keep_freed_memory


class Synchronous(Disk):
    """Reads rows when a layer wants them, and not before."""

    def prefetch(self, rows_M: Tensor) -> None:
        """Ignored."""


class Ones:
    """A table that takes no memory: what a model takes beside its rows and the reading of them."""

    def __init__(self, format: RowFormat) -> None:
        self.format = format

    def start(self, rows_M: Tensor) -> "Ones":
        """Values are there from the start, as those of all layers are when they are read early."""
        self.values_ME = torch.ones(len(rows_M), self.format.dim, dtype=self.format.value_dtype)
        return self

    def wait(self) -> Tensor:
        """(M, E)."""
        return self.values_ME


class Worker:
    """A model, and for each arm what its layers read from."""

    def __init__(self, directory: Path, tables: Path, budget: int, arms: list[str]) -> None:
        with serve.rows_in_files():
            self.model = EngramLMForCausalLM.from_pretrained(directory, dtype="auto")
        self.model.eval()
        self.directory, self.tables, self.budget = directory, tables, budget
        sources = [open_sources(file)[0] for file in sorted(tables.glob("*.safetensors"))]
        ones = {source.layer: Ones(source.format) for source in sources}
        self.rows: dict[str, Any] = dict.fromkeys(arms, SimpleNamespace(layers=ones))
        self.rows["none"] = self.rows["none_there"] = None
        self.caches: dict[str, DynamicCache] = {}
        self.begins: list[float] = []
        self.arms = arms
        wait = Pending.wait

        def noted(pending: Pending, layer: int) -> Tensor:
            self.begins.append(time.perf_counter())
            return wait(pending, layer)

        Pending.wait = noted  # type: ignore

    def open(self) -> None:
        """Gives the arms their rows, after they have shown what the process takes without."""
        sources = [open_sources(file)[0] for file in sorted(self.tables.glob("*.safetensors"))]
        for arm in self.arms:
            stores: dict[int, RowStore] = {}
            for source in sources:
                ahead = self.budget // len(sources) // serve.AHEAD
                if arm == "ram":
                    with Disk(source.format, source.parts) as disk:
                        stores[source.layer] = Resident.of(disk)
                elif arm == "disk":
                    stores[source.layer] = Disk(source.format, source.parts, ahead_bytes=ahead)
                elif arm == "sync":
                    stores[source.layer] = Synchronous(source.format, source.parts)
            if arm == "cached":
                memory = self.model.config.memory_config
                assert memory is not None
                self.rows[arm] = serve.open_rows(memory, self.directory, self.tables, self.budget)
            elif arm == "disk":
                self.rows[arm] = ServedTables(stores)
            elif stores:
                self.rows[arm] = SimpleNamespace(layers=stores)

    def warm(self, ids_T: Tensor) -> float:
        """Puts the rows of a text into the cache. Returns seconds."""
        begun = time.perf_counter()
        assert self.model.model.addresses is not None
        for ids in ids_T.split(4096):
            rows_LBTH = self.model.model.addresses.rows(ids[None])
            for served, rows in zip(self.rows["cached"].layers.values(), rows_LBTH, strict=True):
                served.gather(rows.reshape(-1).unique())
        return time.perf_counter() - begun

    @torch.inference_mode()
    def step(self, arm: str, ids_BT: Tensor, keep: bool) -> dict[str, Any]:
        """One forward pass, with a cache that it goes on with, or without; what it took."""
        self.begins.clear()
        past = self.caches.get(arm) if keep else None
        counts, reading, cpu = self._counts(arm), _bytes_read(), _cpu_seconds()
        with self._reading(arm):
            begun = time.perf_counter()
            out = self.model(ids_BT, past_key_values=past, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - begun
        if keep:
            self.caches[arm] = out.past_key_values
        after = self._counts(arm)
        return {
            "tokens": ids_BT.numel(),
            "seconds": seconds,
            "cpu_seconds": _cpu_seconds() - cpu,
            "bytes_read": _bytes_read() - reading,
            "begins": [each - begun for each in self.begins],
            **{name: after[name] - counts[name] for name in counts},
        }

    @contextmanager
    def _reading(self, arm: str) -> Iterator[None]:
        decoder = self.model.model
        decoder.served = self.rows[arm]
        if decoder.served is None:
            with decoder.without_memory():
                yield
        else:
            yield

    def _counts(self, arm: str) -> dict[str, float]:
        served = self.rows.get(arm)
        if not isinstance(served, ServedTables):
            return {}
        metrics = served.metrics().values()
        return {
            "reader_cpu_seconds": _thread_seconds(served),
            "asked": sum(each.asked for each in metrics),
            "unique": sum(each.unique for each in metrics),
            "missed": sum(each.tiers[-1].hits for each in metrics),
            "waited": sum(each.wait_seconds for each in metrics),
        }

    def forget(self) -> None:
        """Drops the texts that were being continued."""
        self.caches.clear()


def _bytes_read() -> int:
    """By this process, from devices."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def _thread_seconds(served: ServedTables) -> float:
    """CPU time of the thread that reads."""
    (thread,) = served._thread._threads
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(
    pipe: Connection, directory: Path, tables: Path, budget: int, arms: list[str], cgroup: str
) -> None:
    """Does what the pipe asks for: (method, *arguments) -> result, until None."""
    if cgroup:
        Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_flush_denormal(True)
    keep_freed_memory()
    for module in ("memory.rows_numba", "store.row_file_numba", "store.sets_numba"):
        import_module(f"engram_lm.{module}")
    worker = Worker(directory, tables, budget, arms)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        name, *arguments = request
        pipe.send(getattr(worker, name)(*arguments))
