"""SIGTERM and Ctrl-C: saved between two steps if all workers agree in time, else not at all."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from test_telemetry import make_run  # noqa: F401  (a fixture)
from test_train import final, losses, states_equal

from engram_lm.train.stopping import Stopping
from engram_lm.train.turns import train
from engram_lm.train.workers import Workers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_between_steps_and_the_run_goes_on_bit_for_bit(
    make_run,  # noqa: F811
    tmp_path,
    capfd,
    number,
):
    whole = make_run(tmp_path / "whole")
    train([whole], ["whole"])
    whole.close()
    before = signal.getsignal(number)
    run = make_run(tmp_path / "cut")
    step = run.step

    def interrupted():
        record = step()
        if record["step"] == 3:  # the last checkpoint was at 2
            os.kill(os.getpid(), number)
        return record

    run.step = interrupted
    with pytest.raises(SystemExit) as ended:
        train([run], ["cut"])
    assert ended.value.code == 128 + number
    assert f"saved at step 3 of 4 in {tmp_path}/cut; the same" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    resumed = make_run(tmp_path / "cut")
    assert resumed.step_number == 3
    train([resumed], ["cut"])
    resumed.close()
    assert states_equal(final(tmp_path / "whole"), final(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_ctrl_c_twice_stops_at_once():
    with Stopping(Workers()) as stopping, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stopping.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_step_that_does_not_end_is_left_without_saving():
    # Nothing that Python would run between two instructions is run in a step that hangs in C.
    code = (
        "import ctypes, os, signal, threading\n"
        "from engram_lm.train.stopping import Stopping\n"
        "from engram_lm.train.workers import Workers\n"
        "with Stopping(Workers(), patience=0.5) as stopping:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    while True: libc.sleep(3600)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("asked to stop, but the step did not end within 0.5 s: nothing saved")


@pytest.mark.parametrize("seed", range(20))
def test_all_workers_stop_at_the_same_boundary(seed):
    # Threads for workers and a barrier for a step's collectives: nobody ends a step that another
    # has not begun. Each worker may be asked at any moment, or never.
    generator = random.Random(seed)
    size, met = 4, dist.HashStore()
    collective = threading.Barrier(size)

    class Together(Workers):
        store = met

    workers = [Stopping(Together(rank, size)) for rank in range(size)]
    asked = [generator.choice([None, generator.uniform(0, 0.02)]) for _ in workers]
    asked[generator.randrange(size)] = generator.uniform(0, 0.02)
    stopped: dict[int, int] = {}

    def work(worker: Stopping) -> None:
        pauses = random.Random((seed, worker.workers.rank).__repr__())
        for step in range(10_000):
            time.sleep(pauses.choice([0, 0.001]))
            if worker.due():
                stopped[worker.workers.rank] = step
                return
            collective.wait(timeout=60)

    def ask(worker: Stopping, delay: float | None) -> None:
        if delay is not None:
            time.sleep(delay)
            worker.signal = signal.SIGTERM

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    threads += [
        threading.Thread(target=ask, args=pair) for pair in zip(workers, asked, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stopped) == size and len(set(stopped.values())) == 1
