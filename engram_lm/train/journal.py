"""What a run writes for its readers: config.json, metrics.jsonl and tensorboard/.

One name a figure, the same in metrics.jsonl and in TensorBoard; docs/training.md lists them. What
stands before a "/" is TensorBoard's group.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_lm import whole

CONFIG, METRICS = "config.json", "metrics.jsonl"


class Journal:
    """The logs of one run, from `step` on: what was logged of later steps is dropped, because they
    will be taken, and logged, again.
    """

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an extra: only training needs it

        self.out = out
        path = out / METRICS
        kept = [line for line in read_metrics(out) if line["step"] <= step]
        whole.write(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def describe(self, record: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Writes config.json: the run's record, and `start` behind the starts it had before."""
        path = self.out / CONFIG
        earlier = json.loads(path.read_text())["starts"] if start["step"] and path.exists() else []
        whole.write(path, json.dumps({**record, "starts": [*earlier, start]}, indent=1) + "\n")

    def write(self, record: Mapping[str, float]) -> None:
        """One step's figures, by name; `step` among them."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._lines.write(json.dumps(record) + "\n")
        shown = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name not in ("step", "tokens")
        ]
        # One event a step: add_scalar would write one for each figure, at a multiple of the cost.
        self._board._get_file_writer().add_summary(Summary(value=shown), int(record["step"]))

    def sync(self) -> None:
        """Everything written so far is on the disk when it returns."""
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where there is no such file."""
    path = out / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
