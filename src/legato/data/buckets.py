"""Batches of examples of like length: which are in which, computed.

The examples of each bucket are shuffled by a permutation of their own and cut
into batches; another permutation says which batch comes when. So an epoch is a
function of (seed, epoch), as without buckets. What is stored is which bucket
each example is in.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from legato.data.order import BlockwisePermutation, check_batch_size
from legato.errors import ConfigError, DataError
from legato.rng import Permutation, derive_seed
from legato.types import JSON


class Buckets:
    """How examples are put into batches by their length.

    Args:
        lengths: ints, `[examples]`; or `length(example)`, which is called
            with each example once, as the dataset gives it, when the source
            is made.
        boundaries: the greatest length in each bucket, ascending. What is
            longer than the last is in a bucket of its own. Or a number of
            buckets, with as many examples in each as can be.
        batch_sizes: examples in a batch, of each bucket; by default those of
            the source.

    Attributes:
        boundaries: as given; where a number was, the greatest lengths, once
            they are known (at once, if `lengths` are ints).

    Raises:
        ConfigError: these do not go together.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | Callable[[Any], int],
        boundaries: Sequence[int] | int,
        *,
        batch_sizes: Sequence[int] | None = None,
    ) -> None:
        self._length: Callable[[Any], int] | None = None
        self._lengths: np.ndarray | None = None
        self.boundaries: list[int] | None = None
        self._count = 0
        if isinstance(boundaries, Sequence | np.ndarray):
            self.boundaries = list(boundaries)
            self._count = len(self.boundaries)
        elif not isinstance(boundaries, bool):
            self._count = int(boundaries)
        if self._count < 1:
            raise ConfigError(
                f"boundaries={boundaries!r}: there must be at least one bucket."
            )
        given = self.boundaries or []
        if given != sorted(set(given)) or not all(
            isinstance(each, int | np.integer) for each in given
        ):
            raise ConfigError(
                f"boundaries={boundaries!r}: they must be lengths, each above "
                "the one before, or a number of buckets."
            )
        self.batch_sizes = None if batch_sizes is None else list(batch_sizes)
        for size in self.batch_sizes or ():
            check_batch_size(size)
        if callable(lengths):
            self._length = lengths
        else:
            self._lengths = self._checked(lengths)

    def _checked(self, lengths: Any) -> np.ndarray:
        """Lengths as an array; they make the boundaries, if there are none."""
        found = np.asarray(lengths)
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise ConfigError(
                f"lengths are an array of {found.dtype} of shape "
                f"{found.shape}: they must be ints, one for each example, or "
                "length(example) that returns one."
            )
        if found.size and found.min() < 0:
            raise ConfigError(
                f"lengths hold {found.min()}: each must be 0 or more."
            )
        if self.boundaries is None:
            self.boundaries = _even(found, self._count)
        return found

    def of(self, dataset: Any, count: int, what: str) -> np.ndarray:
        """Which bucket each example is in: ints, `[examples]`.

        Args:
            dataset: gives examples by their number.
            count: how many.
            what: names it in messages.

        Raises:
            DataError: there are not as many lengths as examples.
        """
        lengths = self._lengths
        if lengths is None:
            assert self._length is not None
            lengths = self._checked(
                [self._length(dataset[index]) for index in range(count)]
            )
        if len(lengths) != count:
            raise DataError(
                f"{what} has {count} examples, and there are {len(lengths)} "
                "lengths for its buckets. Give one for each."
            )
        return np.searchsorted(np.array(self.boundaries), lengths)

    def sizes(self, bucket_of: np.ndarray, batch_size: int) -> list[int]:
        """Examples in a batch, of each bucket.

        Args:
            bucket_of: the bucket of each example.
            batch_size: by default.

        Raises:
            ConfigError: there are not as many sizes as buckets.
        """
        assert self.boundaries is not None  # it knows the buckets by now
        count = len(self.boundaries)
        with_longer = max(count, int(bucket_of.max(initial=0)) + 1)
        if self.batch_sizes is None:
            return [batch_size] * with_longer
        if len(self.batch_sizes) not in (with_longer, count + 1):
            raise ConfigError(
                f"batch_sizes={self.batch_sizes}: there are {with_longer} "
                f"buckets, of lengths up to {self.boundaries} and above that "
                "if there are any. Give as many sizes."
            )
        return self.batch_sizes


