"""What the user's data code draws from the global generators, keyed.

A dataset that augments with `numpy.random` draws from a generator that
callbacks, and on PyTorch the steps' dropout, draw from too: what it gets
would depend on how many batches are drawn at a time. So while its code runs,
the global generators are others, functions of a key such as (seed, epoch,
batch). What is keyed needs no saving, and nobody else sees the draws.
"""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from legato.compat import keras_data
from legato.rng import derive_seed


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What is drawn inside leaves the global generators as they were."""
    outside = _get()
    try:
        yield
    finally:
        _set(outside)


def begin(seed: int, *stream: int | str) -> None:
    """Go to the beginning of a stream; for use inside of `kept`.

    The generators of PyTorch only if it is imported already. TensorFlow's
    cannot be put back, and are left alone.

    Args:
        seed: the run's seed.
        *stream: what it is for.
    """
    derived = derive_seed(seed, "data", *stream)
    random.seed(derived)
    np.random.seed([derived >> 32, derived & 0xFFFFFFFF])
    # Keras's own is made anew, from Python's, when it is asked for.
    keras_data.swap_global_seed_generator(None)
    for generator in _torch():
        generator.manual_seed(derived)


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


def fingerprint() -> list[Any]:
    """Equal to that of another instant if nothing was drawn in between."""
    _, key, *rest = np.random.get_state(legacy=True)
    return [
        random.getstate(),
        np.asarray(key).tobytes(),
        rest,
        *(bytes(generator.get_state().numpy()) for generator in _torch()),
    ]


def _torch() -> list[Any]:
    """PyTorch's generators of the CPU, and of GPUs that are in use."""
    torch: Any = sys.modules.get("torch")
    # While it is being imported, it has none yet.
    if torch is None or not hasattr(torch, "default_generator"):
        return []
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    return generators


def _get() -> list[Any]:
    return [
        random.getstate(),
        np.random.get_state(legacy=True),
        keras_data.swap_global_seed_generator(None),
        # Their order is fixed: those that came later are the last.
        *(generator.get_state() for generator in _torch()),
    ]


def _set(state: list[Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    keras_data.swap_global_seed_generator(state[2])
    for generator, saved in zip(_torch(), state[3:], strict=False):
        generator.set_state(saved)
