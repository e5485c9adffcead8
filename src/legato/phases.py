"""Where the time of a loop goes."""

import enum
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phase(enum.IntEnum):
    """What the training thread is doing.

    Each instant belongs to one of them. What other threads do, and the device
    while it is not waited for, is no phase: it costs nothing.

    Attributes:
        PLAN: deciding what comes next; and all that is nothing else.
        DATA: waiting for a chunk of batches, or making it in this thread
            (also one ahead, while the device works).
        TRANSFER: handing a chunk to the device. JAX does it in the call that
            launches steps, and its share is part of `LAUNCH` there.
        COMPILE: tracing and compiling, in the calls that do; and what steps
            these run.
        LAUNCH: the call that sets the device to work, where such a call
            returns before the work is done (JAX). What JAX runs within the
            call, as it may with a small step on a CPU, is part of it.
        DEVICE: waiting for the device, and fetching the logs of the steps.
            Where the call returns only when the work is done (TensorFlow and
            PyTorch on a CPU), all of the call.
        DELIVERY: giving logs to the books, to callbacks and to summaries.
        VALIDATION: a validation, all of it.
        CHECKPOINT: what training waits for a checkpoint: copies, and a free
            buffer to copy to. It is written by another thread.
    """

    PLAN = 0
    DATA = 1
    TRANSFER = 2
    COMPILE = 3
    LAUNCH = 4
    DEVICE = 5
    DELIVERY = 6
    VALIDATION = 7
    CHECKPOINT = 8


NAMES = tuple(phase.name.lower() for phase in Phase)


class Phases:
    """A clock that knows what the training thread is doing.

    It is read when one phase ends and another begins, and never else: so the
    phases of an interval add up to it.

    Args:
        clock: nanoseconds, monotonic.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._spent = [0] * len(Phase)
        self._phase: int = Phase.PLAN
        self._since = clock()

    def enter(self, phase: int) -> None:
        """A phase begins, and the one before it ends."""
        # (With batch hooks, several times in each step: it must be cheap.)
        now = self._clock()
        self._spent[self._phase] += now - self._since
        self._phase = phase
        self._since = now

    @contextmanager
    def within(self, phase: int) -> Iterator[None]:
        """A phase in the midst of another, which then goes on."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def restart(self) -> None:
        """Forget what was: an interval begins."""
        self.take()
        self._phase = Phase.PLAN

    def take(self) -> dict[str, float]:
        """Seconds of each phase since this was asked last, by name."""
        self.enter(self._phase)
        spent, self._spent = self._spent, [0] * len(Phase)
        return {
            name: nanoseconds / 1e9
            for name, nanoseconds in zip(NAMES, spent, strict=True)
        }
