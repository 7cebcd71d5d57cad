"""What a run shows while it trains: a bar with rate and time left on a terminal, else lines."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_A_LINE = 10.0
ESTIMATED_AFTER = 5
"""Steps of each run, after which it is said how long the rest will take. The first one, which
compiles and warms up, is not counted."""


class Display:
    """The progress of several runs. names, totals, done: of each; the last two in steps.

    report_steps: how many steps' time a report will take that follows; None: the time that is left
    is not said but shown in the bar.
    """

    def __init__(
        self,
        names: list[str],
        totals: list[int],
        done: list[int],
        console: Console,
        report_steps: int | None = None,
    ) -> None:
        self.report_steps = report_steps
        self.names, self.totals, self.console = names, totals, console
        self._validations = [""] * len(names)
        self._steps = list(done)
        self._told = [float("-inf")] * len(names)
        self._shown = 0
        self._begun: float | None = None
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
        if self.report_steps is not None:
            self._estimate(index, step, now, self.report_steps)

    def _estimate(self, index: int, step: int, now: float, report_steps: int) -> None:
        """Says once how long all runs will take, when each of them has taken a few steps."""
        self._steps[index] = step
        self._shown += 1
        if self._shown == len(self.names):
            self._begun = now
        counted = self._shown - len(self.names)
        if self._begun is None or counted != (ESTIMATED_AFTER - 1) * len(self.names):
            return
        left = sum(self.totals) - sum(self._steps)
        if left > 0:
            seconds = (left + report_steps) * (now - self._begun) / counted
            time_left = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
            report = " and the report" if report_steps else ""
            self.console.print(f"about {time_left} for the {left:,} steps that are left{report}")
