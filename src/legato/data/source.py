"""What the loop asks of data: batches in a known order, and their position."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato.data.structure import Structure
from legato.types import JSON

Batch = Any
"""One batch: any nested structure of dicts, tuples, lists and arrays, each
array of shape `[batch, ...]`; None may stand in the place of an array. What
no device takes (strings, dates, objects) stays on the host, and in a step a
`HostValue` stands for it."""

Shapes = tuple[tuple[int, ...], ...]

DataState = Any
"""A tree of JSON values that may also have NumPy arrays as leaves: see
`legato.data.split_arrays`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape (the batch axis included) and dtype of one array of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Operands of consecutive batches, of which a chunk is one.

    Attributes:
        operands: as those of a `Chunk`; the same object for every chunk of
            the block.
        index: of the chunk's batch.
        stop: one more than the index of the last batch. Those up to it come
            next, unless the iterator is set to another position.
    """

    operands: Any
    index: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive batches of one shape, for one call of the compiled loop.

    Attributes:
        num_batches: how many batches it holds.
        batch_size: examples in each of them: the first axis of the first
            array of the batch (of x, that is).
        operands: what the source's `fetch` needs to make batch `i` of the
            chunk on the device: a nested structure of NumPy arrays, each of
            shape `[capacity, ...]` whatever `num_batches` is, so that every
            chunk of the same `shapes` runs through one compiled program.
            What lies behind `num_batches` does not count.
        state: the iterator's state after the last batch of this chunk; of no
            account where the iterator does not draw ahead, and then so has
            `get_state`.
        rows: which examples of the data they are, `[num_batches, batch_size]`;
            None where examples have no numbers.
        block: of a single batch: where those after it are known already.
        beside: of each batch, what no device takes: arrays of strings, dates
            or objects, each `[batch_size, ...]`, in the order of the batch's
            structure. Empty where there is nothing of the kind.
    """

    num_batches: int
    batch_size: int
    operands: Any
    state: DataState
    rows: np.ndarray | None = None
    block: Block | None = None
    beside: Sequence[Sequence[np.ndarray | None]] = ()

    @functools.cached_property
    def shapes(self) -> Shapes:
        """The shapes of the operands, without the axis of the capacity.

        Chunks that are equal in this run through one compiled program. Not
        only a partial last batch differs: batches may have any shapes, as
        sequences in buckets have.
        """
        return shapes_of(self.operands)


def shapes_of(operands: Any) -> Shapes:
    """The shapes of operands; see `Chunk.shapes`."""
    if isinstance(operands, np.ndarray):  # quickly: this is done at each step
        return (operands.shape[1:],)
    return tuple(
        tuple(array.shape[1:])
        for array in keras.tree.flatten(operands)
        if array is not None
    )


class DataIterator(abc.ABC):
    """A position in an endless, reproducible stream of batches.

    Epoch follows epoch; a chunk never spans two of them.

    Attributes:
        draws_ahead: whether `next_chunk` may run in another thread, while the
            chunk before is trained on. Only where it runs no code of the
            user's: that could draw from the global generators, which
            callbacks use meanwhile.
    """

    draws_ahead: bool = False

    @abc.abstractmethod
    def next_chunk(self, max_batches: int) -> Chunk:
        """The next batches of one shape, at most `max_batches`."""

    @abc.abstractmethod
    def get_state(self) -> DataState:
        """The position: all that `set_state` needs to go on from here."""

    @abc.abstractmethod
    def set_state(self, state: DataState) -> None:
        """Go to a position; the next chunk starts there.

        Raises:
            RestoreError: the state is another source's.
        """

    @property
    def rereads(self) -> int:
        """How many batches are read again before the next one is given.

        After `set_state`, where the data have no other way to the position.
        """
        return 0

    def watch(  # noqa: B027 - few wait for anybody
        self, stop_requested: Callable[[], bool]
    ) -> None:
        """What ends a wait for workers: `next_chunk` raises `StoppedWaiting`.

        Args:
            stop_requested: whether a signal or the time asks to stop.
        """

    def end_epoch(self) -> None:  # noqa: B027 - few have anything to do
        """The last batch of an epoch has been trained on.

        For data that are told so (`keras.utils.PyDataset.on_epoch_end`). If
        nobody calls this, it is done before the next batch is drawn.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of threads, processes and files; idempotent."""


