"""A thread that converts summaries while training goes on."""

import collections
import threading
from collections.abc import Callable

_TICK_SECS = 0.05  # Ctrl-C is noticed this often


class Worker:
    """Calls functions one by one, in their order, in a thread.

    The thread exists only while there is something to do. It is not a daemon,
    so an interpreter that exits waits for it, and nothing is lost.

    Args:
        max_waiting: whoever submits more than so many waits.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        # The first one is what is being done.
        self._jobs: collections.deque[Callable[[], None]] = collections.deque()
        self._thread: threading.Thread | None = None
        self._errors: list[Exception] = []

    @property
    def is_idle(self) -> bool:
        """Whether all is done."""
        return not self._jobs

    def submit(self, job: Callable[[], None]) -> None:
        """Have a function called; waits while too many wait already."""
        with self._changed:
            while len(self._jobs) >= self._max_waiting:
                self._start_if_none()
                self._changed.wait(_TICK_SECS)
            self._jobs.append(job)
            self._start_if_none()

    def wait(self) -> None:
        """Wait until all is done."""
        if self.is_idle:
            return
        with self._changed:
            while self._jobs:
                self._start_if_none()
                self._changed.wait(_TICK_SECS)

    def take_errors(self) -> list[Exception]:
        """What was raised since the last call."""
        errors, self._errors = self._errors, []
        return errors

    def _start_if_none(self) -> None:
        # (Ctrl-C may have come between an append and a start; and in a process
        # that was forked the thread is not.)
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(
            target=self._work, name="legato-summaries", daemon=False
        )
        self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._thread is not threading.current_thread():
                    return
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs[0]
            try:
                job()
            except Exception as error:
                self._errors.append(error)
            del job  # what it holds may be large
            with self._changed:
                self._jobs.popleft()
                self._changed.notify_all()
