"""Checkpoints: whole or absent, read by any number of workers, refused with one line."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from engram_lm.errors import DataError, MismatchError
from engram_lm.train import blocks, checkpoint
from engram_lm.train.blocks import Blocks

IDENTITY = {"train": {"lr": 0.1}, "specification_sha256": "ab"}
ROWS = 100


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    table = torch.randn(ROWS, 8, generator=generator)
    return {
        "model.table": Blocks(table, 0, ROWS),
        "model.weight": torch.randn(5, 3, generator=generator).bfloat16(),
        "adam.weight.step": torch.tensor(float(step)),
    }


def values(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: getattr(tensor, "local", tensor) for name, tensor in named.items()}


def save(out: Path, step: int) -> checkpoint.Saved:
    return checkpoint.save(out, tensors(step), {"identity": IDENTITY, "step": step})


def taken(out: Path) -> int:
    """The step that a new start goes on from, all its values checked."""
    found = checkpoint.find(out, IDENTITY)
    assert found is not None
    room = tensors(0)
    found.read(room)
    step = found.record["step"]
    for name, value in values(tensors(step)).items():
        assert torch.equal(value, values(room)[name]), name
    return step


def whole(path: Path) -> dict:
    """Everything in a checkpoint, read without a line of ours."""
    with warnings.catch_warnings():  # without a process group it says so
        warnings.simplefilter("ignore")
        dcp_to_torch_save(path, path.parent / "whole.pt")
    return torch.load(path.parent / "whole.pt")


@pytest.mark.parametrize("size", [1, 1000, 2**20])
def test_rows_go_in_blocks_and_come_back(tmp_path, monkeypatch, size):
    monkeypatch.setattr(blocks, "BYTES", size)
    saved = save(tmp_path, 1)
    assert saved.bytes > ROWS * 8 * 4
    path = tmp_path / "checkpoints" / "step-00000001"
    table = whole(path)["model.table"]
    assert torch.equal(table, tensors(1)["model.table"].local)
    chunks = checkpoint.find(tmp_path, IDENTITY).shapes["model.table"].chunks
    assert len(chunks) == {1: 100, 1000: 4, 2**20: 1}[size]  # 31 rows of 32 bytes in 1000 bytes
    monkeypatch.setattr(blocks, "BYTES", 1234)
    assert taken(tmp_path) == 1


def test_the_last_whole_checkpoint_stays_and_a_stale_one_goes(tmp_path):
    save(tmp_path, 1)
    stale = tmp_path / "checkpoints" / "step-00000007.partial"
    stale.mkdir()
    (stale / "__0_0.distcp").write_bytes(b"half")
    assert taken(tmp_path) == 1
    save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"]
    assert taken(tmp_path) == 2


KILL = """
import json, os, shutil, signal, sys
from pathlib import Path
import test_checkpoint as t
from engram_lm.train import blocks

def die_at(moment, out):
    count = 0
    def pass_by(*_):
        nonlocal count
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    events = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
    def audit(event, arguments):
        if event in events and str(out) in str(arguments[0]):
            pass_by()
    sys.addaudithook(audit)
    fsync, shard = os.fsync, blocks.Blocks.__get_tensor_shard__
    os.fsync = lambda file: (pass_by(), fsync(file))
    blocks.Blocks.__get_tensor_shard__ = lambda *a: (pass_by(), shard(*a))[1]

blocks.BYTES = 1000
base, steps = Path(sys.argv[1]), []
t.save(base / "first", 1)
while True:
    out = base / str(len(steps))
    shutil.copytree(base / "first", out)
    child = os.fork()
    if not child:
        die_at(len(steps), out)
        t.save(out, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    steps.append(t.taken(out))
    t.save(out, 3)
    assert os.listdir(out / "checkpoints") == ["step-00000003"] and t.taken(out) == 3
    if not os.WIFSIGNALED(status):
        break
print(json.dumps(steps))
"""


def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)
    assert len(steps) > 20 and steps == sorted(steps)
    assert set(steps) == {1, 2} and steps.count(1) > 10 < steps.count(2) + 5


def path_of(out: Path) -> Path:
    (path,) = (out / "checkpoints").iterdir()
    return path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: cut(path / "__0_0.distcp"), r"__0_0.distcp has 1000 bytes, \d+ are recorded"),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
        (lambda path: cut(path / ".metadata", 10), r".metadata has 10 bytes, \d+ are recorded"),
        (lambda path: (path / "checkpoint.json").unlink(), "checkpoint.json: No such file"),
        (lambda path: cut(path / "checkpoint.json", 30), "checkpoint.json: Unterminated string"),
        (lambda path: unnoticed(path), "EOFError"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_one_line(tmp_path, damage, words):
    save(tmp_path, 1)
    damage(path_of(tmp_path))
    with pytest.raises(DataError, match=f"step-00000001: not a whole checkpoint .*{words}") as info:
        taken(tmp_path)
    assert "\n" not in str(info.value)


def cut(file: Path, size: int = 1000) -> None:
    file.write_bytes(file.read_bytes()[:size])


def unnoticed(path: Path) -> None:
    """A file that is short although its recorded size says it is not."""
    cut(path / "__0_0.distcp")
    record = json.loads((path / "checkpoint.json").read_text())
    record["files"]["__0_0.distcp"] = 1000
    (path / "checkpoint.json").write_text(json.dumps(record))


def test_another_identity_form_or_tensor_is_refused(tmp_path):
    save(tmp_path, 1)
    other = {"train": {"lr": 0.1}, "specification_sha256": "cd"}
    with pytest.raises(MismatchError, match="specification_sha256 is 'ab', this run has 'cd'"):
        checkpoint.find(tmp_path, other)
    found = checkpoint.find(tmp_path, IDENTITY)
    room = tensors(0)
    with pytest.raises(MismatchError, match="it lacks model.other"):
        found.read({**room, "model.other": torch.zeros(1)})
    with pytest.raises(MismatchError, match="it has more than this run: adam.weight.step and"):
        found.read({"model.table": room["model.table"]})
    with pytest.raises(MismatchError, match=r"model.weight has shape \(5, 3\), .* \(5, 4\)"):
        found.read({**room, "model.weight": torch.zeros(5, 4)})
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(MismatchError, match="checkpoint.pt: a checkpoint of an earlier version"):
        checkpoint.find(tmp_path, IDENTITY)


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save(tmp_path, 1)
    place = FileSystem.concat_path

    def full(self, path, name):
        return Path("/dev/full") if name.endswith(".distcp") else place(self, path, name)

    monkeypatch.setattr(FileSystem, "concat_path", full)
    words = r"step-00000002: cannot be written \(No space left on device\); the checkpoint before"
    with pytest.raises(DataError, match=words):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert taken(tmp_path) == 1
    save(tmp_path, 2)
    assert taken(tmp_path) == 2
