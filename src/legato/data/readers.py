"""Reading the user's data from the beginning, pass after pass.

A reader knows one kind of data: how to begin a pass over them, and what in
them changes meanwhile. `iterables` makes a source of it.
"""

import abc
import itertools
from collections.abc import Iterator
from typing import Any

from legato.compat import keras_data
from legato.data import streams
from legato.data.attributes import Attributes
from legato.data.batches import copied
from legato.data.holding import Tracked
from legato.errors import DataError, RestoreError

_END = object()


class Passes(abc.ABC):
    """Passes over the data, from the first on."""

    @abc.abstractmethod
    def begin(self, number: int) -> Iterator[Any]:
        """The batches of a pass.

        Args:
            number: of the pass; not smaller than that of the one before.
        """

    def begin_at(self, number: int, skipped: int) -> Iterator[Any]:
        """The batches of a pass that follow the first ones.

        Raises:
            RestoreError: there are not so many.
        """
        batches = self.begin(number)
        for i in range(skipped):
            if next(batches, _END) is _END:
                raise RestoreError(
                    f"the checkpoint is at batch {skipped} of pass {number} "
                    f"over the data, and there are only {i} now. Resume with "
                    "the data of the run"
                )
        return batches

    def stream(self, seed: int, number: int) -> streams.Stream:
        """What the user's code draws from in a pass."""
        return streams.Stream(seed, "pass", number)

    def close(self) -> None:  # noqa: B027 - few have anything to do
        """Let go of what is open."""


class Reader(abc.ABC):
    """One kind of data.

    Attributes:
        kind: what it is, for the identity.
        length: batches in a pass; None if that is not known.
        endless: there is no end.
        one_shot: there is one pass, and it can be read once.
        cheap: the first batch may well be drawn twice.
        tracked: what changes in the user's objects.
        notes: why resuming is not exact, each with the remedy.
    """

    kind: str
    length: int | None = None
    endless: bool = False
    one_shot: bool = False
    cheap: bool = True
    # Whether other threads run the user's code, where the global generators
    # cannot be held.
    threads: bool = False

    def __init__(self) -> None:
        self.tracked: list[Tracked] = []
        self.notes: list[str] = []

    @abc.abstractmethod
    def open(self) -> Passes:
        """Passes that are the same each time, in each process."""


class Iterable(Reader):
    """Any object that gives batches when it is iterated over, repeatedly.

    Args:
        data: the object.
        kind: what it is.
        length: batches in a pass; None asks `len`.
    """

    def __init__(
        self, data: Any, kind: str = "iterable", length: int | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.data = data
        self.length = length if length is not None else _length(data)
        if hasattr(data, "__dict__"):
            self.track(Attributes(data))

    def track(self, attributes: Attributes) -> None:
        """Save what changes in an object with the position."""
        if attributes.unseen is None:
            self.tracked.append(attributes)

    def open(self) -> Passes:
        """Iterates over the object."""
        return _Iterations(self.data)


class _Iterations(Passes):
    def __init__(self, data: Any) -> None:
        self._data = data

    def begin(self, number: int) -> Iterator[Any]:
        return iter(self._data)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError, AttributeError):
        return None


class Adapter(Reader):
    """A data adapter of Keras's kind, which `fit` takes as it is."""

    kind = "adapter"

    def __init__(self, adapter: keras_data.DataAdapter) -> None:
        super().__init__()
        self._adapter = adapter
        self.length = adapter.num_batches

    def open(self) -> Passes:
        """Iterates over its NumPy arrays."""
        return _AdapterPasses(self._adapter)


class _AdapterPasses(Passes):
    def __init__(self, adapter: keras_data.DataAdapter) -> None:
        self._adapter = adapter

    def begin(self, number: int) -> Iterator[Any]:
        # As at the beginning of `fit`, and between epochs.
        self._adapter.on_epoch_end()
        self._adapter.on_epoch_begin()
        return iter(self._adapter.get_numpy_iterator())


class OneShot(Reader):
    """A generator, or any iterator: its batches come once.

    Its first batch is drawn when training is prepared, and kept for training.
    What it draws from the global generators must not depend on who asks for
    the first batch: its stream is keyed by the seed that was set for Keras
    alone (`keras.utils.set_random_seed`).
    """

    kind = "generator"
    endless = True  # as far as is known
    one_shot = True
    cheap = False

    def __init__(self, iterator: Iterator[Any]) -> None:
        super().__init__()
        self._stream = streams.Stream(keras_data.global_seed() or 0, "once")
        self._iterator = iterator
        self._taken = 0
        self._kept: list[Any] = []

    def peek(self) -> Any:
        """The first batch, which training gets all the same.

        Raises:
            DataError: there is none.
        """
        with self._stream.active():
            for batch in itertools.islice(self._iterator, 1):
                self._kept.append(copied(batch))
                return batch
        raise DataError("it gave no batch: it must give at least one")

    def open(self) -> Passes:
        """Goes on with the one pass that there is."""
        return _OnePass(self)

    def batches(self, start: int = 0) -> Iterator[Any]:
        """Its batches from one on, if that is still to be had."""
        if self._taken > start:
            raise RestoreError(
                f"{self._taken} batches of it were taken already, and it "
                "cannot begin anew. Make a new one, or give data that can be "
                "read again: arrays, a keras.utils.PyDataset, an object whose "
                "__iter__ makes a new generator"
            )
        while True:
            if self._kept:
                batch = self._kept.pop()
            else:
                batch = next(self._iterator, _END)
            if batch is _END:
                return
            self._taken += 1
            if self._taken > start:
                yield batch


class _OnePass(Passes):
    def __init__(self, reader: OneShot) -> None:
        self._reader = reader

    def begin(self, number: int) -> Iterator[Any]:
        if number:
            raise DataError(
                "it ended: an epoch needs more batches than it had left. Let "
                "it go on without end (`while True`), or give fewer "
                "steps_per_epoch or epochs"
            )
        return self._reader.batches()

    def begin_at(self, number: int, skipped: int) -> Iterator[Any]:
        self.begin(number)
        return self._reader.batches(skipped)

    def stream(self, seed: int, number: int) -> streams.Stream:
        return self._reader._stream


class Kept(Reader):
    """The first batches of a generator, kept to be read again and again.

    Args:
        reader: the generator's.
        count: how many.
    """

    kind = "kept"

    def __init__(self, reader: OneShot, count: int) -> None:
        super().__init__()
        self.length = count
        self._reader = reader
        self._batches: list[Any] = []

    def open(self) -> Passes:
        """Draws them, the first time."""
        if not self._batches:
            with self._reader._stream.active():
                found = itertools.islice(self._reader.batches(), self.length)
                self._batches = [copied(batch) for batch in found]
            if len(self._batches) != self.length:
                raise DataError(
                    f"it ended after {len(self._batches)} batches, and "
                    f"{self.length} are wanted"
                )
        return _Iterations(self._batches)
