"""Packs in processes of its own: killed at random writes, or with its memory measured.

A process that has imported everything forks one for each try, so that a try costs milliseconds.
"""

import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

import torch

from engram_lm.memory.rows import RowFormat
from engram_lm.store import pack as pack_module
from engram_lm.store import packed
from engram_lm.store.source import open_sources


def die_at(call: int, draw: random.Random) -> None:
    """Counts calls that change files; at the given one the process is killed, half-way in it."""
    calls = 0

    def wrapped(original, halves: bool):
        def changed(*arguments):
            nonlocal calls
            calls += 1
            if calls == call:
                if halves and draw.random() < 0.7:
                    file, content, offset = arguments
                    original(file, content[: draw.randrange(len(content) + 1)], offset)
                elif draw.random() < 0.5:
                    original(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return changed

    os.pwrite = wrapped(os.pwrite, halves=True)
    for name in ("fdatasync", "fsync", "replace", "ftruncate"):
        setattr(os, name, wrapped(getattr(os, name), halves=False))


def killed(source: Path, out: Path, name: str, layout: str, hot: int, seed: int) -> int:
    """Packs in one process after another, each killed, until one gets through; how many were."""
    hot_K = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:hot] if hot else None
    draw, kills = random.Random(seed), 0
    while True:
        call, child = draw.randint(1, 60), os.fork()
        if not child:
            torch.set_num_threads(1)
            packed.BLOCK_BYTES, pack_module.COMMIT_BLOCKS = 2**13, 4
            die_at(call, random.Random(seed + kills))
            (table, *_) = open_sources(source)
            format = RowFormat.named(name, table.format.dim)
            pack_module.pack(table, format, layout, out, hot_K=hot_K)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return kills
        kills += 1


def growth(source: Path, out: Path, name: str) -> int:
    """Bytes by which resident memory grew at its highest."""
    torch.set_num_threads(1)
    (table, *_) = open_sources(source)
    torch.randn(4).double().round()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pack_module.pack(table, RowFormat.named(name, table.format.dim), "packed", out)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


if __name__ == "__main__":
    what, source, out, name, *more = sys.argv[1:]
    if what == "growth":
        print(json.dumps(growth(Path(source), Path(out), name)))
    else:
        layout, hot, *seeds = more
        kills = [
            killed(
                Path(source), Path(out) / f"{seed}.safetensors", name, layout, int(hot), int(seed)
            )
            for seed in seeds
        ]
        print(json.dumps(kills))
