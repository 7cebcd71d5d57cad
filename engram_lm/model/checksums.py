"""checksums.json: size and sha256 of every file that save_pretrained wrote, README.md excepted.

A model card is for people to edit, and a tokenizer beside the model is checked by the canonical map
and not by its bytes: neither is recorded.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_lm import whole
from engram_lm.errors import DataError
from engram_lm.memory.canonical import FILE_NAME as CANONICAL_MAP
from engram_lm.model.config import REMOTE_CODE
from engram_lm.store.byte_bar import byte_bar

FILE_NAME = "checksums.json"
SPECIFICATION = "specification.json"
FORMAT = "engram-checksums"
VERSION = 1

WEIGHTS = "model*.safetensors"
_NAMES = ("config.json", "generation_config.json", REMOTE_CODE, SPECIFICATION, CANONICAL_MAP)
_LARGE = 2 * 1024**3
"""Bytes from which on hashing takes seconds and shows a bar."""
_PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One file of a directory and what its checksum says of it."""

    name: str
    bytes: int | None
    """None where the file is missing."""
    state: str
    """whole, damaged, missing, extra (weights that nobody recorded) or unlisted."""
    problem: str | None = None


def write(directory: Path) -> None:
    """Records the files of a model."""
    paths = [path for path in _files(directory) if _ours(path)]
    with _bar("checksums", paths) as advance:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path, advance)}
            for path in paths
        }
    record = {"format": FORMAT, "version": VERSION, "files": files}
    whole.write(directory / FILE_NAME, json.dumps(record, indent=1) + "\n")


def verify(directory: Path) -> list[Checked]:
    """Every file of the directory. DataError if checksums.json is missing or cannot be read."""
    recorded = _read(directory / FILE_NAME)
    present = {path.name: path for path in _files(directory)}
    checked = []
    with _bar("verifying", [present[name] for name in recorded if name in present]) as advance:
        for name, record in recorded.items():
            checked.append(_verify(name, present.get(name), record, advance))
    for name, path in present.items():
        if name in recorded or name == FILE_NAME:
            continue
        extra = path.match(WEIGHTS)
        checked.append(
            Checked(
                name=name,
                bytes=path.stat().st_size,
                state="extra" if extra else "unlisted",
                problem=f"extra: {name} is not in {FILE_NAME}" if extra else None,
            )
        )
    return checked


def unverified(directory: Path) -> list[Checked]:
    """Every file of a directory without checksums."""
    return [
        Checked(name=path.name, bytes=path.stat().st_size, state="unlisted")
        for path in _files(directory)
    ]


def sha256(path: Path, advance: Callable[[int], None]) -> str:
    """Of a file of any size; `advance` is told the bytes as they are read."""
    total = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            total.update(piece)
            advance(len(piece))
    return total.hexdigest()


def _verify(
    name: str, path: Path | None, record: dict[str, Any], advance: Callable[[int], None]
) -> Checked:
    if path is None:
        return Checked(name=name, bytes=None, state="missing", problem=f"missing: {name}")
    size = path.stat().st_size
    problem = None
    if size != record["bytes"]:
        problem = f"damaged: {name} has {size} bytes, {record['bytes']} are recorded"
    else:
        found = sha256(path, advance)
        if found != record["sha256"]:
            problem = f"damaged: {name} has sha256 {found}, {record['sha256']} is recorded"
    return Checked(
        name=name, bytes=size, state="whole" if problem is None else "damaged", problem=problem
    )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        record = json.loads(path.read_text())
        if record["format"] != FORMAT or record["version"] != VERSION:
            raise ValueError(f"version {VERSION} of {FORMAT} is needed")
        files = record["files"]
        if not all({"bytes", "sha256"} <= set(file) for file in files.values()):
            raise ValueError("bytes and sha256 of each file are needed")
    except FileNotFoundError:
        raise DataError(f"missing: {path.name}, so no file can be verified") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"damaged: {path.name}: {error}") from error
    return dict(files)


def _ours(path: Path) -> bool:
    return path.name in _NAMES or path.match(WEIGHTS) or path.match("model.safetensors.index*.json")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


@contextmanager
def _bar(what: str, paths: list[Path]) -> Iterator[Callable[[int], None]]:
    """A progress bar over the bytes of some files, with rate; none if they are few."""
    total = sum(path.stat().st_size for path in paths)
    with byte_bar(shown=total >= _LARGE) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
