"""Lets readers into a store until it closes, and closes behind the last of them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engram_lm.errors import DataError


class Door:
    """One store's. name: what an error says is closed.

    Without it a file number that is closed under a reader could by then belong to another file.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._free = threading.Condition()
        self._inside = 0
        self._open = True

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around everything that reads. DataError once the door is shut."""
        with self._free:
            if not self._open:
                raise DataError(f"{self.name} is closed: its rows cannot be read any more")
            self._inside += 1
        try:
            yield
        finally:
            with self._free:
                self._inside -= 1
                self._free.notify_all()

    def shut(self) -> bool:
        """Waits for those inside. True for whoever shuts it, False where it was shut before."""
        with self._free:
            was_open, self._open = self._open, False
            self._free.wait_for(lambda: not self._inside)
        return was_open
