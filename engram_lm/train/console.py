"""What a run shows while it trains: a bar with rate and time left on a terminal, else lines."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_A_LINE = 10.0


class Display:
    """The progress of several runs. names, totals, done: of each; the last two in steps."""

    def __init__(
        self, names: list[str], totals: list[int], done: list[int], console: Console
    ) -> None:
        self.names, self.totals, self.console = names, totals, console
        self._validations = [""] * len(names)
        self._told = [float("-inf")] * len(names)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = [
            self._bars.add_task(name, total=total, completed=steps, note="")
            for name, total, steps in zip(names, totals, done, strict=True)
        ]

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def show(self, index: int, record: Mapping[str, float]) -> None:
        """A step of one run: on a terminal each, else one in ten seconds and the last."""
        step, total = int(record["step"]), self.totals[index]
        if "validation_bpb" in record:
            self._validations[index] = f"  validation bpb {record['validation_bpb']:.3f}"
        note = f"loss {record['loss']:.3f}  bpb {record['bpb']:.3f}{self._validations[index]}"
        note += f"  {record['tokens_per_second'] / 1000:.1f}k tok/s"
        self._bars.update(self._tasks[index], completed=step, note=note)
        now = time.monotonic()
        due = now - self._told[index] >= SECONDS_A_LINE or step == total
        if not self.console.is_terminal and due:
            self._told[index] = now
            self.console.print(f"{self.names[index]}  step {step}/{total}  {note}", soft_wrap=True)
