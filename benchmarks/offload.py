"""What a model pays for rows that are not in memory, beside one that holds them.

    python benchmarks/offload.py

Dense backbones of 0.3B and 1.2B parameters with random weights, in bfloat16 where this CPU
multiplies it in hardware and else in float32, two layers of memory with 24 rows of 264 bytes each
for every token (DeepSeek-V4.1's), a table of 12 GB. Arms: `none` (memory off), `ram` (the table in
memory), `cached` (a budget of a quarter of the table over the disk, warm: it has seen other text of
the same corpus), `disk` (no cache, always cold: pages are handed back), `sync` (the same, read when
a layer wants them). Text is unique English prose, never repeated; every arm gets text of its own.
Every round takes a step of each arm, in an order drawn anew. The arms on disk run in a process of
their own, inside a memory cgroup of what that process took with rows of ones and as many texts
going on, plus the budget, plus 64 MiB: the page cache counts. Needs root for the cgroup, 14 GB of
disk and 20 GB of memory.

Ceilings, measured in the same run: `none` for all, the disk's rate of random rows for arms that
read. `none_there`, memory off in the process on disk, tells the two processes apart. Writes
results/offload.json and the figure beside it; the last line printed is the summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import offload_worker
import torch
from offload_figure import draw, ratio, summarize
from rich.progress import track
from torch import Tensor

from engram_lm import corpus
from engram_lm.config import deepseek_v41
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.rows import RowFormat
from engram_lm.memory.specification import Specification
from engram_lm.model import serve
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.precision import choose
from engram_lm.store.disk import Disk
from engram_lm.store.packed import Label
from engram_lm.store.source import open_sources
from engram_lm.studies.record import Record

FORMAT = RowFormat(dtype=torch.float8_e4m3fn, dim=256, scale_group=32)
BACKBONES = {"0.3B": (1024, 3328, 16), "1.2B": (2048, 5888, 32)}
"""Width, width of the FFN, heads; 24 layers."""
LAYERS = 24
HERE, THERE = ["ram"], ["cached", "disk", "sync", "none_there"]
ARMS = ["none", *HERE, *THERE]
BATCHES = {1: (100, 16, 256), 4: (40, 5, 256), 16: (20, 3, 128)}
"""Sequences -> steps of decoding and prompts that are measured of each arm, tokens of a prompt."""
PAUSE = 0.02
"""Seconds before a step, in which the threads of the other process stop waiting for work."""
BEFORE = 64
"""Tokens before the first that is decoded."""
SLACK = 64 * 2**20
WARM = 200_000
"""Tokens that the cache has seen."""
CGROUPS = Path("/sys/fs/cgroup/memory")


class Text:
    """Unique prose, handed out from its beginning to its end."""

    def __init__(self) -> None:
        self.ids_N = torch.from_numpy(corpus.tokens("train").ids.astype(np.int64))
        self.begin = 0

    def take(self, *shape: int) -> Tensor:
        """Token ids of this shape that nobody has had yet."""
        end = self.begin + int(np.prod(shape))
        if end > len(self.ids_N):
            raise SystemExit(f"the corpus has {len(self.ids_N)} tokens, {end} are needed")
        part, self.begin = self.ids_N[self.begin : end], end
        return part.view(shape)


def _specification(size: int) -> Specification:
    rules = deepseek_v41().specification
    heads = 2 * rules.heads * len(rules.rows_per_head)
    rules = replace(
        rules,
        layers=(1, LAYERS // 2),
        rows_per_head=(size // (heads * FORMAT.row_bytes),) * len(rules.rows_per_head),
    )
    return rules.bind(CanonicalMap.from_tokenizer(corpus.tokenizer()))


def write_table(label: Label, directory: Path) -> None:
    """A packed file of random rows, all of whose values are finite."""
    random, digests = np.random.default_rng(label.layer), []
    with (directory / f"table-{label.layer}.safetensors").open("wb") as file:
        file.write(label.header())
        for first in track(range(0, label.rows, label.block_rows), f"table {label.layer}"):
            rows = min(label.block_rows, label.rows - first)
            bytes_MR = random.integers(0, 256, (rows, FORMAT.row_bytes), np.uint8)
            bytes_MR[:, : FORMAT.value_bytes] &= 0xBF  # below 2 in size
            bytes_MR[:, FORMAT.value_bytes :] = 120  # times 2^-7
            content = bytes_MR.tobytes()
            digests.append(hashlib.sha256(content).hexdigest())
            file.write(content)
        file.seek(0)
        file.write(label.header("".join(digests)))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read cold from here on


def disk_ceilings(tables: Path) -> dict[str, float]:
    """Rows a second of large requests, CPU time of one, and the time of a token's rows."""
    (source,) = open_sources(min(tables.glob("*.safetensors")))
    random, taken = np.random.default_rng(1), defaultdict(list)
    with Disk(source.format, source.parts) as disk:
        for size, rounds in ((24, 40), (48, 40), (32_768, 3)):
            for _ in range(rounds):
                rows_U = np.unique(random.integers(0, source.rows, size))
                cpu, begun = time.process_time(), time.perf_counter()
                disk.gather(torch.from_numpy(rows_U))
                taken[f"seconds_of_{size}"].append(time.perf_counter() - begun)
                taken[f"cpu_seconds_of_{size}"].append(time.process_time() - cpu)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "rows_per_second": 32_768 / medians["seconds_of_32768"],
        "cpu_us_per_row": 1e6 * medians["cpu_seconds_of_32768"] / 32_768,
        "cpu_us_per_row_of_24": 1e6 * medians["cpu_seconds_of_24"] / 24,
        "ms_24_rows": 1e3 * medians["seconds_of_24"],
        "ms_48_rows": 1e3 * medians["seconds_of_48"],
    }


