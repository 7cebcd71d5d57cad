"""OpenMP's threads sleep soon while they wait: in the command, its workers and all scripts."""

from engram_lm.openmp import SPINS

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    path
    for folder in ("recipes", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text() and re.search(r"^import torch$", path.read_text(), re.M)
]


def settings(command: list[str], **given: str) -> list[tuple[str, str]]:
    """(OMP_WAIT_POLICY, GOMP_SPINCOUNT) of every process that loaded GNU OpenMP, as it says."""
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
    run = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True
    )
    assert run.returncode == (0 if "budget" in command else 1), run.stderr
    policies = re.findall(r"OMP_WAIT_POLICY = '(\w+)'", run.stderr)
    spins = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)
    if not spins:
        pytest.skip("torch is not built with GNU OpenMP here, whose setting this is")
    return list(zip(policies, spins, strict=True))


def test_the_commands_threads_sleep_soon():
    assert settings(["engram_lm", "budget", "--preset", "nano-moe"]) == [("PASSIVE", str(SPINS))]


def test_what_the_user_has_set_stays():
    budget = ["engram_lm", "budget", "--preset", "nano-moe"]
    assert settings(budget, OMP_WAIT_POLICY="ACTIVE")[0][0] == "ACTIVE"
    assert settings(budget, GOMP_SPINCOUNT="17")[0][1] == "17"


def test_torchruns_workers_do_too(tmp_path):
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "engram_lm"]
    train = ["train", "--preset", "no-such-preset", "--out", str(tmp_path)]
    found = settings([*launch, *train])
    assert found.count(("PASSIVE", str(SPINS))) == 2  # the third is torchrun itself


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_scripts_say_it_before_torch_is_imported(path):
    first = next(
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    )
    names = [first.module] if isinstance(first, ast.ImportFrom) else [a.name for a in first.names]
    assert names == ["engram_lm.openmp"]


def test_importing_it_does_not_import_torch():
    code = "import sys, engram_lm.openmp, engram_lm.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
