"""The thread that writes checkpoints, and the two buffers it writes from."""

import dataclasses
import threading
import warnings
from collections.abc import Callable, Mapping

import numpy as np

from legato import storage
from legato.errors import CheckpointError, LegatoWarning

RETRY_SECS = 5.0
"""How long to wait after a failed write."""

_ARENAS = 2
_TICK_SECS = 0.05  # Ctrl-C is noticed, and a test's clock read, this often


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """One checkpoint on its way to the disk."""

    step: int
    arena: storage.TensorArena
    host: bytes
    data: Mapping[str, bytes]
    best: bool
    before_commit: Callable[[], None] | None = None
    sha256: str | None = None  # set when it is committed


class Writer:
    """Writes jobs one by one, in order, and tries again after errors.

    A thread exists only while there is something to write. It is not a daemon,
    so an interpreter that exits waits for it, and nothing is lost; and as it
    ends when the queue is empty or a write has failed, no exit waits for ever.

    Which arena is free is never recorded: it is one that no queued job uses.
    An exception (Ctrl-C) at any point can therefore not lose one.

    Args:
        write: writes a job; called in the thread, again after it raised.
        timeout_secs: after so long without success, with something to write,
            it is an error.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        write: Callable[[Job], None],
        *,
        timeout_secs: float,
        clock: Callable[[], float],
    ):
        self._write = write
        self._timeout_secs = timeout_secs
        self._clock = clock
        self._changed = threading.Condition()
        self._arenas: list[storage.TensorArena] = []
        # All below: under `_changed`.
        self._queue: list[Job] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of the last try, if it failed
        self._untold: Exception | None = None  # of a first try, until reported
        self._retry_at = 0.0
        self._waiting_since = 0.0  # since the last success, or the first job
        self._late_after: float | None = None

    def fill_arena(
        self, arrays: Mapping[str, np.ndarray]
    ) -> storage.TensorArena:
        """Copies arrays into a free arena; waits while there is none.

        Raises:
            CheckpointError: if an array cannot be stored, or nothing could be
                written for too long.
        """
        while True:
            with self._changed:
                busy = [job.arena for job in self._queue]
                if len(busy) < _ARENAS:
                    break
                if self._error is not None and not self._running():
                    self._supersede()
                    continue
                self._changed.wait(_TICK_SECS)
            self.poll()
        free = [arena for arena in self._arenas if arena not in busy]
        found = next((a for a in free if a.layout.fits(arrays)), None)
        if found is None:
            layout = storage.TensorLayout(storage.spec(arrays))
            # Let go of first: each is as large as all that is saved.
            free.clear()
            self._arenas = list(busy)
            found = storage.TensorArena(layout)
            self._arenas.append(found)
        found.fill(arrays)
        return found

    def submit(self, job: Job) -> None:
        """Queues a job and returns."""
        with self._changed:
            if not self._queue:
                self._waiting_since = self._clock()
            self._queue.append(job)
            self._start_if_due()

    def poll(self) -> None:
        """Reports an error once, starts the next try when it is time.

        Also one after which the next try, which `submit` began, succeeded.

        Raises:
            CheckpointError: if nothing could be written for too long.
        """
        if not self._queue and self._untold is None:
            return
        with self._changed:
            error, untold, self._untold = self._error, self._untold, None
            waited = self._clock() - self._waiting_since
            late = bool(self._queue) and self._is_late(waited)
            self._start_if_due()
        if late:
            raise CheckpointError(
                f"no checkpoint could be written for {waited:.0f} seconds "
                f"(checkpoint_timeout is {self._timeout_secs:.0f}): "
                + (str(error) if error else "the disk does not answer")
            ) from error
        if untold is not None:
            warnings.warn(
                f"a checkpoint could not be written: {untold}. Training goes "
                f"on, and it is tried again every {RETRY_SECS:.0f} seconds.",
                LegatoWarning,
                stacklevel=3,
            )

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
            CheckpointError: if nothing could be written for too long.
        """
        while True:
            with self._changed:
                is_done = not self._queue and not self._running()
                if not is_done:
                    self._changed.wait(_TICK_SECS)
            self.poll()
            if is_done:
                return

    def _is_late(self, waited: float) -> bool:
        """Late twice: a process that was suspended gets time for one try."""
        if waited < self._timeout_secs:
            self._late_after = None
            return False
        if self._late_after is None:
            self._late_after = waited + RETRY_SECS
        return waited >= self._late_after

    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _start_if_due(self) -> None:
        if not self._queue or self._running():
            return
        if self._error is not None and self._clock() < self._retry_at:
            return
        # Stored before it starts: if Ctrl-C comes between, it counts as not
        # running, and another takes its place; it then sees that and ends.
        self._thread = threading.Thread(
            target=self._work, name="legato-checkpoint", daemon=False
        )
        self._thread.start()

    def _supersede(self) -> None:
        """Drops a job that cannot be written, in favour of a newer one.

        The oldest; but never the best of them, because nothing newer replaces
        that.
        """
        best = [job for job in self._queue if job.best]
        victim = next(job for job in self._queue if job not in best[-1:])
        self._queue.remove(victim)

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._thread is not threading.current_thread():
                    return
                if not self._queue:
                    self._thread = None
                    self._changed.notify_all()
                    return
                job = self._queue[0]
            try:
                self._write(job)
            except Exception as e:
                with self._changed:
                    if self._error is None:
                        self._untold = e
                    self._error = e
                    self._retry_at = self._clock() + RETRY_SECS
                    self._thread = None
                    self._changed.notify_all()
                return
            with self._changed:
                self._queue.remove(job)
                del job  # its arena is as large as all that is saved
                self._error = None
                self._waiting_since = self._clock()
                self._changed.notify_all()