def save_backbone(backbone: str, specification: Specification | None, directory: Path) -> None:
    """A model's directory without tables; without memory where there is no specification."""
    width, ffn, heads = BACKBONES[backbone]
    memory = None
    if specification is not None:
        memory = replace(deepseek_v41(), specification=specification).to_dict()
    config = EngramLMConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_hidden_layers=LAYERS,
        mlp_layer_types=["dense"] * LAYERS,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        memory=memory,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(choose("auto").dtype)
    with serve.rows_in_files():
        model = EngramLMForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if memory is not None:
        model.set_canonical_map(CanonicalMap.from_tokenizer(corpus.tokenizer()))
    model.save_pretrained(directory)


FIRST_TOKEN = """
import sys, time, torch
from engram_lm.model.modeling import EngramLMForCausalLM
directory, tables, budget = sys.argv[1:]
begun = time.perf_counter()
options = {"memory": "disk", "memory_budget": budget, "tables": tables} if tables else {}
model = EngramLMForCausalLM.from_pretrained(directory, dtype="auto", **options).eval()
ids = torch.arange(100, 164)[None]
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
print(time.perf_counter() - begun)
"""


def first_tokens(directory: Path, tables: Path, budget: int) -> dict[str, list[float]]:
    """Seconds from opening a model to its first token, in new processes, in turn."""
    plain = directory.with_name("plain")
    save_backbone("0.3B", None, plain)
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(4):
        for arm, options in (
            ("none", [str(plain), "", ""]),
            ("disk", [str(directory), str(tables), str(budget)]),
        ):
            command = [sys.executable, "-c", FIRST_TOKEN, *options]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            taken[arm].append(float(done.stdout))
    return {arm: values[1:] for arm, values in taken.items()}  # the first reads the backbone


