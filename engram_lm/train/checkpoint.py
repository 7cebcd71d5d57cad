"""One file from which a run goes on bit for bit: weights, moments, router bias, step."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engram_lm.errors import DataError, MismatchError

FILE_NAME = "checkpoint.pt"


def save(directory: Path, state: dict[str, Any]) -> None:
    """Writes aside, then renames: a run that is killed leaves the previous checkpoint whole."""
    path = directory / FILE_NAME
    aside = path.with_suffix(".partial")
    torch.save(state, aside)
    os.replace(aside, path)


def load(directory: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of a directory, or None where there is none.

    MismatchError where its `identity` (specification, data, training settings) is another.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        recorded = state["identity"]
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: not a whole checkpoint ({error})") from error
    found = difference("", recorded, identity)
    if found is not None:
        raise MismatchError(f"{path}: {found}; use another --out, or delete the directory")
    return state


def difference(name: str, recorded: Any, wanted: Any) -> str | None:
    """The first leaf in which two nested records differ, in words."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        for key in sorted(recorded.keys() | wanted.keys()):
            inside = f"{name}.{key}" if name else key
            found = difference(inside, recorded.get(key), wanted.get(key))
            if found is not None:
                return found
        return None
    return None if recorded == wanted else f"{name} is {recorded!r}, this run has {wanted!r}"


def sha256(ids: npt.NDArray[np.integer]) -> str:
    """Of a token stream: a run goes on only with the data it began with."""
    return hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()
