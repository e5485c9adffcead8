"""Contestants that train on, each in its turn, and wait in between.

Whoever drives the loop (a `fit`, a Trainer, a loop by hand), it compiles once,
and is stopped at the end of an epoch until its next turn. So turns can be
short and many, and none is paid for starting.
"""

import threading
import time
from collections.abc import Callable

EpochEnd = Callable[[float], bool]
"""`epoch_end(mean_loss) -> whether to train another epoch`. Called when all
work of the epoch is done on the device; does not return before it is this
contestant's turn."""

Train = Callable[[EpochEnd], None]


class Contestant:
    """Something that trains, in a thread of its own.

    Args:
        name: for the table.
        train: trains until its argument returns False.
        steps: in an epoch.

    Attributes:
        losses: the mean loss of each epoch so far.
    """

    def __init__(self, name: str, train: Train, steps: int) -> None:
        self.name = name
        self.losses: list[float] = []
        self._train = train
        self._steps = steps
        self._error: BaseException | None = None
        self._go = threading.Semaphore(0)
        self._is_done = threading.Semaphore(0)
        self._seconds = 0.0
        self._began = 0.0
        self._epochs = 0
        self._rate = 0.0
        self._ends = False
        # (A daemon: after an error elsewhere nobody lets it go on.)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._go.acquire()
        self._began = time.perf_counter()
        try:
            self._train(self._epoch_end)
        except BaseException as error:
            self._error = error
        self._is_done.release()

    def _epoch_end(self, loss: float) -> bool:
        now = time.perf_counter()
        self.losses.append(float(loss))
        self._epochs += 1
        taken = now - self._began
        if taken < self._seconds:
            return True
        self._rate = self._epochs * self._steps / taken
        self._is_done.release()
        self._go.acquire()
        self._epochs, self._began = 0, time.perf_counter()
        return not self._ends

    def turn(self, seconds: float) -> float:
        """Train for so long, at least an epoch; returns steps per second."""
        if not self._thread.is_alive():
            self._thread.start()
        self._seconds = seconds
        self._go.release()
        self._is_done.acquire()
        if self._error is not None:
            raise RuntimeError(f"{self.name} failed") from self._error
        return self._rate

    def end(self) -> None:
        """Train no more."""
        self._ends = True
        self._go.release()
        self._thread.join()
        if self._error is not None:
            raise RuntimeError(f"{self.name} failed") from self._error
