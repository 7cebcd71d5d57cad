"""A training step of the demo's Engram model with 1e5 to 1e8 rows of 8 values in its two tables.

    python benchmarks/table_size.py

One model a size, all in one process and in turn, so that the machine's drift falls on all of them.
Rows are those of the corpus, or drawn uniformly over the table. Every page of tables and moments
is written before the first step that counts. The aim is a step within 1.25 times the smallest
table's; the optimiser's part is also given alone, and what memory the process took for each size
beyond table and moments (for the first also what all share: libraries, text, space for a step).
Sizes that the machine has no memory for are refused. Writes results/table_size.json, .svg and
.png; the last line printed is the summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import gc
import json
import mmap
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor

from engram_lm import corpus
from engram_lm.analysis.figures import BLUE, INK, VERMILION, save
from engram_lm.errors import ConfigError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.window import Window
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.model.presets import configure, nano_engram
from engram_lm.studies.record import Record
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig
from engram_lm.train.loop import Run
from engram_lm.train.text import wordnet_stream

AIM = 1.25
DRAWS = ("text", "uniform")
WARM = 2
VALUE_BYTES = 4


class Uniform(Addresses):
    """Row numbers of no text: each is drawn from all of its layer's."""

    def window_rows(self, window: Window) -> Tensor:
        """(L, B, T, H) int64."""
        rows_LBTH = super().window_rows(window)
        for layer, rows_BTH in zip(self.layers, rows_LBTH, strict=True):
            rows_BTH.random_(self.specification.table_rows(layer))
        return rows_LBTH


class Size:
    """A model with about `wanted` rows, its run, and what its steps took."""

    def __init__(self, wanted: int, config: TrainConfig, out: Path) -> None:
        before = resident()
        preset = nano_engram()
        assert preset.memory_config is not None
        specification = preset.memory_config.specification
        heads = len(specification.layers) * specification.heads_per_layer
        changes = {"memory.specification.rows_per_head": [wanted // heads] * 2}
        torch.manual_seed(0)
        model = EngramLMForCausalLM(configure(preset, changes))
        tokenizer = corpus.tokenizer()
        model.set_canonical_map(CanonicalMap.from_tokenizer(tokenizer))
        addresses = model.model.addresses
        assert addresses is not None
        self.addresses: dict[str, Addresses] = {
            "text": addresses,
            "uniform": Uniform(addresses.specification, addresses.canonical),
        }
        self.run = Run(
            model,
            tokenizer,
            config,
            out,
            training=wordnet_stream("train", config.tokens + 1),
            validation=wordnet_stream("validation", 1000),
        )
        rows = self.run.optimizers.rows
        assert rows is not None
        self.optimizer = rows
        self.rows = sum(len(table.weight) for table in rows.tables)
        rows.materialise()
        for state in rows.state.values():
            for moment in state.values():
                moment.zero_()
        self.held = sum(
            tensor.nbytes
            for table in rows.tables
            for tensor in (table.weight, *rows.state[table.weight].values())
        )
        self.seconds: dict[str, list[float]] = {draw: [] for draw in DRAWS}
        self.optimizer_seconds: dict[str, list[float]] = {draw: [] for draw in DRAWS}
        self.moved: dict[str, list[int]] = {draw: [] for draw in DRAWS}
        self._started = 0.0
        rows.register_step_pre_hook(self._start)
        rows.register_step_post_hook(self._stop)
        gc.collect()
        self.resident = resident() - before
        """Bytes that the process has grown by; the steps' own memory is added later."""

    def step(self, draw: str) -> None:
        """One of the rows of the text, or of rows drawn uniformly."""
        self.draw = draw
        self.run.model.model.addresses = self.addresses[draw]
        started = time.perf_counter()
        self.run.step()
        self.seconds[draw].append(time.perf_counter() - started)

    def median(self, draw: str, *, optimizer: bool = False) -> float:
        """Seconds of the steps that count."""
        seconds = self.optimizer_seconds if optimizer else self.seconds
        return statistics.median(seconds[draw][WARM:])

    def _start(self, *_: Any) -> None:
        gradients = [table.row_gradient for table in self.optimizer.tables]
        self.moved[self.draw].append(sum(len(each.rows_U) for each in gradients if each))
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.optimizer_seconds[self.draw].append(time.perf_counter() - self._started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="counted steps of each size and draw")
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6, 1e7, 1e8])
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_flush_denormal(True)
    needed = sum(map(int, arguments.rows)) * 3 * 8 * VALUE_BYTES + 3 * 2**30
    if available() < needed:
        raise ConfigError(f"rows={arguments.rows}: {needed / 1e9:.1f} GB of free memory are needed")
    record, console = Record("table_size", precision="auto"), Console(stderr=True)
    steps = len(DRAWS) * (WARM + arguments.steps)
    config = TrainConfig(tokens=(steps + 1) * 4096, evaluate_every=10**6, checkpoint_every=10**6)
    with tempfile.TemporaryDirectory() as directory:
        sizes = []
        for wanted in track(arguments.rows, "drawing rows", console=console):
            sizes.append(Size(int(wanted), config, Path(directory) / f"{wanted:.0e}"))
            before = resident()
            for draw in DRAWS:
                sizes[-1].step(draw)
            sizes[-1].resident += resident() - before
        rounds = range(WARM + arguments.steps - 1)
        for _ in track(rounds, "steps", console=console):
            for size in sizes:
                for draw in DRAWS:
                    size.step(draw)
        for size in sizes:
            size.run.close()
    summary = summarise(sizes, arguments.rows)
    raw = {
        f"{wanted:.0e}": {
            "rows": size.rows,
            "seconds": size.seconds,
            "optimizer_seconds": size.optimizer_seconds,
            "rows_moved": size.moved,
        }
        for wanted, size in zip(arguments.rows, sizes, strict=True)
    }
    record.write(summary, raw, seeds=[0])
    save(figure(sizes), Path("results"), "table_size")
    print(json.dumps(summary))


