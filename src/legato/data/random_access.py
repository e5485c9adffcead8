"""Data sets that give any example by its number, in an order of ours."""

import numbers
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from legato.compat import keras_data
from legato.data import streams
from legato.data.batches import BatchSource, Chunks, Layout, Leaves
from legato.data.beside import gathered
from legato.data.buckets import BucketPlan, Buckets
from legato.data.order import (
    Plan,
    check_batch_size,
    check_shuffle,
    read_position,
)
from legato.data.source import Chunk, DataIterator, DataState
from legato.errors import ConfigError, DataError
from legato.types import JSON
from legato.workers import Job, Recipe, Workers, stack
from legato.workers.lending import Lender
from legato.workers.recipe import Rows, mapped, never


class RandomAccessSource(BatchSource):
    """A dataset of single examples, shuffled globally, resumed at once.

    The order of an epoch is a permutation computed from (seed, epoch), which
    takes no memory: the state is two integers, whatever the number of
    examples, and resuming costs the same at any position. Nothing depends on
    the number or kind of the workers.

    Args:
        dataset: anything with `__len__` and `__getitem__(int)` that gives
            examples: nested structures of arrays, numbers, strings and other
            objects (which stay on the host). A PyTorch or
            Hugging Face map-style dataset (whose `__getitems__` is used), a
            Grain `MapDataset` or `RandomAccessDataSource`, a list of
            examples, or a class of yours. Also arrays, nested in dicts or
            tuples, whose rows are the examples.
        batch_size: examples in a batch.
        transform: `transform(example, rng)` gives the example to train on;
            `rng` is a `numpy.random.Generator` that depends on the seed, the
            epoch and the example's index alone. What augments draws from it.
        collate: makes a batch of a list of examples. By default arrays are
            stacked, which must have the same shapes; `legato.Pad` makes them
            the same.
        shuffle: visit the examples in a new random order each epoch; "batch"
            only mixes each batch within itself.
        seed: of the order and of `rng`; None takes the run's.
        drop_remainder: leave out a partial last batch.
        bucket_by: puts examples of like length into one batch; with `Pad` and
            the same boundaries as `collate`, there are as many lengths of
            batches as buckets.
        workers: how many threads or processes make batches; 0 makes them
            between the steps.
        processes: workers are processes, for what computes; threads are for
            what waits.
        prefetch: how many batches each worker makes ahead; what it may take
            of memory.
        timeout: seconds after which a worker that is waited for is taken to
            hang.

    Raises:
        DataError: it is no such dataset, has no examples, or its first batch
            cannot be made.
        ConfigError: another argument is wrong.
        WorkerError: a worker could not make the first batch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        transform: Callable[[Any, np.random.Generator], Any] | None = None,
        collate: Callable[[Sequence[Any]], Any] | None = None,
        shuffle: bool | Literal["batch"] = True,
        seed: int | None = None,
        drop_remainder: bool = False,
        bucket_by: Buckets | None = None,
        workers: int = 0,
        processes: bool = False,
        prefetch: int = 2,
        timeout: float = 600.0,
    ) -> None:
        self.what = f"dataset ({type(dataset).__name__})"
        dataset = _as_dataset(dataset, self.what)
        self._length = _length(dataset, self.what)
        check_batch_size(batch_size)
        self._batch_size = int(batch_size)
        self._drop_remainder = bool(drop_remainder)
        self._shuffle: bool | Literal["batch"] = check_shuffle(shuffle)
        self.plan = self._plan(dataset, bucket_by)
        self.workers = _check_number("workers", workers, at_least=0)
        _check_number("prefetch", prefetch, at_least=1)
        if not isinstance(timeout, numbers.Real) or not timeout > 0:
            raise ConfigError(
                f"timeout={timeout!r}: it must be a number of seconds above 0."
            )
        if processes and not workers:
            raise ConfigError(
                "processes=True with workers=0: say how many processes, such "
                "as workers=4."
            )
        self.seed = seed
        self._stacks = collate is None
        self.recipe = Recipe(dataset, transform, collate or stack, self.what)
        self.lender = Lender(
            self.recipe,
            workers=self.workers,
            processes=bool(processes),
            prefetch=prefetch,
            timeout=float(timeout),
        )
        weakref.finalize(self, self.lender.close)
        self._notes: list[str] = []
        self._learn_layout(processes=bool(processes))

    def _plan(self, dataset: Any, buckets: Buckets | None) -> Plan | BucketPlan:
        if buckets is None:
            return Plan(
                self._length,
                self._batch_size,
                self._shuffle,
                self._drop_remainder,
            )
        if not isinstance(buckets, Buckets):
            raise ConfigError(
                f"bucket_by={buckets!r:.80}: it must be a legato.Buckets, "
                "which says how long the examples are."
            )
        with streams.kept():
            streams.begin(0, "lengths")
            bucket_of = buckets.of(dataset, self._length, self.what)
        return BucketPlan(
            bucket_of,
            buckets.sizes(bucket_of, self._batch_size),
            shuffle=self._shuffle,
            drop_remainder=self._drop_remainder,
        )

    def _learn_layout(self, *, processes: bool) -> None:
        """Makes the first batch, twice."""
        job = Job(0, 0, 0, self.plan.order(0).batch(0, 0))
        if processes:
            workers = self.lender.lend()
            try:
                workers.begin(job, try_out=True)
                batch, findings = workers.take()
                self._layout = Layout(batch, self.what)
            finally:
                self.lender.take_back(workers)
        else:
            with streams.kept():
                batch, findings = self.recipe.try_out(job)
            self._layout = Layout(batch, self.what)
        self._repeatable = findings.same
        if not findings.same:
            self._notes.append(
                f"{self.what}: batch 0 was made twice and was not the same: "
                "it uses something that cannot be put back. Draw from the "
                "generator that `transform` gets, or from `numpy.random`."
            )
        if findings.draws:
            self._note_draws("it")

    def _note_draws(self, who: str) -> None:
        if self.lender.watch is None:
            return
        self.lender.watch = None  # once is enough
        self._notes.append(
            f"{self.what}: with workers={self.workers} threads, {who} draws "
            "from the global generators in an order that varies. Draw "
            "from the generator that `transform` gets, or take "
            "processes=True."
        )

    def leaves(self, batch: Any) -> Leaves:
        """The arrays of a batch, with the dtypes of the device."""
        return self._layout.leaves(batch)

    @property
    def inexact(self) -> str | None:
        """What was found when batches were made."""
        watch = self.lender.watch
        if watch is not None and watch.suspects:
            with streams.kept():
                number = watch.drawing(
                    lambda job: self.recipe.make(job, alone=False)
                )
            if number is not None:
                self._note_draws(f"it (in batch {number})")
        return " ".join(self._notes) or None

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one epoch, a partial last one included."""
        return self.plan.batches_per_epoch

    @property
    def partial_batch_size(self) -> int:
        """Known where examples are stacked."""
        return self.plan.partial_batch_size if self._stacks else 0

    @property
    def identity(self) -> Mapping[str, JSON]:
        """Its class, its length, its order and its first batch."""
        return {
            "kind": "random access",
            "class": type(self.recipe.dataset).__name__,
            "examples": self._length,
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "seed": self.seed,
            "drop_remainder": self._drop_remainder,
            **self.plan.identity,
            **self._layout.identity(repeatable=self._repeatable),
        }

    def iterate(self, *, seed: int, capacity: int) -> DataIterator:
        """Start at the first batch of epoch 0."""
        return _Iterator(
            self, seed if self.seed is None else self.seed, capacity
        )


