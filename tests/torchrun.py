"""`engram train` under torchrun, small, as a user would start it."""

import os
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = ("batch=4", "context=32", "precision=fp32", "evaluate_every=1000")
MODEL = ("hidden_size=32", "num_hidden_layers=4")
MODEL += ('mlp_layer_types=["sparse","sparse","sparse","sparse"]',)
MODEL += ('memory.specification.rows_per_head=["97","97"]',)


def command(out: Path, data: Path | None, *extra: str, workers: int = 2) -> list[str]:
    base = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    base += [f"--nproc-per-node={workers}", "-m", "engram_lm", "train"]
    base += [f"--out={out}", "--threads=1", "--json", "--set=train.validation_tokens=300"]
    base += [f"--set=train.{setting}" for setting in SETTINGS]
    base += [] if data is None else [f"--data={data}"]
    return [*base, *(f"--set=model.{setting}" for setting in MODEL), *extra]


def start(out: Path, data: Path | None, *extra: str, workers: int = 2) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(out, data, *extra, workers=workers),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def children(process: "subprocess.Popen[str]") -> list[int]:
    """Process ids of the workers, main first."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == process.pid:
            ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
            found.update({rank: int(entry.name) for rank in ranks})
    return [found[rank] for rank in sorted(found)]


def wait_for_steps(out: Path, steps: int, process: "subprocess.Popen[str]") -> None:
    path = out / "metrics.jsonl"
    deadline = time.monotonic() + 300  # never reached: a guard against waiting for ever
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
