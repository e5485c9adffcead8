"""Reading the user's data from the beginning, pass after pass.

A reader knows one kind of data: how to begin a pass over them, and what in
them changes meanwhile. `iterables` makes a source of it.
"""

import abc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from legato.compat import keras_data
from legato.data import streams
from legato.data.attributes import Attributes
from legato.data.batches import copied
from legato.data.encoding import decode, encode
from legato.data.holding import Tracked
from legato.data.source import DataState
from legato.data.stream_state import StreamState, streams_in
from legato.errors import DataError, RestoreError

END = object()
"""In the place of a batch, where there is none."""

Method = Literal["replay", "state", "skip"]
"""How a pass is resumed: by reading it again, by the state that its iterator
tells, or by leaving out what comes first without loading it."""


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
            if next(batches, END) is END:
                raise RestoreError(
                    f"the checkpoint is at batch {skipped} of pass {number} "
                    f"over the data, and there are only {i} now. Resume with "
                    "the data of the run"
                )
        return batches

    def get_state(self) -> DataState | None:
        """Where the pass is by the word of its iterator; None: it has none.

        Raises:
            CannotEncodeError: it holds what cannot be saved.
        """
        return None

    def resume(self, number: int, state: DataState) -> Iterator[Any]:
        """The batches of a pass that follow those before `get_state`."""
        raise NotImplementedError

    def skip_to(
        self, number: int, skipped: int, each: Callable[[int], None]
    ) -> Iterator[Any]:
        """As `begin_at`, but without loading the batches before.

        Args:
            number: of the pass.
            skipped: how many batches are left out.
            each: called with the number of each of them, in its turn.
        """
        raise NotImplementedError

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
        threads: other threads run the user's code, where the global
            generators cannot be held.
        ahead: nothing of the user's runs in the thread that draws.
        methods: how its passes may be resumed, the best first; all else is
            read again. They are tried.
        before: after so many batches of a pass it is tried.
        method: what came of that.
        why: why it is read again.
        tells_end: the state that is told after the last batch says so.
        interval: the state is dear: so many batches lie between two.
        tracked: what changes in the user's objects.
        loading: which of these change only by loading batches, if at all.
        notes: why resuming is not exact, each with the remedy.
    """

    kind: str
    length: int | None = None
    endless: bool = False
    one_shot: bool = False
    cheap: bool = True
    threads: bool = False
    ahead: bool = False
    methods: Sequence[Method] = ()
    before: int = 2
    method: Method = "replay"
    why: str | None = None
    tells_end: bool = False
    interval: int | None = None

    def __init__(self) -> None:
        self.tracked: list[Tracked] = []
        self.loading: list[int] = []
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

    Attributes:
        iterator_tells: whether its iterators tell their state.
    """

    methods = ("state",)
    iterator_tells: bool = False

    def __init__(
        self, data: Any, kind: str = "iterable", length: int | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.data = data
        self.length = length if length is not None else _length(data)
        if hasattr(data, "__dict__"):
            held = streams_in(data)
            self.tracked += map(StreamState, held)
            self.track(Attributes(data, apart=held))

    def track(self, attributes: Attributes) -> None:
        """Save what changes in an object with the position."""
        if attributes.unseen is None:
            self.tracked.append(attributes)

    def open(self) -> Passes:
        """Iterates over the object."""
        return _Iterations(self)


class GeneratorFunction(Iterable):
    """A function that is called for each pass, and gives a generator.

    What it takes from outside is not known (an object whose method it is may
    hold the model).
    """

    def __init__(self, function: Callable[[], Iterator[Any]]) -> None:
        super().__init__(_Called(function), "generator function")


class _Called:
    __slots__ = ("_function",)

    def __init__(self, function: Callable[[], Iterator[Any]]) -> None:
        self._function = function

    def __iter__(self) -> Iterator[Any]:
        return self._function()


_PROTOCOLS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))


def told_by(thing: Any) -> tuple[str, str] | None:
    """The names of the methods by which an object tells its state."""
    for names in _PROTOCOLS:
        if all(callable(getattr(thing, name, None)) for name in names):
            return names
    return None


