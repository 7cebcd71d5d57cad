"""How long the default report of `engram analyze` takes, of nano-engram.

Gates, lens, bands and addresses:

    python benchmarks/analyze_report.py

The weights are those it begins with: what is measured costs the same. Runs of the whole command, on
all cores; writes results/analyze_report.json, and the summary as the last line. Bound: 120 s.
"""

import engram_lm.openmp  # noqa: F401

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from engram_lm import corpus
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.studies.demo import make_model
from engram_lm.studies.record import Record

RUNS = 3


def main() -> None:
    record = Record("analyze_report")
    tokenizer = corpus.tokenizer()
    seconds, parts = [], []
    with tempfile.TemporaryDirectory() as directory:
        model, out = Path(directory) / "model", Path(directory) / "out"
        make_model("nano-engram", CanonicalMap.from_tokenizer(tokenizer), 0).save_pretrained(model)
        tokenizer.save_pretrained(model)
        command = [sys.executable, "-m", "engram_lm", "analyze", str(model), "--out", str(out)]
        for _ in range(RUNS):
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - begun)
            parts.append(json.loads((out / "analysis.json").read_text())["seconds"])
    summary = {
        "runs": RUNS,
        "threads": torch.get_num_threads(),
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
        **{f"seconds_{part}": statistics.median(each[part] for each in parts) for part in parts[0]},
    }
    record.write(summary, {"seconds": seconds, "parts": parts}, seeds=[0])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