@contextmanager
def workers(directory: Path, tables: Path, budget: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Two processes, one of them in a cgroup; a function that asks the one that has the arm."""
    group = CGROUPS / f"engram-offload-{os.getpid()}"
    group.mkdir()
    # glibc gives a thread a heap of its own, and what one has freed the other does not get.
    os.environ["MALLOC_ARENA_MAX"] = "1"
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for arms, where in ((HERE, ""), (THERE, str(group))):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=offload_worker.main,
                args=(theirs, directory, tables, budget, arms, where),
            )
            process.start()
            theirs.close()
            ours.recv()
            processes.append(process)
            pipes.update(dict.fromkeys(arms, ours))

        def ask(arm: str, *request: Any) -> Any:
            pipe = pipes[arm]
            pipe.send(request)
            return pipe.recv()

        # What the process takes with rows of ones: its largest prompt, and in each arm texts as
        # many and as long as there will be.
        batch, (steps, _, prompt) = max(BATCHES.items())
        largest = torch.randint(2, 8192, (batch, prompt))
        for tokens in (BEFORE + steps, 1, 1, 1):
            for arm in THERE:
                ask(arm, "step", arm, largest[:, :tokens], True)
        ask("disk", "step", "disk", largest, False)
        ask("disk", "forget")
        # Pages of its weights that others read first are theirs, and are no slack for it.
        without = int((group / "memory.max_usage_in_bytes").read_text())
        limit = without + budget + SLACK
        (group / "memory.limit_in_bytes").write_text(str(limit))
        facts = {"peak_without_rows": without, "budget": budget, "limit": limit}
        ask("ram", "open")
        ask("disk", "open")
        ask("ram", "step", "none", largest, False)
        pipes["none"] = pipes["ram"]
        yield ask, facts
        facts["peak"] = int((group / "memory.max_usage_in_bytes").read_text())
        facts["times_at_limit"] = int((group / "memory.failcnt").read_text())
    finally:
        for pipe in {id(pipe): pipe for pipe in pipes.values()}.values():
            pipe.send(None)
        for process in processes:
            process.join()
        group.rmdir()


def cell(
    ask: Any, text: Text, shape: tuple[int, int], steps: int, title: str
) -> dict[str, dict[str, list[Any]]]:
    """What each step took, round by round, for every arm; the first round does not count."""
    measured: dict[str, dict[str, list[Any]]] = {arm: defaultdict(list) for arm in ARMS}
    random = np.random.default_rng(0)
    batch, keep = shape[0], shape[1] == 1
    if keep:
        for arm in ARMS:
            ask(arm, "step", arm, text.take(batch, BEFORE), True)
    for step in track(range(steps + 1), f"{title} of {batch}"):
        for arm in random.permutation(ARMS).tolist():
            time.sleep(PAUSE)
            took = ask(arm, "step", arm, text.take(*shape), keep)
            if step:
                for name, value in took.items():
                    measured[arm][name].append(value)
    for pipe_arm in ("ram", "disk"):
        ask(pipe_arm, "forget")
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=float, default=12.0, help="GB of both layers")
    parser.add_argument("--budget", type=float, default=0.25, help="of the table")
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--directory", type=Path, default=Path("."), help="on the disk to measure")
    arguments = parser.parse_args()
    record, cells = Record("offload", precision="auto"), {}
    facts: dict[str, Any] = {}
    budget = int(arguments.table * arguments.budget * 1e9)
    text = Text()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        tables = Path(name) / "tables"
        tables.mkdir()
        specification = _specification(int(arguments.table * 1e9))
        for layer in specification.layers:
            write_table(Label(specification=specification, layer=layer, format=FORMAT), tables)
        facts["disk"] = disk_ceilings(tables)
        for backbone in arguments.backbones.split(","):
            directory = Path(name) / backbone
            save_backbone(backbone, specification, directory)
            if backbone == "0.3B":
                facts["first_token_seconds"] = first_tokens(directory, tables, budget)
            with workers(directory, tables, budget) as (ask, facts[backbone]):
                warm_seconds = ask("cached", "warm", text.take(WARM))
                facts[backbone]["warm_seconds"] = warm_seconds
                for batch, (steps, prompts, prompt) in BATCHES.items():
                    for tokens, count in ((prompt, prompts), (1, steps)):
                        count = max(2, int(count * arguments.share))
                        phase = "decode" if tokens == 1 else "prefill"
                        measured = cell(ask, text, (batch, tokens), count, f"{backbone} {phase}")
                        key = f"{backbone}/{phase}/b{batch}"
                        for arm, each in measured.items():
                            cells[f"{key}/{arm}"] = each
                        for arm in THERE[:-1]:
                            found = ratio(cells, key, arm, "ram")
                            print(f"  {arm} {found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})")

    summary = summarize(cells, facts)
    record.write(summary, {"cells": cells, "facts": facts}, seeds=[0])
    draw(cells, facts, record.path)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
