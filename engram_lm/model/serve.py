"""A saved model whose rows stay in its files: found by their names, read in place.

What a memory budget pays for: rows kept because they were asked for last, and pages on their way.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.rows import RowStore
from engram_lm.memory.served import ServedTables
from engram_lm.model.units import bytes_of, size_text
from engram_lm.store.byte_bar import byte_bar
from engram_lm.store.cache import Cache
from engram_lm.store.disk import Disk
from engram_lm.store.hot import Hot
from engram_lm.store.source import Source, open_sources

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


def budget_of(
    memory: str | None, budget: int | str | None, tables: str | os.PathLike[str] | None
) -> int | None:
    """The bytes that rows on disk may take in memory; None where the tables are parameters.

    ConfigError for another place than "disk", and for a budget or tables without it.
    """
    if memory not in (None, "disk"):
        raise ConfigError(f"memory={memory!r}: None (tables in memory) or 'disk'")
    if (memory is None) != (budget is None):
        raise ConfigError(
            f"memory={memory!r}, memory_budget={budget!r}: 'disk' and how much memory it may take, "
            "as '2GB', or neither"
        )
    if tables is not None and memory is None:
        raise ConfigError(f"tables={str(tables)!r}: packed files are read with memory='disk'")
    return None if budget is None else bytes_of("memory_budget", budget)


def open_rows(
    memory: MemoryConfig, directory: Any, tables: str | os.PathLike[str] | None, budget: int
) -> ServedTables:
    """The rows of each layer: from the weights that save_pretrained wrote, or from the packed files
    in the directory `tables`.

    The budget is shared out by size of table. Caches begin with the hot rows of packed files that
    have them, read from front to back. ConfigError where it is too small or the directory is
    none of this machine; DataError and MismatchError where the files do not hold the tables of
    `memory`.
    """
    sources = _sources(memory, Path(directory), None if tables is None else Path(tables))
    size = sum(source.rows * source.format.row_bytes for source in sources)
    stores: dict[int, RowStore] = {}
    with ExitStack() as opened:
        for source in sources:
            share = budget * source.rows * source.format.row_bytes // size
            disk = Disk(source.format, source.parts, ahead_bytes=share // AHEAD)
            opened.callback(disk.close)
            try:
                cache = Cache(disk, share - share // AHEAD)
            except ConfigError as error:
                raise ConfigError(f"memory_budget={size_text(budget)}: {error}") from error
            stores[source.layer] = cache
            if source.hot is not None:
                _seed(cache, source.hot, f"hot rows of layer {source.layer}")
        opened.pop_all()
    return ServedTables(stores)


def _seed(cache: Cache, hot: Hot, what: str) -> None:
    """What does not fit is not read."""
    most = min(cache.places, hot.region.rows)
    with byte_bar() as bar:
        task = bar.add_task(what, total=most * hot.region.row_bytes)
        for rows_M, bytes_MR in hot.blocks(most):
            cache.seed(rows_M, bytes_MR)
            bar.advance(task, bytes_MR.nbytes)


def _sources(memory: MemoryConfig, directory: Path, tables: Path | None) -> list[Source]:
    if not directory.is_dir():
        raise ConfigError(f"{directory}: memory='disk' reads a directory of this machine")
    if tables is None:
        return open_sources(directory)
    files = sorted(tables.glob("*.safetensors"))
    if not files:
        raise DataError(f"{tables}: no packed tables; `engram pack MODEL --out DIR` writes them")
    sources = {}
    for file in files:
        (source,) = open_sources(file)
        if source.specification.digest != memory.specification.digest:
            raise MismatchError(
                f"{file}: packed with the specification of sha256 {source.specification.digest}, "
                f"the model has {memory.specification.digest}"
            )
        if source.format.dim != memory.head_dim:
            raise MismatchError(
                f"{file}: rows of {source.format.dim} values, the model has {memory.head_dim}"
            )
        if source.layer in sources:
            raise MismatchError(f"{file}: a second table of layer {source.layer}")
        sources[source.layer] = source
    missing = set(memory.specification.layers) - set(sources)
    if missing:
        raise MismatchError(f"{tables}: no packed table of layer {min(missing)}")
    return [sources[layer] for layer in memory.specification.layers]
