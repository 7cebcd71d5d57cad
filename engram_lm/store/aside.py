"""A large file that is written aside in blocks, and goes on where a killed process left it.

NAME.partial has the full size from the start; NAME.journal says whose it is and how many blocks of
it are on the disk. NAME itself appears when all of them are, and the journal stays until the caller
removes it, so that a command which writes several files knows which are done.
"""

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import NoReturn

from engram_lm.errors import DataError


class Aside:
    """`path` while it is written, by one process at a time.

    identity: of all that decides its bytes, one line; what another one left is begun anew. `done`:
    blocks that need not be written again. DataError where another process writes the same file, or
    the disk has no room for it.
    """

    def __init__(self, path: Path, size: int, identity: str) -> None:
        self.path, self.size, self.identity = path, size, identity
        self._partial = path.with_name(f"{path.name}.partial")
        self._journal = journal(path)
        try:
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._give_up(error)
        try:
            self._lock()
            self.done = recorded(path, identity)
            if os.fstat(self._file).st_size != size:
                self.done = 0
            if not self.done:
                self._begin()
        except OSError as error:
            os.close(self._file)
            self._give_up(error)
        except DataError:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it until now may have given the file its final name.
            ours = os.path.samestat(os.fstat(self._file), os.stat(self._partial))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise DataError(f"{self.path}: another process is writing it")

    def _begin(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        held = os.fstat(self._file).st_blocks * 512
        if self.size > free + held:
            self._partial.unlink()
            raise DataError(f"{self.path}: {self.size} bytes are needed, the disk has {free} free")
        self._journal.unlink(missing_ok=True)
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self.size)
        self._note(0)

    def write(self, offset: int, content: bytes) -> None:
        """Puts bytes in their place."""
        rest = memoryview(content)
        try:
            while rest:
                count = os.pwrite(self._file, rest, offset)
                rest, offset = rest[count:], offset + count
        except OSError as error:
            self._give_up(error)

    def read(self, offset: int, length: int) -> bytes:
        """What was written before."""
        try:
            return os.pread(self._file, length, offset)
        except OSError as error:
            self._give_up(error)

    def commit(self, done: int) -> None:
        """From here on `done` blocks are on the disk, whatever happens."""
        try:
            os.fdatasync(self._file)
            self._note(done)
        except OSError as error:
            self._give_up(error)
        self.done = done

    def finish(self) -> None:
        """Gives the file its name."""
        try:
            os.fsync(self._file)
            os.replace(self._partial, self.path)
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            self._give_up(error)

    def _note(self, done: int) -> None:
        beside = self._journal.with_name(f"{self._journal.name}.partial")
        with beside.open("w") as file:
            file.write(f"{self.identity}\n{done}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._journal)

    def _give_up(self, error: OSError) -> NoReturn:
        hint = "; make room and start it again: it goes on" if error.errno == errno.ENOSPC else ""
        raise DataError(f"{self.path}: {error.strerror}{hint}") from error

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self._file)


def journal(path: Path) -> Path:
    """Beside the file: its identity, and how many blocks are done."""
    return path.with_name(f"{path.name}.journal")


def recorded(path: Path, identity: str) -> int:
    """Blocks that the journal says are done; 0 where it is of another identity or missing."""
    try:
        found, done = journal(path).read_text().split()
    except (OSError, ValueError):
        return 0
    return int(done) if found == identity and done.isdigit() else 0
