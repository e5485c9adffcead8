"""What the user's data code draws from the global generators, keyed.

A dataset that augments with `numpy.random` draws from a generator that
callbacks, and on PyTorch the steps' dropout, draw from too: what it gets
would depend on how many batches are drawn at a time. So while its code runs,
the global generators are others, functions of a key such as (seed, epoch,
batch). What is keyed needs no saving, and nobody else sees the draws.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from legato.compat import keras_data
from legato.workers.seeding import begin, fingerprint, torch_generators

__all__ = ["Stream", "begin", "fingerprint", "kept"]


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What is drawn inside leaves the global generators as they were."""
    outside = _get()
    try:
        yield
    finally:
        _set(outside)


class Stream:
    """One stream that is drawn from time and again.

    Args:
        seed: the run's seed.
        *stream: what it is for.
    """

    def __init__(self, seed: int, *stream: int | str) -> None:
        self._key = seed, *stream
        self._state: list[Any] | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the global generators are this stream's."""
        with kept():
            if self._state is None:
                begin(*self._key)
            else:
                _set(self._state)
            try:
                yield
            finally:
                self._state = _get()


def _get() -> list[Any]:
    return [
        random.getstate(),
        np.random.get_state(legacy=True),
        keras_data.swap_global_seed_generator(None),
        # Their order is fixed: those that came later are the last.
        *(generator.get_state() for generator in torch_generators()),
    ]


def _set(state: list[Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    keras_data.swap_global_seed_generator(state[2])
    for generator, saved in zip(torch_generators(), state[3:], strict=False):
        generator.set_state(saved)