class _Iterator(DataIterator):
    """The state is (epoch, batches of it that were given out).

    What was made ahead of that, also a batch that did not go into a chunk
    because its shape is another, is made again after `set_state`.
    """

    def __init__(
        self, source: RandomAccessSource, seed: int, capacity: int
    ) -> None:
        self._source = source
        self._seed = seed
        # Each computes a part of an epoch's order at a time, and what workers
        # make ahead may be of the next epoch.
        self._order = self._order_ahead = source.plan.order(seed)
        if source.workers:
            self._order_ahead = source.plan.order(seed)
        self._chunks = Chunks(self._draw, capacity)
        self._epoch = 0
        self._batch = 0
        self._drawn = 0  # batches of the epoch that were taken from workers
        self._problem: Exception | None = None
        self._ahead: _Ahead | None = None
        self._gives_up: Callable[[], bool] = never
        # With workers, none of the user's code runs in this thread.
        self.draws_ahead = source.workers > 0

    def get_state(self) -> DataState:
        return {"epoch": self._epoch, "batch": self._batch}

    def set_state(self, state: DataState) -> None:
        self._epoch, self._batch = read_position(
            state, self._source.batches_per_epoch
        )
        self._drawn = self._batch
        self._chunks.pending = None
        self._problem = None
        if self._ahead is not None:
            self._ahead.go_to(self._epoch, self._batch)

    def watch(self, stop_requested: Callable[[], bool]) -> None:
        self._gives_up = stop_requested

    def next_chunk(self, max_batches: int) -> Chunk:
        if self.draws_ahead:
            found = self._chunks.next(max_batches)
        else:
            with streams.kept():
                found = self._chunks.next(max_batches)
        assert found is not None  # an epoch has a batch
        rows = [
            self._order.batch(self._epoch, self._batch + i)
            for i in range(found.count)
        ]
        self._batch += found.count
        if self._batch == self._source.batches_per_epoch:
            self._epoch, self._batch, self._drawn = self._epoch + 1, 0, 0
        return found.chunk(self.get_state(), np.stack(rows))

    def _draw(self) -> Leaves | None:
        """The next batch of this epoch."""
        if self._drawn == self._source.batches_per_epoch:
            return None
        try:
            leaves = self._source.leaves(self._made())
        except Exception as error:
            if self._ahead is not None:
                self._ahead.go_to(self._epoch, self._drawn)
            if self._drawn == self._batch:
                raise
            # What comes before it is trained on first.
            self._problem = error
            return None
        self._drawn += 1
        return leaves

    def _made(self) -> Any:
        source = self._source
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem
        if not source.workers:
            job = self._job(self._epoch, self._drawn)
            return source.recipe.make(job, alone=True)
        if self._ahead is None:
            workers = source.lender.lend()
            workers.gives_up = self._gives_up
            self._ahead = _Ahead(
                workers,
                self._job,
                source.batches_per_epoch,
                (self._epoch, self._drawn),
            )
        return self._ahead.take()

    def _job(self, epoch: int, batch: int) -> Job:
        indices = self._order_ahead.batch(epoch, batch)
        return Job(self._seed, epoch, batch, indices)

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.workers.drop()
            self._source.lender.take_back(self._ahead.workers)
            self._ahead = None


