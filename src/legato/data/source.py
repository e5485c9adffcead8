"""What the loop asks of data: batches in a known order, and their position."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from legato.types import JSON

Batch = Any
"""One batch: any nested structure of dicts, tuples, lists and arrays, each
array of shape `[batch, ...]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape (the batch axis included) and dtype of one array of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive batches of one shape, for one call of the compiled loop.

    Attributes:
        num_batches: how many batches it holds.
        batch_size: examples in each of them.
        operands: what the source's `fetch` needs to make batch `i` of the
            chunk on the device: a nested structure of NumPy arrays, each of
            shape `[capacity, ...]` whatever `num_batches` is, so that every
            chunk runs through one compiled program.
        state: the iterator's state after the last batch of this chunk.
    """

    num_batches: int
    batch_size: int
    operands: Any
    state: JSON


class DataIterator(abc.ABC):
    """A position in an endless, reproducible stream of batches.

    Epoch follows epoch; a chunk never spans two of them.
    """

    @abc.abstractmethod
    def next_chunk(self, max_batches: int) -> Chunk:
        """The next batches of one shape, at most `max_batches`."""

    @abc.abstractmethod
    def get_state(self) -> JSON:
        """The position: all that `set_state` needs to go on from here."""

    @abc.abstractmethod
    def set_state(self, state: JSON) -> None:
        """Go to a position; the next chunk starts there.

        Raises:
            RestoreError: the state is another source's.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of threads, processes and files; idempotent."""


class DataSource(abc.ABC):
    """Data that a Task feeds to its steps."""

    @property
    @abc.abstractmethod
    def batches_per_epoch(self) -> int:
        """Batches in one epoch, a partial last one included."""

    @property
    @abc.abstractmethod
    def full_batch_size(self) -> int:
        """Examples in every batch but a partial last one."""

    @property
    @abc.abstractmethod
    def partial_batch_size(self) -> int:
        """Examples in the partial last batch; 0 where there is none."""

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
        """A batch with an `ArraySpec` in the place of each array."""

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
