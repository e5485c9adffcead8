"""Contestants that train on, each in its turn, and wait in between.

Whoever drives the loop (a `fit`, a Trainer, a loop by hand), it compiles once,
and is stopped at the end of an epoch until its next turn. So turns can be
short and many, and none is paid for starting.

All are greenlets of one thread. (PyTorch keeps a pool of threads for each
thread that trains, and several pools are in each other's way: a step of 0.1 ms
took 0.7 ms beside another contestant that slept.)
"""

import time
from collections.abc import Callable

from greenlet import greenlet

EpochEnd = Callable[[float], bool]
"""`epoch_end(mean_loss) -> whether to train another epoch`. Called when all
work of the epoch is done on the device; does not return before it is this
contestant's turn."""

Train = Callable[[EpochEnd], None]


class Contestant:
    """Something that trains.

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
        self._steps = steps
        self._seconds = 0.0
        self._began = 0.0
        self._epochs = 0
        self._ends = False
        self._others = greenlet.getcurrent()
        self._own = greenlet(lambda: train(self._epoch_end))

    def _epoch_end(self, loss: float) -> bool:
        now = time.perf_counter()
        self.losses.append(float(loss))
        self._epochs += 1
        taken = now - self._began
        if taken < self._seconds:
            return True
        self._others.switch(self._epochs * self._steps / taken)
        return not self._ends

    def turn(self, seconds: float) -> float:
        """Train for so long, at least an epoch; returns steps per second.

        Raises:
            Anything: it failed.
        """
        self._seconds = seconds
        self._epochs, self._began = 0, time.perf_counter()
        return self._own.switch()

    def end(self) -> None:
        """Train no more."""
        self._ends = True
        self._own.switch()
