"""Where the time of a loop goes.

A phase is what the training thread is doing; each instant belongs to one of
them. What other threads do, and the device while it is not waited for, is
none: it costs nothing.

- `PLAN`: deciding what comes next; and all that is nothing else.
- `DATA`: waiting for a chunk of batches, or making it in this thread (also one
  ahead, while the device works).
- `TRANSFER`: handing a chunk to the device. JAX does that in the call that
  launches steps, and it is part of `LAUNCH` there (but for models whose steps
  are a call each).
- `COMPILE`: in the calls that trace and compile, with the steps that they run.
- `LAUNCH`: in the call that sets the device to work, where it returns before
  the work is done (JAX). What JAX runs within the call, as it may with a small
  step on a CPU, is part of it.
- `DEVICE`: waiting for the device, and fetching the logs of the steps. Where
  the call returns only when the work is done (TensorFlow and PyTorch on a CPU),
  all of the call, with its transfer; what of it passes while this thread does
  something else (TensorFlow), is that.
- `DELIVERY`: giving logs to the books, to callbacks and to summaries.
- `VALIDATION`: a validation, all of it.
- `CHECKPOINT`: what training waits for a checkpoint: copies, and a free buffer
  to copy to. It is written by another thread.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NAMES = (
    "plan",
    "data",
    "transfer",
    "compile",
    "launch",
    "device",
    "delivery",
    "validation",
    "checkpoint",
)
"""Of the phases, in the order of their numbers."""

# Plain numbers: a member of an enumeration takes longer to name than a phase
# to end.
(
    PLAN,
    DATA,
    TRANSFER,
    COMPILE,
    LAUNCH,
    DEVICE,
    DELIVERY,
    VALIDATION,
    CHECKPOINT,
) = range(len(NAMES))


class Phases:
    """A clock that knows what the training thread is doing.

    It is read when one phase ends and another begins, and never else: so the
    phases of an interval add up to it.

    Args:
        clock: nanoseconds, monotonic.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._spent = [0] * len(NAMES)
        self._phase = PLAN
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

    def read(self) -> list[int]:
        """Nanoseconds of each phase so far."""
        self.enter(self._phase)
        return list(self._spent)


def between(before: list[int], after: list[int]) -> dict[str, float]:
    """Seconds of each phase between two readings, by name."""
    return {
        name: (late - early) / 1e9
        for name, early, late in zip(NAMES, before, after, strict=True)
    }