def summarise(sizes: list[Size], wanted: list[float]) -> dict[str, float]:
    """Milliseconds, ratios to the smallest table, rows moved a step, megabytes."""
    summary: dict[str, float] = {"aim": AIM}
    for draw in DRAWS:
        for rows, size in zip(wanted, sizes, strict=True):
            name = f"{draw}_{rows:.0e}".replace("+0", "")
            pairs = zip(size.seconds[draw][WARM:], sizes[0].seconds[draw][WARM:], strict=True)
            optimizer = size.median(draw, optimizer=True)
            summary |= {
                f"{name}_step_ms": size.median(draw) * 1e3,
                f"{name}_step_ratio": statistics.median(mine / least for mine, least in pairs),
                f"{name}_optimizer_ms": optimizer * 1e3,
                f"{name}_optimizer_ratio": optimizer / sizes[0].median(draw, optimizer=True),
                f"{name}_rows_moved": statistics.median(size.moved[draw][WARM:]),
            }
    for rows, size in zip(wanted, sizes, strict=True):
        name = f"{rows:.0e}".replace("+0", "")
        summary[f"{name}_table_and_moments_mb"] = size.held / 1e6
        summary[f"{name}_resident_beyond_mb"] = (size.resident - size.held) / 1e6
    return summary


def figure(sizes: list[Size]) -> Figure:
    """Milliseconds of a step and of the row optimiser in it, over rows."""
    shown = Figure(figsize=(4.4, 3.1), layout="constrained")
    axes = shown.add_subplot()
    rows = [size.rows for size in sizes]
    for draw, colour, marker in zip(DRAWS, (BLUE, VERMILION), ("o", "s"), strict=True):
        for optimizer, line in ((False, "-"), (True, "--")):
            axes.plot(
                rows,
                [size.median(draw, optimizer=optimizer) * 1e3 for size in sizes],
                line,
                color=colour,
                marker=marker,
                markerfacecolor="white" if optimizer else colour,
                label=f"{'row optimiser' if optimizer else 'whole step'}, {draw}",
            )
    least = max(sizes[0].median(draw) for draw in DRAWS) * 1e3
    axes.axhline(AIM * least, color=INK, linewidth=0.8, linestyle=":", label=f"aim, {AIM} x")
    axes.set(xscale="log", xlabel="rows of 8 values", ylabel="milliseconds", ylim=(0, None))
    axes.legend(frameon=False, fontsize=7.5, loc="center left")
    return shown


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def available() -> int:
    """Bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
