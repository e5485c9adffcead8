"""Hugging Face's `IterableDataset`, on any backend.

(Its map-style datasets give examples by their number: see `random_access`.)
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from legato.data.encoding import decode, encode
from legato.data.readers import Iterable, Passes
from legato.data.source import DataState
from legato.errors import DataError
from legato.workers import UnevenError, stack

# A generator that was given no seed has one of 128 bits from the system.
_MAX_SEED = 2**64


class HuggingFaceStream(Iterable):
    """Reads an `IterableDataset` of batches, by the state that it tells.

    Which leaves out what is in the buffer of a shuffle. That shows only after
    some batches, too late for a trial: so the pass is read again.

    Args:
        dataset: the dataset.
    """

    tells_end = True

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, "Hugging Face IterableDataset")
        # All that changes in it is in the copies that are read.
        self.tracked = []
        parts = list(_chain(dataset._ex_iterable))
        self.endless = any(
            type(part).__name__ == "RepeatExamplesIterable"
            and part.num_times is None
            for part in parts
        )
        generators = [getattr(part, "generator", None) for part in parts]
        self.shuffles = any(each is not None for each in generators)
        if any(hasattr(part, "buffer_size") for part in parts):
            self.methods = ()
            self.why = "its state leaves out the buffer of its shuffle"
        if any(map(_has_no_seed, generators)):
            self.notes.append(
                "a shuffle has no seed: another process draws another order. "
                "Give it one: shuffle(seed=1)"
            )

    def open(self) -> Passes:
        """Iterates over a copy."""
        return _Passes(self)


class _Passes(Passes):
    """Iterates over a copy of the dataset.

    For it tells the state of the iterator that was made last, and iterators
    share what they count.
    """

    def __init__(self, reader: HuggingFaceStream) -> None:
        self._shuffles = reader.shuffles
        try:
            self._data: Any = copy.deepcopy(reader.data)
        except Exception as error:  # of what the user put into it
            raise DataError(
                "it cannot be copied, so that it could be read from its "
                f"beginning ({type(error).__name__}: {error!s:.200})"
            ) from error
        self._first = int(self._data.epoch)

    def begin(self, number: int) -> Iterator[Any]:
        return self._iterate(number, {})

    def resume(self, number: int, state: DataState) -> Iterator[Any]:
        return self._iterate(number, decode(state))

    def _iterate(self, number: int, state: Any) -> Iterator[Any]:
        if self._shuffles:
            self._data.set_epoch(self._first + number)
        self._data.load_state_dict(state)
        return map(_batch, self._data)

    def get_state(self) -> DataState:
        return encode(self._data.state_dict())


def _batch(columns: Any) -> Any:
    """A batch with arrays, where it has lists of values."""
    if not isinstance(columns, dict):
        return columns
    found = {}
    for name, column in columns.items():
        if isinstance(column, str | bytes | int | float | np.generic):
            raise DataError(
                f"it gives single examples ({name!r} is {column!r:.40}), and "
                "they are wanted in batches: give dataset.batch(n)"
            )
        if isinstance(column, list) and column:
            try:
                column = stack(column)
            except UnevenError as error:
                raise DataError(
                    f"example {error.position} of a batch {error.message} "
                    f"(the column {name!r}; pad it before `.batch`)"
                ) from error
        found[name] = column
    return found


def _chain(part: Any) -> Iterator[Any]:
    """What a dataset is made of."""
    yield part
    inner = getattr(part, "ex_iterable", None)
    parts = getattr(part, "ex_iterables", ())
    for each in (*parts, *([] if inner is None else [inner])):
        yield from _chain(each)


def _has_no_seed(generator: Any) -> bool:
    if generator is None:
        return False
    entropy = generator.bit_generator.seed_seq.entropy
    return isinstance(entropy, int) and entropy >= _MAX_SEED
