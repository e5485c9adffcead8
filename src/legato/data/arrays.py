"""Arrays in memory, visited in an order that is computed, not stored."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from legato.data import beside
from legato.data.columns import Column, as_column
from legato.data.order import (
    Plan,
    check_batch_size,
    check_shuffle,
    read_position,
)
from legato.data.source import (
    ArraySpec,
    Batch,
    Block,
    Chunk,
    DataIterator,
    DataSource,
    DataState,
    array_specs,
)
from legato.data.structure import Structure
from legato.errors import DataError
from legato.types import JSON
from legato.workers.recipe import content

# Data up to this size live on the device, and only indices travel. It is a
# constant, not measured: the choice changes the compiled program.
_RESIDENT_BYTES = 256 * 2**20


class ArraySource(DataSource):
    """Random-access arrays, shuffled globally, resumed in constant time.

    The order of an epoch is a permutation computed from (seed, epoch): the
    state is two integers, and it does not depend on how batches are cut into
    device loops.

    Args:
        arrays: any nested structure of arrays, each of shape
            `[examples, ...]`; usually `(features, labels)`. None may stand in
            the place of an array, and does so in each batch. Arrays of any
            library are taken (see `as_column`); memory-mapped ones are read
            as their rows are needed. Those of strings, dates and objects, and
            lists of strings, stay on the host, for host metrics.
        batch_size: examples in a batch.
        shuffle: visit the examples in a new random order each epoch; "batch"
            only mixes each batch within itself.
        seed: of the order; None takes the run's.
        drop_remainder: leave out a partial last batch; by default it is
            trained on as a smaller batch.

    Raises:
        DataError: no arrays that a device takes, no examples, lengths that
            differ, or a bad `batch_size`.
    """

    def __init__(
        self,
        arrays: Any,
        batch_size: int,
        *,
        shuffle: bool | Literal["batch"] = True,
        seed: int | None = None,
        drop_remainder: bool = False,
    ) -> None:
        arrays = beside.gathered(arrays)
        self._structure = Structure(arrays)
        columns = [as_column(a) for a in Structure.leaves(arrays)]
        self._length = _common_length(self._structure, columns)
        self._values = beside.placeholders(self._structure, columns)
        self._all_columns = columns
        self._columns, self._others = beside.split(columns)
        if not self._columns:
            raise DataError(
                "The data hold nothing but arrays of dtype "
                f"{columns[0].dtype}, which no device takes: there must be one "
                "of numbers too. (Turn strings into numbers first.)"
            )
        check_batch_size(batch_size)
        self._plan = Plan(
            self._length,
            int(batch_size),
            check_shuffle(shuffle),
            bool(drop_remainder),
        )
        self._seed = seed
        self._row_bytes = sum(
            math.prod(c.shape[1:]) * c.dtype.itemsize for c in self._columns
        )
        self._is_resident = self._length * self._row_bytes <= _RESIDENT_BYTES
        self._resident: list[np.ndarray] | None = None

    @property
    def batches_per_epoch(self) -> int:
        return self._plan.batches_per_epoch

    @property
    def full_batch_size(self) -> int:
        return self._plan.full_batch_size

    @property
    def partial_batch_size(self) -> int:
        return self._plan.partial_batch_size

    @property
    def batch_bytes(self) -> int:
        if self._is_resident:
            return self._plan.batch_size * np.dtype(np.int32).itemsize
        return self._plan.batch_size * self._row_bytes

    @property
    def resident(self) -> Any:
        if self._is_resident and self._resident is None:
            self._resident = [c.rows(slice(None)) for c in self._columns]
        return self._resident

    @property
    def identity(self) -> Mapping[str, JSON]:
        # 64 rows spread over the data tell one data set from another at no
        # cost that grows with it.
        rows = np.unique(np.linspace(0, self._length - 1, 64).astype(np.int64))
        digest = hashlib.sha256()
        for column in self._all_columns:
            digest.update(content(column.rows(rows)))
        return {
            "kind": "arrays",
            "structure": repr(self._structure),
            "dtypes": [str(c.dtype) for c in self._all_columns],
            "shapes": [list(c.shape[1:]) for c in self._all_columns],
            "examples": self._length,
            "batch_size": self._plan.batch_size,
            "shuffle": self._plan.shuffle,
            "seed": self._seed,
            "drop_remainder": self._plan.drop_remainder,
            "rows_sha256": digest.hexdigest(),
        }

    def batch_spec(self, batch_size: int) -> Batch:
        return self._pack(
            [
                ArraySpec(shape=(batch_size, *c.shape[1:]), dtype=c.dtype)
                for c in self._columns
            ]
        )

    def _pack(self, arrays: Sequence[Any]) -> Batch:
        return self._structure.pack(beside.merged(self._values, arrays))

    def columns(self) -> Iterator[tuple[str, Column]]:
        """The arrays for the device, each with its path in a batch: "1"."""
        yield from zip(array_specs(self), self._columns, strict=True)

    def fetch(self, resident: Any, operands: Any, index: Any) -> Batch:
        if self._is_resident:
            rows = operands[index]
            leaves = [keras.ops.take(a, rows, axis=0) for a in resident]
        else:
            leaves = [array[index] for array in operands]
        return self._pack(leaves)

    def iterate(self, *, seed: int, capacity: int) -> "_ArrayIterator":
        return _ArrayIterator(
            self, seed if self._seed is None else self._seed, capacity
        )


@dataclasses.dataclass(frozen=True)
class _Singles:
    """Batches that are handed out one by one.

    Attributes:
        epoch: in which they are.
        first: the first batch.
        stop: one more than the last.
        rows: their indices, and zeros.
        operands: the part of `rows` that is a block's.
    """

    epoch: int
    first: int
    stop: int
    rows: np.ndarray
    operands: np.ndarray


class _ArrayIterator(DataIterator):
    """The state is (epoch, batches of it that were taken)."""

    draws_ahead = True  # no code of the user's runs here

    def __init__(self, source: ArraySource, seed: int, capacity: int) -> None:
        self._source = source
        self._order = source._plan.order(seed)
        self._capacity = capacity
        self._epoch = 0
        self._batch = 0
        self._singles: _Singles | None = None

    def get_state(self) -> DataState:
        return {"epoch": self._epoch, "batch": self._batch}

    def set_state(self, state: DataState) -> None:
        self._epoch, self._batch = read_position(
            state, self._source.batches_per_epoch
        )

    def close(self) -> None:
        """It holds nothing."""

    def next_chunk(self, max_batches: int) -> Chunk:
        plan = self._source._plan
        size, full = plan.full_batch_size, plan.full_batches
        if (
            max_batches == 1
            and self._batch < full
            and self._source._is_resident
        ):
            return self._single()
        if self._batch < full:
            count = min(max_batches, full - self._batch, self._capacity)
        else:
            count, size = 1, plan.partial_batch_size
        start = self._batch * plan.full_batch_size
        rows = self._order.rows(self._epoch, start, count * size)
        rows = rows.reshape(count, size)
        self._advance(count)
        return Chunk(
            num_batches=count,
            batch_size=size,
            operands=self._operands(rows),
            state=self.get_state(),
            rows=rows,
            beside=_Beside(self._source._others, rows),
        )

    def _single(self) -> Chunk:
        """One batch, cut from the indices of many.

        Where a callback looks at each batch, most of what a step costs is
        what comes with it.
        """
        plan, capacity = self._source._plan, self._capacity
        size, singles = plan.full_batch_size, self._singles
        if (
            singles is None
            or singles.epoch != self._epoch
            or not singles.first <= self._batch < singles.stop
        ):
            first = self._batch
            stop = min(first + capacity, plan.full_batches)
            count = stop - first
            # Twice as many, so that each batch has a whole capacity after it.
            rows = np.zeros((2 * capacity, size), np.int32)
            rows[:count] = self._order.rows(
                self._epoch, first * size, count * size
            ).reshape(count, size)
            singles = _Singles(self._epoch, first, stop, rows, rows[:capacity])
            self._singles = singles
        index = self._batch - singles.first
        rows = singles.rows[index : index + 1]
        self._advance(1)
        return Chunk(
            num_batches=1,
            batch_size=size,
            operands=singles.rows[index : index + capacity],
            state=self.get_state(),
            block=Block(
                operands=singles.operands,
                index=index,
                stop=singles.stop - singles.first,
            ),
            rows=rows,
            beside=_Beside(self._source._others, rows),
        )

    def _advance(self, count: int) -> None:
        self._batch += count
        if self._batch == self._source.batches_per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0

    def _operands(self, rows: np.ndarray) -> Any:
        """The indices, or the rows themselves, padded to the capacity."""
        source = self._source

        def padded(values: np.ndarray) -> np.ndarray:
            if len(values) == self._capacity:
                return values
            out = np.zeros((self._capacity, *values.shape[1:]), values.dtype)
            out[: len(values)] = values
            return out

        if source._is_resident:
            return padded(rows.astype(np.int32))
        return [padded(column.rows(rows)) for column in source._columns]


class _Beside(Sequence[list[np.ndarray]]):
    """What stays on the host, read when somebody wants it: see `Chunk`."""

    def __init__(self, columns: list[Column], rows: np.ndarray) -> None:
        self._columns = columns
        self._rows = rows if columns else rows[:0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows[index]
        if isinstance(index, slice):
            return [self._batch(each) for each in rows]
        return self._batch(rows)

    def _batch(self, rows: np.ndarray) -> list[np.ndarray]:
        return [column.rows(rows) for column in self._columns]


def _common_length(structure: Structure, columns: list[Column]) -> int:
    if not columns:
        raise DataError(f"The data {structure!r} hold no array.")
    lengths = {
        path: column.shape[0]
        for path, column in zip(structure.paths(), columns, strict=True)
    }
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {n}" for name, n in lengths.items())
        raise DataError(
            f"The arrays have different numbers of examples ({listed}). Every "
            "array must have one row for each example."
        )
    return next(iter(lengths.values()))
