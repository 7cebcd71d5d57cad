"""Runs taken in turn until they are done: shown while they train, saved when asked to stop."""

from rich.console import Console

from engram_lm.train.console import Display
from engram_lm.train.loop import Run
from engram_lm.train.stopping import Stopping


def train(runs: list[Run], names: list[str], *, report_steps: int = 0) -> None:
    """Steps the runs in turn until all are done, showing the progress of each and, after the first
    steps, how long the rest will take, with a report that takes as long as `report_steps` steps.

    On SIGTERM, or on Ctrl-C, saves all between two steps and raises SystemExit: status 143, 130.
    """
    workers = runs[0].workers
    steps = [run.config.steps for run in runs]
    done = [run.step_number for run in runs]
    console = Console(stderr=True, quiet=not workers.main)
    with (
        Stopping(workers) as stopping,
        Display(names, steps, done, console, report_steps) as display,
    ):
        while not all(run.done for run in runs):
            if stopping.due():
                break
            for index, run in enumerate(runs):
                if not run.done:
                    display.show(index, run.step())
        else:
            return
        for run in runs:
            run.save_checkpoint()
            run.close()
    at = ", ".join(f"step {run.step_number} of {run.config.steps} in {run.out}" for run in runs)
    console.print(f"asked to stop: saved at {at}; the same command goes on", soft_wrap=True)
    raise SystemExit(stopping.status)
