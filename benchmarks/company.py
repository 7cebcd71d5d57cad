"""What a training step costs alone and beside other work, by how OpenMP's threads wait.

    python benchmarks/company.py

A process for each case trains the demo's Engram arm; they take turns, a step each, so that the
machine's drift falls on all. First alone, then beside a process that keeps one core busy. Cases:
OpenMP as it comes (threads spin for milliseconds, then sleep), threads that sleep at once
(OMP_WAIT_POLICY=PASSIVE), threads that spin for some rounds before they sleep (GOMP_SPINCOUNT;
`command` is what engram_lm/openmp.py sets), and one thread. Ceiling: OpenMP as it comes, alone.
Writes results/company.json; the last line printed is its summary.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CASES: dict[str, dict[str, str]] = {
    "as_it_comes": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "command": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2500"},
    "spin_1000": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"},
    "one_thread": {"OMP_NUM_THREADS": "1"},
}
"""What a worker's environment has of VARIABLES. Nothing here may import engram_lm.openmp before the
workers have imported torch: it would set them for all."""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
WARM = 2


class Worker:
    """A process that takes a step when it is asked for one, and sleeps in between."""

    def __init__(self, environment: dict[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env={**kept, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> float:
        """Milliseconds of one step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def work() -> None:
    """A step for each line on standard input; its milliseconds on standard output."""
    import torch  # with the environment of the case
    from arms import both_arms

    from engram_lm.train.allocator import keep_freed_memory

    torch.set_flush_denormal(True)
    keep_freed_memory()
    with both_arms(500) as runs:
        for _ in sys.stdin:
            begun = time.perf_counter()
            runs["Engram"].step()
            print(1e3 * (time.perf_counter() - begun), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--worker", action="store_true", help="take steps when asked (internal)")
    arguments = parser.parse_args()
    if arguments.worker:
        return work()
    from engram_lm.openmp import SPINS

    from engram_lm.studies.record import Record

    assert CASES["command"]["GOMP_SPINCOUNT"] == str(SPINS)
    record = Record("company", precision="auto")
    workers = {case: Worker(CASES[case]) for case in arguments.cases}
    taken: dict[str, dict[str, list[float]]] = {}
    for company in ("alone", "beside"):
        busy = None
        if company == "beside":
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        steps: dict[str, list[float]] = {case: [] for case in workers}
        for turn in range(WARM + arguments.rounds):
            for case, worker in workers.items():
                milliseconds = worker.step()
                if turn >= WARM:
                    steps[case].append(milliseconds)
        if busy is not None:
            busy.kill()
        taken[company] = steps
    for worker in workers.values():
        worker.close()
    summary: dict[str, float] = {"rounds": arguments.rounds}
    for case in workers:
        alone, beside = taken["alone"][case], taken["beside"][case]
        first = taken["alone"][arguments.cases[0]]
        over = [a / b for a, b in zip(alone, first, strict=True)]
        summary[f"{case}_alone_ms"] = statistics.median(alone)
        summary[f"{case}_beside_ms"] = statistics.median(beside)
        summary[f"{case}_alone_over_{arguments.cases[0]}"] = statistics.median(over)
        summary[f"{case}_beside_over_alone"] = statistics.median(beside) / statistics.median(alone)
        print({name: round(value, 3) for name, value in summary.items() if name.startswith(case)})
    record.write(summary, {"milliseconds": taken}, seeds=[0])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