class DataSource(abc.ABC):
    """Data that a Task feeds to its steps.

    Attributes:
        is_one_shot: it can be iterated over once in a process.
    """

    is_one_shot: bool = False

    @property
    @abc.abstractmethod
    def batches_per_epoch(self) -> int:
        """Batches in one epoch, a partial last one included."""

    @property
    @abc.abstractmethod
    def full_batch_size(self) -> int:
        """Examples in the usual batch (the first one, where they vary)."""

    @property
    @abc.abstractmethod
    def partial_batch_size(self) -> int:
        """Examples in the partial last batch; 0: there is none, or who knows.

        Compare `Chunk.shapes`; this only lets a program be traced ahead.
        """

    @property
    @abc.abstractmethod
    def batch_bytes(self) -> int:
        """Bytes that one batch takes of a chunk's operands."""

    @property
    @abc.abstractmethod
    def resident(self) -> Any:
        """Arrays kept on the device for the whole run, or None."""

    @property
    @abc.abstractmethod
    def identity(self) -> Mapping[str, JSON]:
        """What the data are, for telling that a resumed run has the same."""

    @abc.abstractmethod
    def batch_spec(self, batch_size: int) -> Batch:
        """A batch with an `ArraySpec` in the place of each array.

        (And in that of what no device takes, what stands for it in a step.)
        """

    @property
    def inexact(self) -> str | None:
        """Why resuming cannot be exact, and the remedy; None if it is.

        Some reasons show only while data are drawn: ask again when a
        checkpoint is written.
        """
        return None

    @property
    def resuming(self) -> str | None:
        """What resuming costs, in a sentence; None if it is next to nothing."""
        return None

    def example(self, capacity: int) -> Any:
        """The operands of a chunk with one batch of the usual shape.

        For tracing: training gets the same batches after it as without.

        Args:
            capacity: the first axis of the operands.
        """
        iterator = self.iterate(seed=0, capacity=capacity)
        try:
            return iterator.next_chunk(1).operands
        finally:
            iterator.close()

    @abc.abstractmethod
    def fetch(self, resident: Any, operands: Any, index: Any) -> Batch:
        """Batch `index` of a chunk, from backend tensors; runs in the step.

        Args:
            resident: `self.resident`, as backend tensors.
            operands: a chunk's operands, as backend tensors.
            index: an int32 scalar tensor in [0, num_batches).
        """

    @abc.abstractmethod
    def iterate(self, *, seed: int, capacity: int) -> DataIterator:
        """Start at the first batch of epoch 0.

        Args:
            seed: the run's seed, for a source that has none of its own.
            capacity: the fixed first axis of a chunk's operands.
        """


def array_specs(source: DataSource) -> dict[str, ArraySpec]:
    """The arrays of a batch that a device takes, by their paths."""
    spec = source.batch_spec(1)
    leaves = zip(Structure(spec).paths(), Structure.leaves(spec), strict=True)
    return {path: leaf for path, leaf in leaves if isinstance(leaf, ArraySpec)}


def partial_batches(source: DataSource, operands: Any) -> Any:
    """Operands like those of full batches, for the partial last one.

    Args:
        source: one that knows the size of its partial batch.
        operands: those of a chunk of full batches.
    """
    size, full = source.partial_batch_size, source.full_batch_size

    def resized(a: Any) -> Any:
        # (A source that knows the size has the examples in the first axis.)
        assert a.shape[1] == full
        return np.zeros((len(a), size, *a.shape[2:]), a.dtype)

    return keras.tree.map_structure(resized, operands)
