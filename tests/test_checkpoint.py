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
from engram_lm.train import blocks
from engram_lm.train.blocks import Blocks
from engram_lm.train.checkpoint import Checkpoints, Saved
from engram_lm.train.together import Together

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


def save(out: Path, step: int) -> Saved:
    return checkpoints(out).save(tensors(step), {"identity": IDENTITY, "step": step})


def checkpoints(out: Path) -> Checkpoints:
    return Checkpoints(out, Together())


def taken(out: Path) -> int:
    """The step that a new start goes on from, all its values checked."""
    found = checkpoints(out).last(IDENTITY)
    assert found is not None
    room = tensors(0)
    checkpoints(out).read(found, room)
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
    chunks = checkpoints(tmp_path).last(IDENTITY).shapes["model.table"].chunks
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
        checkpoints(tmp_path).last(other)
    found = checkpoints(tmp_path).last(IDENTITY)
    room = tensors(0)
    with pytest.raises(MismatchError, match="it lacks model.other"):
        found.compare({**room, "model.other": torch.zeros(1)})
    with pytest.raises(MismatchError, match="it has more than this run: adam.weight.step and"):
        found.compare({"model.table": room["model.table"]})
    with pytest.raises(MismatchError, match=r"model.weight has shape \(5, 3\), .* \(5, 4\)"):
        found.compare({**room, "model.weight": torch.zeros(5, 4)})
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(MismatchError, match="checkpoint.pt: a checkpoint of an earlier version"):
        checkpoints(tmp_path).last(IDENTITY)


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


WORKER = Path(__file__).parent / "checkpoint_worker.py"


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What four processes left that were 4, 2 and 1 workers in turn."""
    out = tmp_path_factory.mktemp("four")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(out), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    said = [process.communicate(timeout=600)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, said
    return out, [json.loads((out / f"{rank}.json").read_text()) for rank in range(4)]


def test_what_any_number_of_workers_saved_any_number_loads_bit_for_bit(four):
    # The processes have compared every tensor; fully_shard's parts, too.
    for seen in four[1][:1]:
        assert {f"{n}->{m}" for n in (1, 2, 4) for m in (1, 2, 4)} <= seen.keys()


def test_losses_and_random_numbers_go_on_bit_for_bit_on_as_many_workers(four):
    for rank, seen in enumerate(four[1]):
        for size in (1, 2, 4):
            if rank < size:
                assert seen[f"{size}->{size}"] == seen[f"from{size}"][3:]


def test_losses_go_on_within_rounding_on_another_number(four):
    seen = four[1][0]
    for n in (1, 2, 4):
        for m in (1, 2, 4):
            went_on = [loss for loss, _ in seen[f"{n}->{m}"]]
            # Muon's Newton-Schulz in bfloat16 makes 3e-5 of a sum's last bit in one step.
            assert went_on == pytest.approx([loss for loss, _ in seen[f"from{n}"][3:]], abs=2e-3)
    draws = [each["1->4"][0][1] for each in four[1]]
    assert len(set(draws)) == 4


def test_an_export_is_the_same_files_from_any_number_of_workers(four):
    from engram_lm.model import EngramLMForCausalLM  # slow: the killed saves do without

    out = four[0]
    names = sorted(path.name for path in (out / "export1").iterdir())
    assert "model.safetensors" in names and "checksums.json" in names
    for size in (2, 4):
        other = out / f"export{size}"
        assert sorted(path.name for path in other.iterdir()) == names
        for name in names:
            assert (other / name).read_bytes() == (out / "export1" / name).read_bytes(), name
    model = EngramLMForCausalLM.from_pretrained(out / "export4")
    wanted = torch.load(out / "from4.pt")
    for name, value in model.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(value, wanted[f"model.{name}"]), name


def test_an_error_on_one_worker_is_said_by_all_and_none_hangs(four):
    out, seen = four
    full, export, short = zip(*(each["faults"][:3] for each in seen), strict=True)
    for lines in (full, export, short):
        assert len(set(lines)) == 1 and "\n" not in lines[0]
    assert "step-00000002: cannot be written on worker 1 (No space left on device)" in full[0]
    assert export[0].startswith("DataError: ") and "No space left on device" in export[0]
    assert "step-00000001: not a whole checkpoint on worker" in short[0]
    for each in seen[:3]:  # the fourth died
        (line,) = each["faults"][3:]
        assert line.startswith("WorkerError: worker") and "died" in line
    assert taken_steps(out / "faults") == ["step-00000003"]


def taken_steps(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir() if not p.suffix)
