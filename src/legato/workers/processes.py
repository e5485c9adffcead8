"""Workers that are processes: for data that have to be computed.

Each is a new interpreter, of which nothing is left when this process ends,
however it ends: there is no server that they are forked from, nothing that
has a name, and they see the end of a pipe.
"""

import collections
import contextlib
import json
import multiprocessing.connection
import multiprocessing.spawn
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

from legato.errors import ConfigError, WorkerError
from legato.workers import child
from legato.workers.recipe import (
    POLL_SECS,
    Job,
    Recipe,
    StoppedWaiting,
    never,
)
from legato.workers.sharing import SharedFile, Written, anonymous_file

_BOOT = (
    "import sys, json; given = json.loads(sys.argv[1]); "
    "sys.path[:] = given.pop('path'); "
    "from legato.workers.child import main; main(**given)"
)
_START_SECS = 120.0  # what a worker may import
_END_SECS = 1.0  # for an idle worker to end by itself
_STACK_SECS = 3.0  # for one that hangs to write down where
_STACK_TICK_SECS = 0.15


class _Task:
    """A job, and what became of it."""

    def __init__(self, job: Job, slot: int) -> None:
        self.job = job
        self.slot = slot
        self.wanted = True
        self.result: Written | str | None = None  # or what went wrong


class _Worker:
    """One process, from this side.

    Args:
        recipe: descriptor of the file that holds the recipe.
        slots: those of the files for batches.
    """

    def __init__(self, recipe: int, slots: list[int]) -> None:
        self.link, theirs = multiprocessing.connection.Pipe()
        ends, self._lives = os.pipe()
        self.crash = anonymous_file()
        given = {
            "path": [path for path in sys.path if isinstance(path, str)],
            "connection": theirs.fileno(),
            "parent": ends,
            "crash": self.crash,
            "recipe": recipe,
            "slots": slots,
        }
        executable: Any = multiprocessing.spawn.get_executable()
        self.process = subprocess.Popen(
            [
                executable,
                *subprocess._args_from_interpreter_flags(),  # type: ignore
                "-c",
                _BOOT,
                json.dumps(given),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), ends, self.crash, recipe, *slots],
            # Ctrl-C goes to a whole group of processes: not to this one.
            process_group=0,
        )
        theirs.close()
        os.close(ends)
        self.tasks: collections.deque[_Task] = collections.deque()
        self.is_ready = False
        self.is_alive = True

    def send(self, value: Any) -> None:
        # One that is dead shows that where it is read from.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.link.send_bytes(pickle.dumps(value))

    def write_stacks(self) -> None:
        """Have it write down where it is; returns when that is written."""
        self.process.send_signal(child.STACKS_SIGNAL)
        until = time.monotonic() + _STACK_SECS
        before, size = 0, 0
        # (It may be long in coming, where there is much else to compute.)
        while time.monotonic() < until and self.process.poll() is None:
            time.sleep(_STACK_TICK_SECS)
            before, size = size, os.fstat(self.crash).st_size
            if size == before > 0:
                return

    def close(self) -> None:
        """End it: at once where it is at work; its link is closed already."""
        if not self.tasks and self.is_alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_SECS)
        self.process.kill()
        self.process.wait()
        os.close(self._lives)
        os.close(self.crash)


