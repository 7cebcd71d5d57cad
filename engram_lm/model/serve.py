"""A saved model whose rows stay in its files: found by their names, read in place.

What a memory budget pays for: rows kept because they were asked for last, and pages on their way.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from engram_lm.errors import ConfigError
from engram_lm.memory.served import Served
from engram_lm.model.units import bytes_of, size_text
from engram_lm.store.cache import Cache
from engram_lm.store.disk import Disk
from engram_lm.store.source import open_sources

AHEAD = 8
"""Part of a budget that pages on their way may take: one in so many."""

_IN_FILES: ContextVar[bool] = ContextVar("rows stay in files", default=False)


@contextmanager
def rows_in_files() -> Iterator[None]:
    """Inside, models are made without tables."""
    token = _IN_FILES.set(True)
    try:
        yield
    finally:
        _IN_FILES.reset(token)


def makes_tables() -> bool:
    """False inside `rows_in_files`."""
    return not _IN_FILES.get()


def budget_of(memory: str | None, budget: int | str | None) -> int | None:
    """The bytes that rows on disk may take in memory; None where the tables are parameters.

    ConfigError for another place than "disk", and where only one of the two is given.
    """
    if memory not in (None, "disk"):
        raise ConfigError(f"memory={memory!r}: None (tables in memory) or 'disk'")
    if (memory is None) != (budget is None):
        raise ConfigError(
            f"memory={memory!r}, memory_budget={budget!r}: 'disk' and how much memory it may take, "
            "as '2GB', or neither"
        )
    return None if budget is None else bytes_of("memory_budget", budget)


def open_rows(directory: Any, budget: int) -> dict[int, Served]:
    """The rows of each layer, from the weights that save_pretrained wrote.

    The budget is shared out by size of table. ConfigError where it is too small or the directory is
    none of this machine; DataError and MismatchError where the files do not hold these tables.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: memory='disk' reads a directory of this machine")
    sources = open_sources(directory)
    size = sum(source.rows * source.format.row_bytes for source in sources)
    thread = ThreadPoolExecutor(1, thread_name_prefix="engram-rows")
    served = {}
    for source in sources:
        share = budget * source.rows * source.format.row_bytes // size
        disk = Disk(source.format, source.parts, ahead_bytes=share // AHEAD)
        try:
            served[source.layer] = Served(Cache(disk, share - share // AHEAD), thread)
        except ConfigError as error:
            raise ConfigError(f"memory_budget={size_text(budget)}: {error}") from error
    return served
