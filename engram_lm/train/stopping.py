"""Stopping between two steps when the system asks: SIGTERM, or Ctrl-C once.

torchrun sends SIGTERM to everybody when the machine is wanted back, and also to the survivors of a
worker that died, where a collective would wait for ever. So the workers agree over the store at
which they met. Who was asked proposes, before it begins a step, that all stop after that step. No
worker can be further: the step's own collectives need everyone, and so everyone finds the proposal
when the step has ended. There each says that it is ready, and when all have, the run is saved.
Where that takes longer than PATIENCE, a worker is dead or hangs, and the process ends unsaved.
"""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from torch.distributed import Store

PATIENCE = 20.0
"""Seconds from the signal to the agreement."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
UNSAVED_STATUS = 1
_PROPOSED, _READY = "engram_lm/stop/proposed", "engram_lm/stop/ready"


class Stopping:
    """Asked between steps whether to stop; the answer is the same on all workers.

    A context manager, which takes both signals inside; signals reach only a process's main thread,
    and in another thread it leaves them alone. store: that of the workers, None for one alone.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Store | None = None, patience: float = PATIENCE
    ) -> None:
        assert (store is None) == (size == 1)
        self.rank, self.size, self.store, self.patience = rank, size, store, patience
        self.signal: signal.Signals | None = None
        """What this worker was asked with."""
        self._boundary = 0
        self._last: int | None = None
        self._settled = threading.Event()
        self._restored: list[Any] = []

    @property
    def status(self) -> int:
        """Exit status of a run that was saved and stopped: 143, or 130 after Ctrl-C."""
        return 128 + (self.signal or signal.SIGTERM)

    def due(self) -> bool:
        """Whether all stop here. Every worker calls it before each step; ends the process where
        all ought to stop and some do not come.
        """
        if self.store is None:
            if self.signal is not None:
                self._settled.set()
            return self.signal is not None
        if self.signal is not None and self._last is None:
            said = self.store.compare_set(_PROPOSED, "", str(self._boundary))
            self._last = int(said)  # the first proposal is the one that counts
        elif self._last is None and self.store.check([_PROPOSED]):
            self._last = int(self.store.get(_PROPOSED))
        self._boundary += 1
        if self._last is None or self._boundary - 1 <= self._last:
            return False
        self._meet(self.store)
        return True

    def _meet(self, store: Store) -> None:
        deadline = time.monotonic() + self.patience  # for a worker that was not asked itself
        store.add(_READY, 1)
        while store.add(_READY, 0) < self.size:
            if time.monotonic() > deadline:
                self._give_up()
            time.sleep(0.02)
        self._settled.set()

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is not threading.main_thread():
            return self
        # Python runs handlers between two of its own instructions: not while it waits for another
        # worker. The byte that it writes at once wakes a thread that keeps the time.
        self._wake, wakes = socket.socketpair()
        wakes.setblocking(False)
        earlier = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        handlers = [(number, signal.signal(number, self._asked)) for number in SIGNALS]
        self._restored = [wakes, earlier, handlers]
        threading.Thread(target=self._watch, name="stopping", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._settled.set()
        if self._restored:
            wakes, earlier, handlers = self._restored
            for number, handler in handlers:
                signal.signal(number, handler)
            signal.set_wakeup_fd(earlier)
            wakes.close()  # ends the thread

    def _asked(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches workers twice, from the terminal and from torchrun; alone it means now.
        if number == signal.SIGINT and self.signal == signal.SIGINT and self.size == 1:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)

    def _watch(self) -> None:
        with self._wake:
            while received := self._wake.recv(1):
                if received[0] in SIGNALS:
                    if not self._settled.wait(self.patience):
                        self._give_up()
                    return

    def _give_up(self) -> None:
        who = f"worker {self.rank} of {self.size}: " if self.size > 1 else ""
        what = "the workers did not meet" if self.size > 1 else "the step did not end"
        print(
            f"\n{who}asked to stop, but {what} within {self.patience:g} s: nothing saved; the "
            "same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(UNSAVED_STATUS)
