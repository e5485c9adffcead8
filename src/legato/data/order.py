"""Which examples are in which batch: computed at any position, not stored."""

import dataclasses
from typing import Any, Literal

import numpy as np

from legato.errors import DataError, RestoreError
from legato.rng import Permutation, derive_seed
from legato.types import JSON

# How many positions of the order are computed at a time.
_BLOCK_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Plan:
    """How examples are cut into batches.

    Attributes:
        length: how many examples there are.
        batch_size: examples in a batch.
        shuffle: in a new random order in each epoch; "batch" only mixes each
            batch within itself.
        drop_remainder: leave out a partial last batch.

    Raises:
        DataError: there are no examples, or not enough, or a bad
            `batch_size`.
    """

    length: int
    batch_size: int
    shuffle: bool | Literal["batch"]
    drop_remainder: bool

    def __post_init__(self) -> None:
        if self.length == 0:
            raise DataError(
                "The data are empty: 0 examples. Give at least one example."
            )
        check_batch_size(self.batch_size)
        if self.batches_per_epoch == 0:
            raise DataError(
                f"batch_size={self.batch_size} with drop_remainder=True: the "
                f"data hold {self.length} examples, less than one batch. Make "
                "the batches smaller or keep the remainder."
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch, a partial last one included."""
        full, rest = divmod(self.length, self.batch_size)
        return full + (1 if rest and not self.drop_remainder else 0)

    @property
    def full_batch_size(self) -> int:
        """Examples in a batch that is not the partial last one."""
        return min(self.batch_size, self.length)

    @property
    def full_batches(self) -> int:
        """How many of these an epoch has."""
        return self.length // self.full_batch_size

    @property
    def identity(self) -> dict[str, JSON]:
        """What tells it from another one, beside its attributes."""
        return {}

    @property
    def partial_batch_size(self) -> int:
        """Examples in the partial last batch; 0: there is none."""
        if self.drop_remainder or self.length < self.batch_size:
            return 0
        return self.length % self.batch_size

    def order(self, seed: int) -> "Order":
        """The order of the examples that a seed gives."""
        return Order(self, seed)


class BlockwisePermutation:
    """A permutation, computed some thousand positions at a time.

    A loop of one step (for a batch hook) would otherwise pay the fixed cost
    of a permutation for every batch.

    Args:
        length: of what is permuted.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._permutation: Permutation | None = None
        self._key = -1
        self._first = 0
        self._rows = np.zeros(0, np.int64)

    def rows(self, key: int, start: int, count: int) -> np.ndarray:
        """Where positions are sent: int64, `[count]`.

        Args:
            key: of the permutation.
            start: the first position.
            count: how many.
        """
        first = self._first
        if key != self._key or not (
            first <= start and start + count <= first + len(self._rows)
        ):
            if self._permutation is None or key != self._key:
                self._permutation = Permutation(self._length, key)
            self._key, self._first = key, start
            stop = min(self._length, start + max(count, _BLOCK_ROWS))
            self._rows = self._permutation(np.arange(start, stop))
        begin = start - self._first
        return self._rows[begin : begin + count]


class Order:
    """The order of each epoch, a permutation computed from (seed, epoch).

    Args:
        plan: how examples are cut into batches.
        seed: of the order.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self._plan = plan
        self._seed = seed
        self._block = BlockwisePermutation(plan.length)
        self._key = -1, 0  # of the epoch that was asked for last

    def batch(self, epoch: int, number: int) -> np.ndarray:
        """The examples of one batch: int64, `[batch]`."""
        plan = self._plan
        size = plan.full_batch_size
        start = number * size
        if number == plan.full_batches:
            size = plan.partial_batch_size
        return self.rows(epoch, start, size)

    def rows(self, epoch: int, start: int, count: int) -> np.ndarray:
        """The examples at positions of an epoch.

        Args:
            epoch: which.
            start: the first position.
            count: how many.
        """
        if self._plan.shuffle == "batch":
            return self._mixed_batches(epoch, start, count)
        if not self._plan.shuffle:
            return np.arange(start, start + count)
        if epoch != self._key[0]:
            self._key = epoch, derive_seed(self._seed, "order", epoch)
        return self._block.rows(self._key[1], start, count)

    def _mixed_batches(self, epoch: int, start: int, count: int) -> np.ndarray:
        size = self._plan.full_batch_size
        found = []
        for first in range(start, start + count, size):
            length = min(size, start + count - first)
            key = derive_seed(self._seed, "order", epoch, first // size)
            order = Permutation(length, key)(np.arange(length))
            found.append(first + order)
        return np.concatenate(found)


def check_shuffle(shuffle: Any) -> bool | Literal["batch"]:
    """Whether data are to be shuffled, and how.

    Raises:
        DataError: it is none of the ways.
    """
    if isinstance(shuffle, str) and shuffle == "batch":
        return "batch"
    if isinstance(shuffle, int | np.integer | np.bool_) and shuffle in (0, 1):
        return bool(shuffle)
    raise DataError(
        f"shuffle={shuffle!r:.80}: it must be True (a new order in each "
        'epoch), False, or "batch" (within batches alone).'
    )


def check_batch_size(batch_size: Any) -> None:
    """Whether it is a number of examples.

    Raises:
        DataError: it is not.
    """
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


def read_position(state: Any, batches_per_epoch: int) -> tuple[int, int]:
    """The epoch and the batch of a saved position.

    Raises:
        RestoreError: it is none of these data.
    """
    match state:
        case {"epoch": int(epoch), "batch": int(batch)} if (
            epoch >= 0 and 0 <= batch < batches_per_epoch
        ):
            return epoch, batch
    raise RestoreError(
        f"The saved data position {state!r:.200} is not one of this source, "
        f"which has {batches_per_epoch} batches in an epoch. Resume with the "
        "data of the run."
    )
