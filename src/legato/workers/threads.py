"""Workers that are threads: for data that are waited for."""

import collections
import functools
import queue
import sys
import threading
import time
import traceback
from typing import Any

from legato.errors import WorkerError
from legato.workers.recipe import (
    POLL_SECS,
    Job,
    Recipe,
    StoppedWaiting,
    never,
)
from legato.workers.watching import Watch


class _Task:
    """A job, and what became of it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.wanted = True
        self.thread: threading.Thread | None = None
        # Held until it is done. (An Event takes five times as long.)
        self.doing = threading.Lock()
        self.doing.acquire()
        self.batch: Any = None
        self.error: BaseException | None = None


class Threads:
    """See `Workers`. They are daemons: one that hangs holds up no exit.

    Args:
        recipe: how batches are made.
        count: how many threads.
        prefetch: batches that each makes ahead.
        timeout: seconds to wait for a batch.
        watch: on what they draw from the global generators.
    """

    def __init__(
        self,
        recipe: Recipe,
        count: int,
        prefetch: int,
        timeout: float,
        watch: Watch | None = None,
    ) -> None:
        self.broken = False
        self.gives_up = never
        self._what = recipe.what
        self._timeout = timeout
        self._most = count * prefetch
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._pending: collections.deque[_Task] = collections.deque()
        self._threads = [
            threading.Thread(
                target=_work,
                args=(recipe, self._tasks, watch),
                name=f"legato-worker-{i}",
                daemon=True,
            )
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def room(self) -> int:
        """How many more jobs can be begun."""
        return self._most - len(self._pending)

    def begin(self, job: Job, *, try_out: bool = False) -> None:
        """Begin to make a batch."""
        assert not try_out
        task = _Task(job)
        self._pending.append(task)
        self._tasks.put(task)

    def take(self) -> Any:
        """The batch of the oldest job."""
        task = self._pending[0]
        until = time.monotonic() + self._timeout
        while not task.doing.acquire(
            timeout=min(POLL_SECS, max(0.0, until - time.monotonic()))
        ):
            if time.monotonic() >= until:
                self.broken = True
                raise WorkerError(self._hangs(task))
            if self.gives_up():
                self.broken = True  # what it is at may last
                raise StoppedWaiting
        self._pending.popleft()
        if task.error is not None:
            raise WorkerError(
                f"{self._what}: batch {task.job.batch} of epoch "
                f"{task.job.epoch} could not be made in a thread: "
                f"{shown(task.error)}"
            ) from task.error
        return task.batch

    def _hangs(self, task: _Task) -> str:
        job, stack = task.job, "It has not begun."
        frames = sys._current_frames()
        if task.thread is not None and task.thread.ident in frames:
            frame = frames[task.thread.ident]
            stack = "".join(traceback.format_stack(frame)[-8:])
        return (
            f"{self._what}: batch {job.batch} of epoch {job.epoch} was waited "
            f"for in vain for {self._timeout:g} seconds (timeout=). Where the "
            f"thread hangs:\n{stack}"
        )

    def drop(self) -> None:
        """Forget what was begun; what is under way is not waited for."""
        for task in self._pending:
            task.wanted = False
        self._pending.clear()

    def close(self) -> None:
        """End the threads, each after what it is at."""
        self.drop()
        for _ in self._threads:
            self._tasks.put(None)

    def __del__(self) -> None:
        self.close()


def _work(
    recipe: Recipe,
    tasks: "queue.SimpleQueue[_Task | None]",
    watch: Watch | None,
) -> None:
    make = functools.partial(recipe.make, alone=False)
    while (task := tasks.get()) is not None:
        if not task.wanted:
            continue
        task.thread = threading.current_thread()
        try:
            job = task.job
            if watch is None:
                task.batch = make(job)
            else:
                task.batch = watch.watched(job.batch, job, make)
        except BaseException as error:
            task.error = error
        task.doing.release()


def shown(error: BaseException) -> str:
    """An error's class, its message, and the example it is about."""
    notes = "\n".join(getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error}\n{notes}".rstrip()
