"""What two runs, or two directories, are compared by."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt


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
