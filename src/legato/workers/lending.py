"""Workers that outlive an iterator, for the next one that comes soon."""

import threading
from typing import Any

from legato.workers.recipe import Recipe, Workers, never
from legato.workers.watching import Watch

# A validation ends its iterator, and the next one begins another.
_LINGER_SECS = 30.0


class Lender:
    """Starts workers, and keeps those that were given back for a while.

    Args:
        recipe: how batches are made.
        workers: how many threads or processes.
        processes: which of them.
        prefetch: batches that each makes ahead.
        timeout: seconds after which one is taken to hang.

    Attributes:
        watch: on what threads draw; None if it is known, or does not matter.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        workers: int,
        processes: bool,
        prefetch: int,
        timeout: float,
    ) -> None:
        self._recipe = recipe
        self._processes = processes
        self._arguments = (workers, prefetch, timeout)
        self.watch: Watch | None = None
        if workers and not processes:
            self.watch = Watch()
        self._lock = threading.Lock()
        self._spare: list[Workers] = []
        self._timer: Any = None

    def lend(self) -> Workers:
        """Workers that nobody else uses."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
        if self._processes:
            from legato.workers.processes import Processes

            return Processes(self._recipe, *self._arguments)
        from legato.workers.threads import Threads

        return Threads(self._recipe, *self._arguments, self.watch)

    def take_back(self, workers: Workers) -> None:
        """Keep workers for the next one, or end them after a while."""
        workers.drop()
        workers.gives_up = never
        if workers.broken:
            workers.close()
            return
        with self._lock:
            self._spare.append(workers)
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(_LINGER_SECS, self.close)
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        """End the workers that nobody uses."""
        with self._lock:
            spare, self._spare = self._spare, []
            if self._timer is not None:
                self._timer.cancel()
        for workers in spare:
            workers.close()
