"""Workers under torchrun that are asked to stop, die or hang; every signal is a real one."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from test_train import final
from torchrun import children, start, wait_for_steps

from engram_lm.errors import ConfigError
from engram_lm.train.journal import read_metrics
from engram_lm.train.workers import Workers

LONG = "--set=train.tokens=1280000"  # 10,000 steps: nobody waits for the end
RARE = "--set=train.checkpoint_every=1000"


def end(process: "subprocess.Popen[str]", seconds: float) -> str:
    """What it wrote to stderr; killed, with all its workers, where it takes longer."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def told(errors: str) -> list[str]:
    """Our lines, without those of torchrun."""
    return [
        line for line in errors.splitlines() if re.match(r"asked to|worker \d|engram train", line)
    ]


def starts(out: Path) -> list[int]:
    return [start["step"] for start in json.loads((out / "config.json").read_text())["starts"]]


def test_asked_workers_save_together_and_survivors_of_a_killed_one_stop(prepared, tmp_path):
    process = start(tmp_path, prepared, LONG, RARE)
    wait_for_steps(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on to both
    lines = told(end(process, 60))
    step = final(tmp_path)["step"]
    assert lines == [
        f"asked to stop: saved at step {step} of 10000 in {tmp_path}; the same command goes on"
    ]
    assert 3 <= step == read_metrics(tmp_path)[-1]["step"]

    before = final(tmp_path)
    process = start(tmp_path, prepared, LONG, RARE)
    wait_for_steps(tmp_path, step + 3, process)
    os.kill(children(process)[1], signal.SIGKILL)
    errors = end(process, 60)  # a minute
    assert process.returncode == 1
    lines = told(errors)
    assert len(lines) == 1, errors
    assert lines[0].startswith("engram train: error: worker 0 of 2: another worker died")
    assert starts(tmp_path) == [0, step]
    assert final(tmp_path)["step"] == before["step"]  # whole, and the previous one


@pytest.mark.long
def test_workers_of_one_that_hangs_end_unsaved_when_they_are_asked_to_stop(prepared, tmp_path):
    process = start(tmp_path, prepared, LONG, RARE)
    wait_for_steps(tmp_path, 3, process)
    main, other = children(process)
    os.kill(other, signal.SIGSTOP)
    time.sleep(1)
    asked = time.monotonic()
    os.kill(main, signal.SIGTERM)
    while Path(f"/proc/{main}").exists() and time.monotonic() < asked + 60:
        if Path(f"/proc/{main}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    assert 19 < time.monotonic() - asked < 60
    (line,) = told(end(process, 90))  # torchrun gives the stopped one 30 s
    assert line.startswith("worker 0 of 2: asked to stop, but the workers did not meet within 20 s")
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_more_workers_than_sequences_are_told_so_once(prepared, tmp_path):
    process = start(tmp_path, prepared, LONG, "--set=train.micro_batches=3")
    assert told(end(process, 120)) == [
        "engram train: error: batch=4: 2 workers with micro_batches=3 need 6 sequences a step or "
        "more"
    ]


def test_where_the_first_worker_fails_alone_the_others_end_without_a_word(monkeypatch, capsys):
    monkeypatch.setattr(Workers, "store", dist.HashStore())
    with pytest.raises(ConfigError, match="wrong"), Workers(0, 2).main_first("settings"):
        raise ConfigError("wrong")
    with pytest.raises(SystemExit) as end, Workers(1, 2).main_first("settings"):
        pytest.fail("the second worker went on")
    assert end.value.code == 2 and capsys.readouterr() == ("", "")
