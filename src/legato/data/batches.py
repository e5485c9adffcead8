"""Batches that the user's code makes: checked, cast, and put in chunks."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import keras
import numpy as np

from legato.compat import keras_data
from legato.data import beside
from legato.data.columns import cast, device_dtype
from legato.data.source import (
    ArraySpec,
    Batch,
    Chunk,
    DataSource,
    DataState,
)
from legato.data.structure import Structure
from legato.errors import DamagedError, DataError
from legato.types import JSON
from legato.workers.recipe import content

Leaves = list[np.ndarray]
"""The arrays of a batch, in the order of its structure; also those that stay
on the host (`beside.split` tells them apart)."""


def standardise(
    batch: Any, class_weight: Mapping[int, float] | None, what: str
) -> tuple[Any, ...]:
    """A batch as `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

    Args:
        batch: such a tuple, or a list in its place, or x alone.
        class_weight: class -> weight, to be turned into sample_weight.
        what: what gave the batch, for messages.

    Raises:
        DataError: it is none of these, is empty, or has weights of its own
            too.
    """
    if isinstance(batch, list):
        batch = tuple(batch)
    if not isinstance(batch, tuple):
        batch = (batch,)
    if not 1 <= len(batch) <= 3:
        raise DataError(
            f"{what} gave a tuple of {len(batch)}: a batch is (x,), (x, y) or "
            "(x, y, sample_weight). Put several inputs into a tuple or a dict "
            "of their own."
        )
    _refuse_empty(batch[0], what)
    if class_weight is None:
        return batch
    if len(batch) == 3:
        raise DataError(
            f"class_weight was given, and {what} gives sample_weight: each is "
            "the weight of the examples. Leave one out."
        )
    if len(batch) == 2:
        if keras.tree.is_nested(batch[1]):
            raise DataError(
                f"class_weight was given, and {what} gives several y: it is "
                "for models with a single output. Let it give sample_weight."
            )
        labels = keras_data.to_numpy(batch[1])
        batch += (
            keras_data.class_weight_to_sample_weights(labels, class_weight),
        )
    return batch


def _refuse_empty(x: Any, what: str) -> None:
    leaves = [x] if hasattr(x, "shape") else keras.tree.flatten(x)
    shapes = [tuple(leaf.shape) for leaf in leaves if hasattr(leaf, "shape")]
    if shapes and all(shape[:1] == (0,) for shape in shapes):
        raise DataError(
            f"{what} gave a batch of 0 examples: there must be at least one in "
            "each. Leave empty batches out."
        )


BATCH_PARTS = ("x", "y", "sample_weight")
"""What the parts of a batch of `fit` are called."""


def named_part(path: str, names: Sequence[str] = BATCH_PARTS) -> str:
    """The path of an array with the name of its part: "1.left" is "y.left".

    Args:
        path: in a batch.
        names: of the parts of a batch.
    """
    first, dot, rest = path.partition(".")
    known = first.isdecimal() and int(first) < len(names)
    return f"{names[int(first)] if known else first}{dot}{rest}"


class Layout:
    """What all batches of a source have in common, learnt from the first.

    Args:
        first: a batch, as `standardise` returns it or nested in any way.
        what: what gave it, for messages.
        of_fit: whether it is the former. Then, if its arrays are equally
            long, those of each batch must be. (Where they are not, as in bags
            of examples with one label, the model knows what to make of it.)

    Raises:
        DataError: it holds no array that a device takes, or something that is
            none.
    """

    def __init__(self, first: Any, what: str, *, of_fit: bool = False) -> None:
        self._what = what
        self._is_even = False  # not known yet
        first = beside.gathered(first)
        self._structure = Structure(first)
        x = first[0] if isinstance(first, tuple) and first else first
        if not Structure.leaves(x):
            raise DataError(f"{what} gave a batch without any x.")
        self.first: Leaves = []
        self.first = [beside.owned(leaf) for leaf in self.leaves(first)]
        self._values = beside.placeholders(self._structure, self.first)
        self.on_device, _ = beside.split(self.first)
        if not self.on_device:
            raise DataError(
                f"{what} gave a batch of nothing but arrays of dtype "
                f"{self.first[0].dtype}, which no device takes: there must be "
                "one of numbers too. (Turn strings into numbers first.)"
            )
        lengths = {len(array) for array in self.first}
        self._is_even = of_fit and len(lengths) == 1 and lengths != {1}

    def leaves(self, batch: Any) -> Leaves:
        """The arrays of a batch, with the dtypes of the device.

        Raises:
            DataError: they are not nested as in the first batch, have other
                dtypes or unequal lengths, or something is no array.
        """
        if not self._structure.is_flat(batch):
            batch = beside.gathered(batch)
            structure = Structure(batch)
            if structure != self._structure:
                raise DataError(
                    f"{self._what} gave a batch nested as {structure}, and the "
                    f"first was {self._structure}. Give the same in every "
                    "batch."
                )
            batch = Structure.leaves(batch)
        found = [self._array(leaf, i) for i, leaf in enumerate(batch)]
        if self._is_even and len({len(array) for array in found}) > 1:
            self._refuse_uneven(found)
        return found

    def _refuse_uneven(self, arrays: Leaves) -> NoReturn:
        paths = map(named_part, self._structure.paths())
        listed = ", ".join(
            f"{path}: {len(array)}"
            for path, array in zip(paths, arrays, strict=True)
        )
        raise DataError(
            f"{self._what} gave a batch whose arrays have different numbers of "
            f"examples ({listed}). Every array must have one row for each "
            "example, as in the first batch."
        )

    def _array(self, leaf: Any, index: int) -> np.ndarray:
        try:
            array = keras_data.to_numpy(leaf)
        except DataError as error:
            raise DataError(f"{self._what}: {error}") from error
        if self.first and array.ndim and array.dtype == self.first[index].dtype:
            return array  # as nearly all are
        stays = beside.stays_on_host(array.dtype)
        dtype = array.dtype if stays else device_dtype(array.dtype)
        if array.ndim == 0:
            where = self._structure.paths()[index]
            raise DataError(
                f"{self._what} gave a batch that holds the "
                f"{type(leaf).__name__} {leaf!r:.80} at {where}: every array "
                "must have shape [batch, ...]."
            )
        if self.first and not self._is_like(dtype, index):
            where = self._structure.paths()[index]
            raise DataError(
                f"{self._what} gave {array.dtype} at {where}, where the first "
                f"batch has {self.first[index].dtype}. Give the same in every "
                "batch."
            )
        return array if stays else cast(array, dtype)

    def _is_like(self, dtype: np.dtype, index: int) -> bool:
        """Whether what has this dtype may stand in the place of the first's."""
        first = self.first[index].dtype
        if beside.stays_on_host(first):
            return beside.stays_on_host(dtype)
        return dtype == first

    def saved(self, leaves: Leaves | None) -> DataState:
        """A batch for a checkpoint."""
        if leaves is None:
            return None
        return [
            leaf if value is None else beside.saved(leaf)
            for leaf, value in zip(leaves, self._values, strict=True)
        ]

    def restored(self, state: DataState) -> Leaves | None:
        """What was given to `saved`.

        Raises:
            DamagedError: it is no batch of this kind.
        """
        if state is None:
            return None
        if not isinstance(state, list) or len(state) != len(self._values):
            raise DamagedError("data state: not a batch of these data.")
        found = []
        for leaf, value, first in zip(
            state, self._values, self.first, strict=True
        ):
            if value is not None:
                leaf = beside.restored(leaf)
            elif (
                not isinstance(leaf, np.ndarray)
                or leaf.dtype != first.dtype
                or not leaf.ndim
            ):
                raise DamagedError("data state: not a batch of these data.")
            found.append(leaf)
        return found

    def pack(self, arrays: Sequence[Any]) -> Batch:
        """The batch that holds these arrays, of those that a device takes."""
        return self._structure.pack(beside.merged(self._values, arrays))

    def spec(self, batch_size: int) -> Batch:
        """The first batch with an `ArraySpec` for each array."""
        return self.pack(
            [
                ArraySpec(shape=(batch_size, *a.shape[1:]), dtype=a.dtype)
                for a in self.on_device
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the first batch, on the device."""
        return sum(a.nbytes for a in self.on_device)

    def identity(self, *, repeatable: bool) -> dict[str, JSON]:
        """What tells these data from others.

        Args:
            repeatable: whether another process would draw the same first
                batch.
        """
        found: dict[str, JSON] = {
            "structure": repr(self._structure),
            "dtypes": [str(a.dtype) for a in self.first],
            "shapes": [list(a.shape) for a in self.first],
        }
        if repeatable:
            found["first_sha256"] = digest(self.first)
        return found


def copied(batch: Any) -> Any:
    """A batch whose arrays are copies: the user's code may fill its again."""
    return keras.tree.map_structure(_copied, batch)


def _copied(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return beside.owned(array)
    # (Of the tensors, those of PyTorch alone can change.)
    return array.clone() if hasattr(array, "clone") else array


def digest(leaves: Leaves) -> str:
    """The hash of the bytes of a batch."""
    found = hashlib.sha256()
    for leaf in leaves:
        found.update(repr((leaf.dtype.name, leaf.shape)).encode())
        found.update(content(leaf))
    return found.hexdigest()


class Chunks:
    """Puts consecutive batches of one shape into chunks.

    Args:
        draw: gives the next batch; None where a chunk must end.
        capacity: the first axis of the operands.

    Attributes:
        pending: a batch that was drawn and is in no chunk yet, because its
            shape is another; to be saved with the position.
    """

    def __init__(
        self, draw: Callable[[], Leaves | None], capacity: int
    ) -> None:
        self._draw = draw
        self._capacity = capacity
        self.pending: Leaves | None = None

    def next(self, most: int) -> "Drawn | None":
        """Draws the batches of the next chunk.

        Args:
            most: how many at most.
        """
        leaves = self.pending or self._draw()
        self.pending = None
        if leaves is None:
            return None
        arrays, others = beside.split(leaves)
        shapes = [array.shape for array in arrays]
        found = Drawn(operands=zeros(arrays, self._capacity))
        while True:
            # At once: the user's code may fill the same array again.
            for operand, array in zip(found.operands, arrays, strict=True):
                operand[found.count] = array
            if others:
                found.beside.append(
                    [a if a is None else beside.owned(a) for a in others]
                )
            found.count += 1
            if found.count == min(most, self._capacity):
                break
            leaves = self._draw()
            if leaves is None:
                break
            arrays, others = beside.split(leaves)
            if [array.shape for array in arrays] != shapes:
                self.pending = [beside.owned(leaf) for leaf in leaves]
                break
        return found


@dataclasses.dataclass(kw_only=True)
class Drawn:
    """Batches that were drawn; see `Chunk`.

    Attributes:
        operands: as those of a chunk.
        beside: likewise.
        count: how many batches.
    """

    operands: list[np.ndarray]
    beside: list[list[np.ndarray | None]] = dataclasses.field(
        default_factory=list
    )
    count: int = 0

    def chunk(self, state: DataState, rows: np.ndarray | None = None) -> Chunk:
        """The chunk of them.

        Args:
            state: see `Chunk`.
            rows: see there.
        """
        return Chunk(
            num_batches=self.count,
            batch_size=self.operands[0].shape[1],
            operands=self.operands,
            state=state,
            rows=rows,
            beside=self.beside,
        )


def zeros(arrays: Sequence[np.ndarray], capacity: int) -> list[np.ndarray]:
    """Operands for batches like this one, still empty."""
    return [np.zeros((capacity, *a.shape), a.dtype) for a in arrays]


class BatchSource(DataSource):
    """A source of batches that the user's code makes.

    Its subclasses set `_layout` when they have drawn the first batch.
    """

    _layout: Layout

    @property
    def full_batch_size(self) -> int:
        """Examples in the first batch."""
        return len(self._layout.on_device[0])

    @property
    def partial_batch_size(self) -> int:
        """Unknown: 0."""
        return 0

    @property
    def batch_bytes(self) -> int:
        """Bytes of the first batch."""
        return max(1, self._layout.nbytes)

    @property
    def resident(self) -> Any:
        """Nothing."""
        return None

    def batch_spec(self, batch_size: int) -> Batch:
        """The first batch's, with another batch axis."""
        return self._layout.spec(batch_size)

    def fetch(self, resident: Any, operands: Any, index: Any) -> Batch:
        """Batch `index` of the operands."""
        return self._layout.pack([array[index] for array in operands])

    def example(self, capacity: int) -> Any:
        """The first batch, which was drawn when the source was made."""
        arrays = self._layout.on_device
        operands = zeros(arrays, capacity)
        for operand, array in zip(operands, arrays, strict=True):
            operand[0] = array
        return operands

    def saved(self, leaves: Leaves | None) -> DataState:
        """A batch that was drawn, for a checkpoint."""
        return self._layout.saved(leaves)

    def restored(self, state: DataState) -> Leaves | None:
        """What was given to `saved`.

        Raises:
            DamagedError: it is none of its batches.
        """
        return self._layout.restored(state)

    def fits(self, state: DataState) -> bool:
        """Whether `saved` may have returned it, or None."""
        try:
            self.restored(state)
        except DamagedError:
            return False
        return True


def shown(state: Any) -> str:
    """A state for a message: its beginning, on one line."""
    return " ".join(repr(state).split())[:200]


def check_count(value: Any, what: str) -> int:
    """A number of batches.

    Raises:
        DataError: it is none, or 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise DataError(
            f"{what} is {value!r}: it must be an int, the number of batches."
        )
    if value < 1:
        raise DataError(f"{what} is {value}: there must be at least 1 batch.")
    return int(value)
