"""Small files that are whole or what they were: written aside, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """NAME.partial, which the block writes. It becomes `path` when the block ends; where that
    fails `path` stays as it was."""
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    os.replace(partial, path)


def write(path: Path, text: str) -> None:
    """As UTF-8."""
    with aside(path) as partial:
        partial.write_text(text, encoding="utf-8")