def _even(lengths: np.ndarray, count: int) -> list[int]:
    """The ends of as many buckets, of as many examples each as can be."""
    if not len(lengths):
        return [0]
    ordered = np.sort(lengths)
    last = (len(ordered) * np.arange(1, count + 1) + count - 1) // count - 1
    return np.unique(ordered[last]).tolist()


class BucketPlan:
    """How examples are cut into batches; see `Plan`.

    Args:
        bucket_of: the bucket of each example.
        batch_sizes: of each bucket.
        shuffle: see `Plan`; unshuffled, the buckets come one after another.
        drop_remainder: leave out a partial last batch of each bucket.

    Raises:
        DataError: there are no examples, or not enough.
    """

    partial_batch_size = 0  # there are many

    def __init__(
        self,
        bucket_of: np.ndarray,
        batch_sizes: Sequence[int],
        *,
        shuffle: bool | Literal["batch"],
        drop_remainder: bool,
    ) -> None:
        self.shuffle = shuffle
        self.sizes = np.array(batch_sizes, np.int64)
        self.counts = np.bincount(bucket_of, minlength=len(batch_sizes))
        # The examples of a bucket lie together.
        self.members = np.argsort(bucket_of, kind="stable")
        if len(bucket_of) <= np.iinfo(np.uint32).max:
            self.members = self.members.astype(np.uint32)
        self.starts = np.cumsum(self.counts) - self.counts
        batches = self.counts // self.sizes
        if not drop_remainder:
            batches = -(-self.counts // self.sizes)
        # The first batch of each bucket, and the number of all.
        self.firsts = np.cumsum(batches) - batches
        self.batches_per_epoch = int(batches.sum())
        if not len(bucket_of):
            raise DataError(
                "The data are empty: 0 examples. Give at least one example."
            )
        if not self.batches_per_epoch:
            raise DataError(
                "With drop_remainder=True, no bucket holds a whole batch "
                f"(examples: {self.counts.tolist()}, batch sizes: "
                f"{self.sizes.tolist()}). Make the batches smaller or keep the "
                "remainder."
            )

    @property
    def identity(self) -> dict[str, JSON]:
        """Which examples are in which bucket."""
        members = hashlib.sha256(self.members.astype("<u8").tobytes())
        return {
            "buckets": {
                "examples": self.counts.tolist(),
                "batch_sizes": self.sizes.tolist(),
                "members_sha256": members.hexdigest(),
            }
        }

    def order(self, seed: int) -> "BucketOrder":
        """The order of the examples that a seed gives."""
        return BucketOrder(self, seed)


class BucketOrder:
    """The batches of each epoch, computed from (seed, epoch).

    Args:
        plan: how examples are cut into batches.
        seed: of the order.
    """

    def __init__(self, plan: BucketPlan, seed: int) -> None:
        self._plan = plan
        self._seed = seed
        self._slots = BlockwisePermutation(plan.batches_per_epoch)
        self._epoch = -1
        self._inside: dict[int, Permutation] = {}

    def batch(self, epoch: int, number: int) -> np.ndarray:
        """The examples of one batch: int64, `[batch]`."""
        plan = self._plan
        if plan.shuffle is True:
            key = derive_seed(self._seed, "batches", epoch)
            number = int(self._slots.rows(key, number, 1)[0])
        # (Of several that begin here, all but the last are empty.)
        bucket = int(np.searchsorted(plan.firsts, number, "right")) - 1
        size = int(plan.sizes[bucket])
        start = (number - int(plan.firsts[bucket])) * size
        size = min(size, int(plan.counts[bucket]) - start)
        places = np.arange(start, start + size)
        if plan.shuffle == "batch":
            key = derive_seed(self._seed, "bucket", epoch, bucket, start)
            places = start + Permutation(size, key)(np.arange(size))
        elif plan.shuffle:
            places = self._permutation(epoch, bucket)(places)
        first = int(plan.starts[bucket])
        return plan.members[first + places].astype(np.int64)

    def _permutation(self, epoch: int, bucket: int) -> Permutation:
        """Of a bucket's examples, of which batches come in any order."""
        if epoch != self._epoch:
            self._epoch, self._inside = epoch, {}
        if bucket not in self._inside:
            key = derive_seed(self._seed, "bucket", epoch, bucket)
            count = int(self._plan.counts[bucket])
            self._inside[bucket] = Permutation(count, key)
        return self._inside[bucket]
