"""Which file of a model's directory holds a tensor."""

import json
from collections.abc import Mapping
from pathlib import Path

from engram_lm.errors import DataError
from engram_lm.store.header import once, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file. An index decides: of each file just the tensors that it names there.

    Without one: those of the one file, or (in a checkpoint without either) of whatever safetensors
    files there are. DataError where there are none, one cannot be read, or two hold one name.
    """
    if (directory / INDEX).exists():
        return _by_index(directory)
    others = sorted(directory.glob("*.safetensors"))
    single = directory / SINGLE
    if single not in others:
        if not others:
            raise DataError(f"{directory}: no {SINGLE} and no {INDEX}")
        files: dict[str, Path] = {}
        for file in others:
            names = read_header(file).tensors
            _refuse_twice(files, file, names)
            files |= dict.fromkeys(names, file)
        return files
    files = dict.fromkeys(read_header(single).tensors, single)
    for file in others:
        if file.name.startswith("model."):  # itself, and variants such as model.fp16.safetensors
            continue
        try:
            names = read_header(file).tensors
        except DataError:  # nothing is read from it
            continue
        _refuse_twice(files, file, names)
    return files


def check_one_save(directory: Path) -> None:
    """DataError where one file and an index that does not name it are both there: transformers
    reads the one file then, and engines that go by the index read others."""
    both = (directory / SINGLE).exists() and (directory / INDEX).exists()
    if both and directory / SINGLE not in _by_index(directory).values():
        raise DataError(
            f"{directory}: {SINGLE} and {INDEX}, which does not name it, are of two saves: remove "
            "what is older"
        )


def check_as_transformers_reads(directory: Path) -> None:
    """DataError where from_pretrained would read another tensor than the index names.

    It reads all of the files that an index names, and of a name that two hold the last.
    """
    check_one_save(directory)
    files = _by_index(directory) if (directory / INDEX).exists() else {}
    for file in sorted(set(files.values())):
        try:
            names = read_header(file).tensors
        except DataError:  # it says itself what is missing or damaged
            continue
        for name in names:
            if files.get(name, file) != file:
                raise DataError(
                    f"{directory}: {name} is in {files[name].name}, as {INDEX} says, and in "
                    f"{file.name} too: transformers would read the last"
                )


def _by_index(directory: Path) -> dict[str, Path]:
    index = directory / INDEX
    try:
        names = json.loads(index.read_text(), object_pairs_hook=once)["weight_map"]
        paths = {file: directory / file for file in set(names.values())}
        files = {name: paths[file] for name, file in names.items()}
    except OSError as error:
        raise DataError(f"{index}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{index}: not an index of weights ({str(error)[:80]!r})") from error
    for file, path in paths.items():
        if path.parent != directory or path.name != file:
            raise DataError(f"{index}: names the file {file[:80]!r}: one beside it is needed")
    return files


def _refuse_twice(files: Mapping[str, Path], file: Path, names: Mapping[str, object]) -> None:
    if twice := files.keys() & names.keys():
        name = min(twice)
        raise DataError(
            f"{file.parent}: {name} is in {files[name].name} and in {file.name}, and there is no "
            f"{INDEX} to say which counts"
        )
