"""What a worker process runs: it makes batches until its parent is gone."""

import contextlib
import dataclasses
import faulthandler
import fcntl
import multiprocessing.connection
import multiprocessing.spawn
import os
import pickle
import signal
import threading
import traceback
from typing import Any, NamedTuple

from legato.workers.recipe import Job, Recipe
from legato.workers.sharing import SharedFile, Written

importing_main = False
"""Whether the user's program is being imported, to find his classes."""

STACKS_SIGNAL = signal.SIGUSR1
"""Has a worker write down where it is."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a worker is told first.

    Attributes:
        preparation: see `multiprocessing.spawn.prepare`.
        recipe: lies in the recipe's file.
    """

    preparation: dict[str, Any]
    recipe: Written


class Order(NamedTuple):
    """One job, and where its batch is to be written.

    Attributes:
        job: the job.
        slot: which of the shared files.
        try_out: make it twice; see `Recipe.try_out`.
    """

    job: Job
    slot: int
    try_out: bool


@dataclasses.dataclass(frozen=True)
class Failure:
    """What was raised, in words.

    Attributes:
        error: its class and message, and the example it is about.
        traceback: where.
    """

    error: str
    traceback: str


def main(
    connection: int, parent: int, crash: int, recipe: int, slots: list[int]
) -> None:
    """Make batches, in the order in which they are asked for.

    Args:
        connection: descriptor of the connection to the parent.
        parent: of a pipe that ends when the parent does.
        crash: of a file for what is known of a crash.
        recipe: of the shared file with the recipe.
        slots: of the shared files for batches.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent
    _die_with(parent)
    # (Their file stays open for good: it must have no owner.)
    faulthandler.enable(crash)
    faulthandler.register(STACKS_SIGNAL, crash, all_threads=True)
    link = multiprocessing.connection.Connection(connection)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(link, SharedFile(recipe), [SharedFile(s) for s in slots])


def _serve(link: Any, recipe_file: SharedFile, slots: list[SharedFile]) -> None:
    recipe = _begin(pickle.loads(link.recv_bytes()), recipe_file)
    if isinstance(recipe, Failure):
        link.send_bytes(pickle.dumps(recipe))
        return
    link.send_bytes(pickle.dumps(None))
    while True:
        order = pickle.loads(link.recv_bytes())
        answer = _made(recipe, order, slots[order.slot])
        link.send_bytes(pickle.dumps(answer))


def _begin(setup: Setup, recipe_file: SharedFile) -> Recipe | Failure:
    """Becomes a process of the user's program, and reads the recipe."""
    global importing_main
    importing_main = True
    try:
        multiprocessing.spawn.prepare(setup.preparation)
        return recipe_file.read(setup.recipe, copy_on_write=True)
    except BaseException as error:
        return _failure(error)
    finally:
        importing_main = False


def _made(recipe: Recipe, order: Order, slot: SharedFile) -> Written | Failure:
    try:
        if order.try_out:
            return slot.write(recipe.try_out(order.job))
        return slot.write(recipe.make(order.job, alone=True))
    except BaseException as error:
        return _failure(error)


def _failure(error: BaseException) -> Failure:
    notes = "\n".join(getattr(error, "__notes__", ()))
    return Failure(
        f"{type(error).__name__}: {error}\n{notes}".rstrip(),
        "".join(traceback.format_exception(error)),
    )


def _die_with(parent: int) -> None:
    """End this process at once when its parent ends, whatever it is at."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(parent, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="legato-parent", daemon=True).start()
    # On Linux the kernel itself does it, even while user code in C holds
    # Python's lock: the pipe's end raises a signal, which ends the process.
    with contextlib.suppress(OSError, AttributeError):
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(parent, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(parent, fcntl.F_GETFL)
        fcntl.fcntl(parent, fcntl.F_SETFL, flags | os.O_ASYNC)
