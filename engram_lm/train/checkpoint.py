"""Checkpoints from which a run goes on: OUT/checkpoints/step-00000050, through
torch.distributed.checkpoint, written by any number of workers and read by any other number.

checkpoint.json holds what a run is compared by (`identity`), its step, and the size of every file.
A directory without ".partial" in its name is whole: it is written aside, flushed to the disk, and
renamed, and only then is the one before it removed. Workers see one file system.
"""

import json
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from engram_lm.errors import DataError, MismatchError
from engram_lm.train.identity import difference
from engram_lm.train.together import Together, reason
from engram_lm.train.workers import lost

FILE_NAME = "checkpoint.json"
FORMAT = "engram-checkpoint"
VERSION = 1
_EARLIER = "checkpoint.pt"


class Saved(NamedTuple):
    """What a save took. bytes: of all workers' files."""

    seconds: float
    bytes: int


class Checkpoints:
    """Those of one run, in OUT/checkpoints. All workers make it, and call its methods together."""

    def __init__(self, out: Path, together: Together) -> None:
        self.out, self.together = out, together

    def save(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> Saved:
        """Writes the checkpoint of record["step"]; one that is there already stays.

        tensors: by name; what workers hold alike is written once. DataError, on all workers, where
        one of them cannot write: the checkpoint before stays whole.
        """
        started = time.perf_counter()
        path = self.out / "checkpoints" / f"step-{record['step']:08d}"
        if not self.together.tell(path.exists()):
            with self._plainly(path, "cannot be written", "; the checkpoint before it is whole"):
                state_dict_saver.save(
                    dict(tensors),
                    storage_writer=_Writer(path, record),
                    process_group=self.together.group,
                )
        files = path.iterdir() if self.together.main else ()
        size = self.together.tell(sum(file.stat().st_size for file in files))
        return Saved(time.perf_counter() - started, size)

    def last(self, identity: dict[str, Any]) -> "Checkpoint | None":
        """The last whole checkpoint, or None where there is none.

        MismatchError where its `identity` (specification, data, training settings) is another, or
        its form is of another version; DataError where a file is missing or has lost bytes.
        """
        return self.together.do(self.out, lambda: _last(self.out, identity))

    def setting(self, name: str) -> Any:
        """What the last checkpoint says of a training setting; None where there is none to read."""
        return self.together.tell(_setting(self.out, name))

    def read(self, checkpoint: "Checkpoint", tensors: dict[str, Tensor]) -> None:
        """Fills these tensors in place, each worker its rows.

        MismatchError where names or shapes are others, DataError where a file is damaged.
        """
        self.together.do(checkpoint.path, lambda: checkpoint.compare(tensors))
        with self._plainly(checkpoint.path, "not a whole checkpoint"):
            state_dict_loader.load(
                dict(tensors),
                storage_reader=FileSystemReader(checkpoint.path),
                process_group=self.together.group,
            )

    @contextmanager
    def _plainly(self, path: Path, words: str, more: str = "") -> Iterator[None]:
        """Turns what torch.distributed.checkpoint raises, on all workers, into one line."""
        together = self.together
        try:
            with warnings.catch_warnings():
                # Rightly so, where there is one process.
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                yield
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            where = f" on worker {rank}" if together.size > 1 else ""
            raise DataError(f"{path}: {words}{where} ({reason(cause)}){more}") from cause
        except RuntimeError as error:
            raise lost(error, together.rank, together.size, str(path)) from error


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. shapes: of its tensors, by name."""

    path: Path
    record: dict[str, Any]
    shapes: dict[str, TensorStorageMetadata]

    def compare(self, tensors: dict[str, Tensor]) -> None:
        """MismatchError unless it holds these, in these shapes, and nothing else."""
        for names, words in (
            (tensors.keys() - self.shapes.keys(), "lacks"),
            (self.shapes.keys() - tensors.keys(), "has more than this run:"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise MismatchError(f"{self.path}: it {words} {min(names)}{more}")
        for name, tensor in tensors.items():
            saved = tuple(self.shapes[name].size)
            if saved != tuple(tensor.shape):
                raise MismatchError(
                    f"{self.path}: {name} has shape {saved}, this run has {tuple(tensor.shape)}"
                )


def _last(out: Path, identity: dict[str, Any]) -> Checkpoint | None:
    if (out / _EARLIER).exists():
        raise MismatchError(
            f"{out / _EARLIER}: a checkpoint of an earlier version, which this one cannot read; "
            "use another --out, or delete it"
        )
    path = _latest(out)
    if path is None:
        return None
    try:
        record = json.loads((path / FILE_NAME).read_text())
        if (record["format"], record["version"]) != (FORMAT, VERSION):
            raise MismatchError(f"{path}: version {VERSION} of {FORMAT} is needed")
        recorded, files = record["identity"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a whole checkpoint ({FILE_NAME}: {reason(error)})") from error
    found = difference("", recorded, identity)
    if found is not None:
        raise MismatchError(f"{path}: {found}; use another --out, or delete the directory")
    for name, size in files.items():
        _check_size(path / name, size)
    try:
        metadata = FileSystemReader(path).read_metadata()
    except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: not a whole checkpoint ({reason(error)})") from error
    shapes = {
        name: saved
        for name, saved in metadata.state_dict_metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    }
    return Checkpoint(path, record, shapes)


def _latest(out: Path) -> Path | None:
    paths = [path for path in (out / "checkpoints").glob("step-*") if not path.suffix]
    return max(paths, key=lambda path: path.name, default=None)


def _setting(out: Path, name: str) -> Any:
    path = _latest(out)
    if path is None:
        return None
    try:
        return json.loads((path / FILE_NAME).read_text())["identity"]["train"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # `last` says what is wrong with it


def _check_size(file: Path, size: int) -> None:
    if not file.exists():
        raise DataError(f"{file.parent}: not a whole checkpoint ({file.name} is missing)")
    if file.stat().st_size != size:
        raise DataError(
            f"{file.parent}: not a whole checkpoint ({file.name} has {file.stat().st_size} bytes, "
            f"{size} are recorded)"
        )


class _Writer(FileSystemWriter):
    """Writes aside. The first worker makes the directory and, when all files are there, names it;
    an error in either reaches all workers.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        super().__init__(_aside(path))
        self.final, self.record = path, record

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.final.parent.glob("*.partial"):
            shutil.rmtree(stale)
        _aside(self.final).mkdir()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save says where in its own code; why is what it met underway.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        aside, together = _aside(self.final), self.final.parent
        written = {result.storage_data.relative_path for each in results for result in each}
        files = {name: (aside / name).stat().st_size for name in (*sorted(written), ".metadata")}
        record = {"format": FORMAT, "version": VERSION, **self.record, "files": files}
        with (aside / FILE_NAME).open("w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _flush(aside)
        os.replace(aside, self.final)
        _flush(together)
        for earlier in together.glob("step-*"):
            if earlier != self.final:
                os.replace(earlier, _aside(earlier))  # so that what keeps its name is whole
                shutil.rmtree(_aside(earlier))


def _aside(path: Path) -> Path:
    return path.with_suffix(".partial")


def _flush(directory: Path) -> None:
    """Names, like bytes, are on the disk only after fsync."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