class Processes:
    """See `Workers`.

    Batches come through files of memory that are used again and again: as
    many as may be made ahead, and one that is being read.

    Args:
        recipe: how batches are made; is pickled.
        count: how many processes.
        prefetch: batches that each makes ahead.
        timeout: seconds without a word from one that is waited for.

    Raises:
        ConfigError: the recipe cannot be pickled, or the program has no
            guard.
    """

    def __init__(
        self, recipe: Recipe, count: int, prefetch: int, timeout: float
    ) -> None:
        if child.importing_main:
            raise ConfigError(
                "The program is imported by a worker process, to find your "
                "dataset, and starts workers itself. Put what it does under "
                '`if __name__ == "__main__":`.'
            )
        self.broken = False
        self.gives_up = never
        self._failure: str | None = None  # of a worker that is no more
        self._what = recipe.what
        self._timeout = timeout
        recipe_file = anonymous_file()
        descriptors = [anonymous_file() for _ in range(count * prefetch + 1)]
        self._slots = [SharedFile(d) for d in descriptors]
        self._free = list(range(len(descriptors)))
        self._held: int | None = None  # the slot of what was taken last
        self._pending: collections.deque[_Task] = collections.deque()
        self._workers: list[_Worker] = []
        # From here on nothing is left behind, whatever is raised.
        self._finalizer = weakref.finalize(
            self, _close, self._workers, [recipe_file, *descriptors]
        )
        setup = _setup(recipe, SharedFile(recipe_file))
        # (`multiprocessing.connection.wait` makes one of its own each time,
        # which takes longer than all else that a batch takes here.)
        self._links = select.poll()
        self._by_link: dict[int, _Worker] = {}
        for _ in range(count):
            worker = _Worker(recipe_file, descriptors)
            self._workers.append(worker)
            self._links.register(worker.link.fileno(), select.POLLIN)
            self._by_link[worker.link.fileno()] = worker
        for worker in self._workers:
            worker.send(setup)

    def room(self) -> int:
        """How many more jobs can be begun; ends the use of what was taken."""
        if self._held is not None:
            self._free.append(self._held)
            self._held = None
        return len(self._free)

    def begin(self, job: Job, *, try_out: bool = False) -> None:
        """Begin to make a batch; waits where there is no room.

        Args:
            job: which.
            try_out: what is taken will be the pair that `Recipe.try_out`
                returns.
        """
        while not self.room():  # what was dropped is still being made
            self._receive(self._busiest(), self._timeout)
        task = _Task(job, self._free.pop())
        self._pending.append(task)
        if self._failure is not None:
            task.result = self._failure
            return
        worker = min(self._workers, key=lambda each: len(each.tasks))
        worker.tasks.append(task)
        worker.send(child.Order(job, task.slot, try_out))

    def take(self) -> Any:
        """The batch of the oldest job, in memory that is used again."""
        self.room()
        task = self._pending[0]
        while task.result is None:
            self._receive(self._maker(task), self._timeout)
        self._pending.popleft()
        if isinstance(task.result, str):
            self._free.append(task.slot)
            raise WorkerError(task.result)
        self._held = task.slot
        return self._slots[task.slot].read(task.result)

    def drop(self) -> None:
        """Forget what was begun; what is under way is not waited for."""
        self.room()
        for task in self._pending:
            task.wanted = False
            if task.result is not None:
                self._free.append(task.slot)
        self._pending.clear()

    def close(self) -> None:
        """End the processes."""
        self.broken = True
        self._pending.clear()
        self._finalizer()

    # -- what comes from the workers ----------------------------------------

    def _maker(self, task: _Task) -> _Worker:
        return next(w for w in self._workers if task in w.tasks)

    def _busiest(self) -> _Worker:
        return max(self._workers, key=lambda worker: len(worker.tasks))

    def _receive(self, waited_for: _Worker, timeout: float) -> None:
        """Take what has come; wait for a word from one of the workers."""
        if not waited_for.is_ready:  # it may be importing for long
            timeout = max(timeout, _START_SECS)
        until = time.monotonic() + timeout
        while True:
            left = min(POLL_SECS, max(0.0, until - time.monotonic()))
            ready = [
                self._by_link[link] for link, _ in self._links.poll(1000 * left)
            ]
            for worker in ready:
                self._read(worker)
            if waited_for in ready:
                return
            if time.monotonic() >= until:
                self._end_hanging(waited_for)
                return
            if self.gives_up():
                self.broken = True  # what it is at may last
                raise StoppedWaiting

    def _read(self, worker: _Worker) -> None:
        try:
            answer = pickle.loads(worker.link.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._bury(worker)
            return
        if not worker.is_ready:
            worker.is_ready = answer is None
            if answer is not None:
                self._fail(worker, f"could not start: {answer.traceback}")
            return
        task = worker.tasks.popleft()
        if isinstance(answer, child.Failure):
            answer = (
                f"{self._what}: batch {task.job.batch} of epoch "
                f"{task.job.epoch} could not be made in a worker process: "
                f"{answer.error}\n\nThere:\n{answer.traceback}"
            )
        self._settle(task, answer)

    def _settle(self, task: _Task, result: Written | str) -> None:
        task.result = result
        if not task.wanted:
            self._free.append(task.slot)

    def _bury(self, worker: _Worker) -> None:
        """It has died: its jobs fail, in their turn."""
        worker.process.wait(_END_SECS * 10)
        self._fail(worker, f"died: {_cause(worker.process.returncode)}")

    def _end_hanging(self, worker: _Worker) -> None:
        worker.write_stacks()
        worker.process.kill()
        self._fail(
            worker,
            f"hangs: it was waited for in vain for {self._timeout:g} seconds "
            "(timeout=) and was ended",
        )

    def _fail(self, worker: _Worker, how: str) -> None:
        """Its jobs fail in their turn, and so do those that come later."""
        self.broken = True
        worker.is_alive = False
        self._links.unregister(worker.link.fileno())
        stack = os.pread(worker.crash, 6000, 0).decode(errors="replace")
        self._failure = (
            f"{self._what}: the worker process {worker.process.pid}"
            f"{_at(worker)} {how}"
        ) + (f"\nWhere it was:\n{stack}" if stack else "")
        for task in worker.tasks:
            self._settle(task, self._failure)
        worker.tasks.clear()


def _setup(recipe: Recipe, file: SharedFile) -> child.Setup:
    """Pickles the recipe; what the user's program defines, by its code.

    To import the program instead takes as long as its imports take, Keras's
    for one. And what is typed into a notebook cannot be imported.
    """
    preparation = multiprocessing.spawn.get_preparation_data("legato-worker")
    # (It refuses to be pickled outside of multiprocessing itself.)
    preparation["authkey"] = bytes(preparation["authkey"])
    program = [key for key in preparation if key.startswith("init_main_from")]
    written, problem = _pickled(recipe, file, pickle.dumps)
    needs_program = written is None or b"__main__" in written.pickled
    if needs_program:
        by_code, problem = _by_code(recipe, file, problem)
        if by_code is not None:
            written, needs_program = by_code, False
        elif written is not None:
            written, _ = _pickled(recipe, file, pickle.dumps)
    if written is None or (needs_program and not program):
        raise ConfigError(
            f"{recipe.what}, its transform or its collate cannot be sent to "
            f"worker processes: {problem}. Define them at the top of a "
            "module; open files, connections and locks in __getitem__ and "
            "not before; or take threads: processes=False."
        )
    if not needs_program:
        for key in program:
            del preparation[key]
    return child.Setup(preparation, written)


def _by_code(
    recipe: Recipe, file: SharedFile, problem: str
) -> tuple[Written | None, str]:
    try:
        import cloudpickle  # type: ignore[import-not-found]
    except ImportError:
        return None, (
            problem or "it is defined in the program itself"
        ) + " (pip install 'legato[workers]' may do)"
    return _pickled(recipe, file, cloudpickle.dumps)


def _pickled(
    recipe: Recipe, file: SharedFile, dump: Callable[..., bytes]
) -> tuple[Written | None, str]:
    try:
        return file.write(recipe, dump), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _cause(status: int | None) -> str:
    if status is None or status >= 0:
        return f"it ended itself with the exit status {status}"
    name = signal.Signals(-status).name
    if -status == signal.SIGKILL:
        return f"it was killed by {name} (was memory short?)"
    return f"it was ended by {name}"


def _at(worker: _Worker) -> str:
    if not worker.tasks or not worker.is_ready:
        return ""
    job = worker.tasks[0].job
    shown = ", ".join(map(str, job.indices[:8].tolist()))
    more = ", ..." if len(job.indices) > 8 else ""
    return (
        f", which made batch {job.batch} of epoch {job.epoch} (examples "
        f"{shown}{more}),"
    )


def _close(workers: list[_Worker], descriptors: list[int]) -> None:
    for worker in workers:
        worker.link.close()  # for all to end at the same time
    while workers:
        workers.pop().close()
    while descriptors:
        os.close(descriptors.pop())
