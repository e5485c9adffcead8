"""Arrays in memory, visited in an order that is computed, not stored."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import keras
import numpy as np

from legato.data.columns import Column, as_column
from legato.data.source import (
    ArraySpec,
    Batch,
    Chunk,
    DataIterator,
    DataSource,
    DataState,
)
from legato.data.structure import Structure
from legato.errors import DataError, RestoreError
from legato.rng import Permutation, derive_seed
from legato.types import JSON

# Data up to this size live on the device, and only indices travel. It is a
# constant, not measured: the choice changes the compiled program.
_RESIDENT_BYTES = 256 * 2**20

# How many positions of the order are computed at a time.
_BLOCK_ROWS = 8192


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
            as their rows are needed.
        batch_size: examples in a batch.
        shuffle: visit the examples in a new random order each epoch; "batch"
            only mixes each batch within itself.
        seed: of the order; None takes the run's.
        drop_remainder: leave out a partial last batch; by default it is
            trained on as a smaller batch.

    Raises:
        DataError: no arrays, no examples, lengths that differ, a dtype that a
            device does not take, or a bad `batch_size`.
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
        self._structure = Structure(arrays)
        self._columns = [as_column(a) for a in Structure.leaves(arrays)]
        self._length = _common_length(self._structure, self._columns)
        if isinstance(batch_size, bool) or not isinstance(
            batch_size, int | np.integer
        ):
            raise DataError(
                f"batch_size={batch_size!r}: it must be an int, the number of "
                "examples in a batch."
            )
        if batch_size < 1:
            raise DataError(
                f"batch_size={batch_size}: it must be at least 1 example."
            )
        self._batch_size = int(batch_size)
        self._shuffle = shuffle if shuffle == "batch" else bool(shuffle)
        self._seed = seed
        self._drop_remainder = bool(drop_remainder)
        if self.batches_per_epoch == 0:
            raise DataError(
                f"batch_size={batch_size} with drop_remainder=True: the data "
                f"hold {self._length} examples, less than one batch. Make the "
                "batches smaller or keep the remainder."
            )
        self._row_bytes = sum(
            math.prod(c.shape[1:]) * c.dtype.itemsize for c in self._columns
        )
        self._is_resident = self._length * self._row_bytes <= _RESIDENT_BYTES
        self._resident: list[np.ndarray] | None = None

    @property
    def batches_per_epoch(self) -> int:
        full, rest = divmod(self._length, self._batch_size)
        return full + (1 if rest and not self._drop_remainder else 0)

    @property
    def full_batch_size(self) -> int:
        return min(self._batch_size, self._length)

    @property
    def partial_batch_size(self) -> int:
        if self._drop_remainder or self._length < self._batch_size:
            return 0
        return self._length % self._batch_size

    @property
    def batch_bytes(self) -> int:
        if self._is_resident:
            return self._batch_size * np.dtype(np.int32).itemsize
        return self._batch_size * self._row_bytes

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
        for column in self._columns:
            digest.update(np.ascontiguousarray(column.rows(rows)).tobytes())
        return {
            "kind": "arrays",
            "structure": repr(self._structure),
            "dtypes": [str(c.dtype) for c in self._columns],
            "shapes": [list(c.shape[1:]) for c in self._columns],
            "examples": self._length,
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "drop_remainder": self._drop_remainder,
            "rows_sha256": digest.hexdigest(),
        }

    def batch_spec(self, batch_size: int) -> Batch:
        return self._structure.pack(
            [
                ArraySpec(shape=(batch_size, *c.shape[1:]), dtype=c.dtype)
                for c in self._columns
            ]
        )

    def columns(self) -> Iterator[tuple[str, Column]]:
        """The arrays, each with its path in a batch, such as "1"."""
        yield from zip(self._structure.paths(), self._columns, strict=True)

    def fetch(self, resident: Any, operands: Any, index: Any) -> Batch:
        if self._is_resident:
            rows = operands[index]
            leaves = [keras.ops.take(a, rows, axis=0) for a in resident]
        else:
            leaves = [array[index] for array in operands]
        return self._structure.pack(leaves)

    def iterate(self, *, seed: int, capacity: int) -> "_ArrayIterator":
        return _ArrayIterator(
            self, seed if self._seed is None else self._seed, capacity
        )


class _ArrayIterator(DataIterator):
    """The state is (epoch, batches of it that were taken)."""

    draws_ahead = True  # no code of the user's runs here

    def __init__(self, source: ArraySource, seed: int, capacity: int) -> None:
        self._source = source
        self._seed = seed
        self._capacity = capacity
        self._epoch = 0
        self._batch = 0
        # (epoch, first position, rows): see `_rows`.
        self._block = (-1, 0, np.zeros(0, np.int64))

    def get_state(self) -> DataState:
        return {"epoch": self._epoch, "batch": self._batch}

    def set_state(self, state: DataState) -> None:
        match state:
            case {"epoch": int(epoch), "batch": int(batch)} if (
                epoch >= 0 and 0 <= batch < self._source.batches_per_epoch
            ):
                self._epoch, self._batch = epoch, batch
            case _:
                raise RestoreError(
                    f"The saved data position {state!r} is not one of this "
                    f"source, which has {self._source.batches_per_epoch} "
                    "batches in an epoch. Resume with the data of the run."
                )

    def close(self) -> None:
        """It holds nothing."""

    def next_chunk(self, max_batches: int) -> Chunk:
        source = self._source
        size = source.full_batch_size
        full = source._length // size
        if self._batch < full:
            count = min(max_batches, full - self._batch, self._capacity)
        else:
            count, size = 1, source.partial_batch_size
        start = self._batch * source.full_batch_size
        rows = self._rows(start, count * size).reshape(count, size)
        self._batch += count
        if self._batch == source.batches_per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0
        return Chunk(
            num_batches=count,
            batch_size=size,
            operands=self._operands(rows),
            state=self.get_state(),
            rows=rows,
        )

    def _rows(self, start: int, count: int) -> np.ndarray:
        """Rows at positions of this epoch, computed a block at a time.

        A loop of one step (for a batch hook) would otherwise pay the fixed
        cost of a permutation for every batch.
        """
        if self._source._shuffle == "batch":
            return self._mixed_batches(start, count)
        if not self._source._shuffle:
            return np.arange(start, start + count)
        epoch, first, rows = self._block
        if epoch != self._epoch or not (
            first <= start and start + count <= first + len(rows)
        ):
            length = self._source._length
            first = start
            stop = min(length, start + max(count, _BLOCK_ROWS))
            key = derive_seed(self._seed, "order", self._epoch)
            rows = Permutation(length, key)(np.arange(first, stop))
            self._block = self._epoch, first, rows
        return rows[start - first : start - first + count]

    def _mixed_batches(self, start: int, count: int) -> np.ndarray:
        size = self._source.full_batch_size
        found = []
        for first in range(start, start + count, size):
            length = min(size, start + count - first)
            key = derive_seed(self._seed, "order", self._epoch, first // size)
            order = Permutation(length, key)(np.arange(length))
            found.append(first + order)
        return np.concatenate(found)

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
    length = next(iter(lengths.values()))
    if length == 0:
        raise DataError(
            "The data are empty: 0 examples. Give at least one example."
        )
    return length