class _Ahead:
    """What an iterator has the workers make, up to some batches ahead."""

    def __init__(
        self,
        workers: Workers,
        job: Callable[[int, int], Job],
        batches_per_epoch: int,
        position: tuple[int, int],
    ) -> None:
        self.workers = workers
        self._job = job
        self._batches = batches_per_epoch
        self._taken = self._next = position
        self._crosses = position[0] > 0

    def go_to(self, epoch: int, batch: int) -> None:
        """Forget what is made, and go on from here."""
        self.workers.drop()
        self._taken = self._next = epoch, batch

    def take(self) -> Any:
        """The next batch."""
        while self._taken == self._next or (
            self._may_go_on() and self.workers.room()
        ):
            self.workers.begin(self._job(*self._next))
            self._next = self._after(self._next)
        batch = self.workers.take()
        self._taken = self._after(self._taken)
        return batch

    def _may_go_on(self) -> bool:
        # A validation needs one epoch: what is made of the next would be for
        # nothing. Whoever comes to a second one may want more of them.
        self._crosses = self._crosses or self._taken[0] > 0
        return self._crosses or self._next[0] == self._taken[0]

    def _after(self, position: tuple[int, int]) -> tuple[int, int]:
        epoch, batch = position[0], position[1] + 1
        return (epoch + 1, 0) if batch == self._batches else (epoch, batch)


def _as_dataset(dataset: Any, what: str) -> Any:
    if isinstance(dataset, keras.utils.PyDataset):
        raise DataError(
            f"{what} is a PyDataset, which gives batches: this source makes "
            "batches of single examples. Give the PyDataset itself to "
            "`legato.fit`."
        )
    if isinstance(dataset, tuple | dict):
        return Rows(mapped(_as_array, gathered(dataset)))
    if isinstance(dataset, str | bytes) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise DataError(
            f"{what} does not give examples by their number: it must have "
            "__len__ and __getitem__(int). Use `legato.fit` with the data "
            "itself for what can only be iterated over."
        )
    return dataset


def _as_array(leaf: Any) -> np.ndarray:
    array = keras_data.to_numpy(leaf)
    if array.ndim == 0:
        raise DataError(
            f"The data hold the scalar {leaf!r}: every array must have shape "
            "[examples, ...]. (Examples that are tuples or dicts belong into "
            "a list.)"
        )
    return array


def _length(dataset: Any, what: str) -> int:
    try:
        return len(dataset)
    except TypeError as error:
        raise DataError(f"{what} has no length: {error}") from error


def _check_number(argument: str, value: Any, *, at_least: int) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or value < at_least
    ):
        raise ConfigError(
            f"{argument}={value!r}: it must be an int of at least {at_least}."
        )
    return int(value)
