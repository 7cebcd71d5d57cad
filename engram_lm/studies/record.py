"""results/NAME.json: what a study or benchmark measured, and all that is needed to repeat it."""

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_lm import whole
from engram_lm.precision import choose
from engram_lm.train.provenance import commit, machine


class Record:
    """One study or benchmark. Made when it starts: commit and time are those it ran with.

    precision: "auto", "bf16" or "fp32", of the models it trains or asks; None where it has none.
    """

    def __init__(self, name: str, precision: str | None = None) -> None:
        self.precision = None if precision is None else choose(precision).name
        self.path = Path("results") / f"{name}.json"
        self.commit = commit()
        self.started = time.perf_counter()

    def write(
        self,
        summary: Mapping[str, float],
        raw: Mapping[str, Any],
        *,
        seeds: list[int],
        before: float = 0.0,
    ) -> None:
        """Writes results/NAME.json under the working directory.

        summary: flat, name -> number; the only place that README and docs quote from. before:
        seconds that processes before this one took for it.
        """
        record = {
            "summary": dict(summary),
            "command": shlex.join(["python", *sys.argv]),
            "commit": self.commit,
            "machine": machine(),
            "precision": self.precision,
            "seeds": seeds,
            "wall_seconds": before + time.perf_counter() - self.started,
            "raw": dict(raw),
        }
        self.path.parent.mkdir(exist_ok=True)
        whole.write(self.path, json.dumps(record, indent=1, allow_nan=False) + "\n")
