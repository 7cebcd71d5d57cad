"""docs/training.md: its commands parse, and its table of figures is what a run logs."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

from test_telemetry import EXACT, make_run  # noqa: F401  (a fixture)

from engram_lm.cli import parser
from engram_lm.train.config import TrainConfig
from engram_lm.train.journal import read_metrics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()


def test_every_command_is_one_that_parses():
    lines = "".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)).splitlines()
    assert len(lines) >= 5
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "torchrun":
            program, arguments = "engram", arguments[arguments.index("engram_lm") + 1 :]
        assert program == "engram"
        parser().parse_args(arguments)


def test_every_setting_that_is_named_is_one():
    for name in re.findall(r"`train\.(\w+)`", PAGE):
        assert hasattr(TrainConfig(), name), name


def test_every_figure_that_is_logged_is_explained(make_run, tmp_path):  # noqa: F811
    run = make_run(tmp_path, replace(EXACT, evaluate_every=1))
    run.step()
    run.close()
    section = PAGE.split("## What is logged")[1].split("\n## ")[0]
    explained = set()
    group = ""
    for cell in re.findall(r"^\| (`[^|]*) \|", section, flags=re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            group = name.partition("/")[0] if "/" in name[1:] else group
            explained.add(name if name[0] != "/" else group + name)
    (line,) = read_metrics(tmp_path)
    for name in line:
        general = re.sub(r"(layer|table)_\d+", r"\1_1", name)
        assert {name, general, re.sub(r"/.*", "/…", general)} & explained, name
    optional = {"memory/gpu", "memory/gpu_peak", "exchanged_bytes"}
    optional |= {"checkpoint_seconds", "checkpoint_bytes"}  # a step after the first checkpoint
    for name in explained - optional:
        assert any(logged.startswith(name.rstrip("…")) for logged in line), name


def test_the_recipes_command_is_one_that_parses(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from train_debian_text import train_command

    command = train_command(Path("a/shards"), Path("b"), workers=2, tokens=4096)
    parsed = parser().parse_args(command[command.index("engram_lm") + 1 :])
    assert (parsed.data, parsed.out, parsed.tokens) == (Path("a/shards"), Path("b"), 4096)
    assert "--nproc-per-node=2" in command
