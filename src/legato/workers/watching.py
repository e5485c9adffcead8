"""Whether batches that threads make draw from the global generators.

Threads share these: who draws first is luck, and so is what it gets. The
first batches are tried before training, and this is for what comes later.
"""

import ctypes
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from legato.workers import seeding

# So many batches are made again each time that somebody asks.
_TRIED = 2


class Watch:
    """Suspects a batch when the generators moved while a thread made it.

    That may have been somebody else, as a callback in the thread that trains.
    So a suspect is made again where nobody else draws, and found guilty only
    if that moves them.
    """

    def __init__(self) -> None:
        self._seen = threading.local()
        self._suspects: dict[int, Any] = {}
        self._innocent: set[int] = set()

    def watched(self, number: int, job: Any, make: Callable[[Any], Any]) -> Any:
        """The batch that `make(job)` gives, made in this thread.

        Takes 10 microseconds more.

        Args:
            number: which batch of an epoch; each is made again once at most.
            job: what `make` is given, now and by `drawing`.
            make: makes the batch.
        """
        if not hasattr(self._seen, "position"):
            self._seen.position = _position()
        batch = make(job)
        # Since this thread's batch before: that is half the time of two looks,
        # and who is suspected for nothing is found innocent.
        before, self._seen.position = self._seen.position, _position()
        if self._seen.position != before and number not in self._innocent:
            self._suspects[number] = job
        return batch

    @property
    def suspects(self) -> bool:
        """Whether any batch is suspected."""
        return bool(self._suspects)

    def drawing(self, make: Callable[[Any], Any]) -> int | None:
        """The number of a batch that draws; None if none is known.

        To be called in the thread that trains, which then does nothing else,
        where the global generators are kept.

        Args:
            make: makes a batch of a job.
        """
        for _ in range(_TRIED):
            if not self._suspects:
                break
            number, job = self._suspects.popitem()
            self._innocent.add(number)
            seeding.begin(0, "suspect")
            before = seeding.fingerprint()
            try:
                make(job)
            except Exception:  # it was made before: not of this is to be told
                continue
            if seeding.fingerprint() != before:
                return number
        return None


def _position() -> Any:
    """Where NumPy's and Python's generators are, as far as is told quickly."""
    python = random.getstate()
    words = python[1]
    return words[-1], words[0], python[2], _numpys()


def _numpys() -> Any:
    """NumPy's own word for it takes four times as long as all else."""
    numpys: Any = np.random
    generator = numpys.get_bit_generator()
    if type(generator) is not np.random.MT19937:
        return repr(generator.state)
    address = generator.ctypes.state_address
    # (624 words, and the number of those that were used.)
    words = (ctypes.c_uint32 * 625).from_address(address)
    return words[624], words[0]
