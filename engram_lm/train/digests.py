"""Which documents have been seen, and where to go on: one file, one transaction a shard."""

import json
import sqlite3
from pathlib import Path
from typing import Any

from engram_lm.errors import DataError

CACHE_KIB = 64 * 1024


class Digests:
    """Digests of documents on disk, and with them a record of what else has been done.

    Memory is a bounded cache. Killed at any moment, it is as it was at the last commit.
    """

    def __init__(self, path: Path) -> None:
        try:
            # Whoever else prepares into this directory holds the lock: no waiting.
            self.connection = sqlite3.connect(path, timeout=0, isolation_level=None)
            self.connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self.connection.execute("BEGIN IMMEDIATE")
            self._run("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
            self._run("CREATE TABLE IF NOT EXISTS record (json TEXT)")
        except sqlite3.Error as error:
            raise DataError(f"{path}: {error}; does another `engram data` use it?") from error

    def add(self, digest: bytes) -> bool:
        """Whether it is new."""
        return self._run("INSERT OR IGNORE INTO seen VALUES (?)", digest).rowcount == 1

    def record(self) -> dict[str, Any] | None:
        """The last one committed."""
        row = self._run("SELECT json FROM record").fetchone()
        return None if row is None else json.loads(row[0])

    def commit(self, record: dict[str, Any]) -> None:
        """Makes the digests since the last commit, and the record, durable at once."""
        self._run("DELETE FROM record")
        self._run("INSERT INTO record VALUES (?)", json.dumps(record))
        self._run("COMMIT")
        self._run("BEGIN IMMEDIATE")

    def close(self) -> None:
        self.connection.close()

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        return self.connection.execute(statement, values)