class _Iterations(Passes):
    """Iterates over an object; its iterator may tell its state, or it itself.

    Args:
        reader: of the object.
    """

    def __init__(self, reader: Iterable) -> None:
        self._reader = reader
        self._iterator: Any = None

    def begin(self, number: int) -> Iterator[Any]:
        self._iterator = iter(self._reader.data)
        self._reader.iterator_tells = told_by(self._iterator) is not None
        return self._iterator

    def get_state(self) -> DataState | None:
        teller = self._iterator
        if not self._reader.iterator_tells:
            teller = self._reader.data
        names = told_by(teller)
        return None if names is None else encode(getattr(teller, names[0])())

    def resume(self, number: int, state: DataState) -> Iterator[Any]:
        # An object is given its state before its iterator is made.
        teller: Any = self._reader.data
        if self._reader.iterator_tells:
            teller = self.begin(number)
        names = told_by(teller)
        assert names is not None  # it told the state
        getattr(teller, names[1])(decode(state))
        return teller if self._reader.iterator_tells else self.begin(number)

    def close(self) -> None:
        self._iterator = None


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
                batch = next(self._iterator, END)
            if batch is END:
                return
            self._taken += 1
            if self._taken > start:
                yield batch


class _OnePass(Passes):
    def __init__(self, reader: OneShot) -> None:
        self._reader = reader

    def begin(self, number: int) -> Iterator[Any]:
        _check_only_pass(number)
        return self._reader.batches()

    def begin_at(self, number: int, skipped: int) -> Iterator[Any]:
        self.begin(number)
        return self._reader.batches(skipped)

    def stream(self, seed: int, number: int) -> streams.Stream:
        return self._reader._stream


class StatefulIterator(Reader):
    """An iterator that tells its state, and so can be read again.

    Args:
        iterator: the iterator, as the user made it.
    """

    kind = "iterator"
    endless = True  # as far as is known
    methods = ("state",)

    def __init__(self, iterator: Iterator[Any]) -> None:
        super().__init__()
        self._iterator: Any = iterator
        self._built = self._encoded()

    def _encoded(self) -> DataState:
        names = told_by(self._iterator)
        assert names is not None
        return encode(getattr(self._iterator, names[0])())

    def _set(self, state: DataState) -> Iterator[Any]:
        names = told_by(self._iterator)
        assert names is not None
        getattr(self._iterator, names[1])(decode(state))
        return self._iterator

    def open(self) -> Passes:
        """Its batches from the first on."""
        return _OfIterator(self)


class _OfIterator(Passes):
    def __init__(self, reader: StatefulIterator) -> None:
        self._reader = reader

    def begin(self, number: int) -> Iterator[Any]:
        _check_only_pass(number)
        return self._reader._set(self._reader._built)

    def get_state(self) -> DataState | None:
        return self._reader._encoded()

    def resume(self, number: int, state: DataState) -> Iterator[Any]:
        return self._reader._set(state)


def _check_only_pass(number: int) -> None:
    if number:
        raise DataError(
            "it ended: an epoch needs more batches than it had left. Let "
            "it go on without end (`while True`), or give fewer "
            "steps_per_epoch or epochs"
        )


class Kept(Reader):
    """The first batches of a generator, kept to be read again and again.

    Args:
        reader: the generator's.
        count: how many.
        argument: what the caller calls that, for messages.

    Attributes:
        count: how many.
    """

    kind = "kept"

    def __init__(self, reader: OneShot, count: int, argument: str) -> None:
        super().__init__()
        self.length = self.count = count
        self._argument = argument
        self._reader = reader
        self._batches: list[Any] = []

    def open(self) -> Passes:
        """Draws them, the first time."""
        if not self._batches:
            with self._reader._stream.active():
                found = itertools.islice(self._reader.batches(), self.count)
                self._batches = [copied(batch) for batch in found]
            if len(self._batches) != self.count:
                raise DataError(
                    f"it ended after {len(self._batches)} batches, and "
                    f"{self.count} are wanted ({self._argument}). Give fewer"
                )
        return _Again(self._batches)


class _Again(Passes):
    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def begin(self, number: int) -> Iterator[Any]:
        return iter(self._batches)
