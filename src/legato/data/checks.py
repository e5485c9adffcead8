"""Values that spoil a step in silence: NaN in inputs, labels out of range.

A device computes on with both: NaN spreads to every weight, and a label that
the model has no output for counts as none on one backend, reads beyond the
array on another.
"""

from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np

from legato.data.arrays import ArraySource
from legato.data.batches import named_part
from legato.data.source import Chunk, DataSource, array_specs
from legato.errors import DataError

# Rows of arrays that are looked at in one go: bounds the memory of the masks.
_ROWS = 65536


class InputChecks:
    """Looks at batches on the host, before they are trained on.

    Args:
        source: whose batches they are.
        what: what to call it in messages, such as "The training data".
        num_classes: how many outputs the model has for the labels at some
            paths, such as `{"1": 10}`; or that with the label that may be
            none of them, `{"1": (10, 255)}`.
        names: of the parts of a batch, for messages; none: their numbers.
    """

    def __init__(
        self,
        source: DataSource,
        what: str,
        num_classes: Mapping[str, int | tuple[int, int | None]] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self._source = source
        self._what = what
        self._num_classes = num_classes or {}
        self._names = names
        self._paths: list[str] | None = None
        self._are_residents_good = False

    def check(self, chunk: Chunk, step: int) -> None:
        """Look at a chunk; at all the data where they live on the device.

        Args:
            chunk: the chunk.
            step: the number of steps that were completed before it.

        Raises:
            DataError: a value is NaN or infinite, or a label is none of the
                classes; the message names its place.
        """
        if self._source.resident is not None:
            if not self._are_residents_good:
                self.check_all()
                self._are_residents_good = True
            return
        for index in range(chunk.num_batches):
            found = self.explain(chunk, index)
            if found is not None:
                raise DataError(
                    f"{self._what}: {found}, in the batch of step "
                    f"{step + index + 1}. Clean the data, or leave the example "
                    "out."
                )

    def check_all(self) -> None:
        """Look at all arrays, where the data are arrays in memory.

        Raises:
            DataError: see `check`.
        """
        if not isinstance(self._source, ArraySource):
            return
        for path, column in self._source.columns():
            for start in range(0, column.shape[0], _ROWS):
                part = column.rows(slice(start, start + _ROWS))
                bad = self._find(path, part)
                if bad is not None:
                    example, why = bad
                    raise DataError(
                        f"{self._what}: example {start + example} holds {why}. "
                        "Clean the data, or leave the example out."
                    )

    def check_labels(self) -> None:
        """Look at the labels of all arrays, and at nothing else.

        Raises:
            DataError: one is none of the classes.
        """
        if not isinstance(self._source, ArraySource):
            return
        for path, column in self._source.columns():
            if path in self._num_classes:
                labels = column.rows(slice(None))
                bad = self._find_label(path, labels)
                if bad is not None:
                    raise DataError(
                        f"{self._what}: example {bad[0]} holds {bad[1]}. "
                        "Number the classes from 0, or give the model as many "
                        "outputs as there are classes."
                    )

    def explain(self, chunk: Chunk, index: int) -> str | None:
        """What is wrong with a batch of a chunk; None: nothing is seen.

        Args:
            chunk: the chunk.
            index: of the batch in it.
        """
        for path, batch in self._arrays(chunk, index):
            bad = self._find(path, batch)
            if bad is not None:
                example, why = bad
                where = f"example {example} of the batch"
                if chunk.rows is not None:
                    row = int(chunk.rows[index, example])
                    where += f" (example {row} of the data)"
                return f"{where} holds {why}"
        return None

    def _arrays(
        self, chunk: Chunk, index: int
    ) -> Iterator[tuple[str, np.ndarray]]:
        resident = self._source.resident
        if resident is None:
            arrays = keras.tree.flatten(chunk.operands)
            arrays = [array[index] for array in arrays]
        elif chunk.rows is not None:
            arrays = keras.tree.flatten(resident)
            arrays = [array[chunk.rows[index]] for array in arrays]
        else:
            return
        yield from zip(self._named(len(arrays)), arrays, strict=True)

    def _named(self, count: int) -> list[str]:
        """The paths of a batch's arrays, where these are what is moved."""
        if self._paths is None:
            self._paths = list(array_specs(self._source))
        if len(self._paths) == count:
            return self._paths
        return [f"array {number}" for number in range(count)]

    def _find(self, path: str, batch: np.ndarray) -> tuple[int, str] | None:
        """The first example with a bad value, and what it is."""
        if path in self._num_classes:
            return self._find_label(path, batch)
        if not _is_float(batch.dtype):
            return None
        # (The sum first: it is finite but for one batch in a million.)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(batch.sum(dtype=np.float64)):
                return None
        finite = np.isfinite(batch).reshape(len(batch), -1)
        bad = np.flatnonzero(~finite.all(1))
        if not len(bad):
            return None
        example = int(bad[0])
        place = int(np.flatnonzero(~finite[example])[0])
        value = batch[example].reshape(-1)[place]
        inner = np.unravel_index(place, batch.shape[1:])
        at = f" at {[int(i) for i in inner]}" if inner else ""
        where = named_part(path, self._names)
        return example, f"{float(value)} in {where!r}{at}"

    def _find_label(
        self, path: str, labels: np.ndarray
    ) -> tuple[int, str] | None:
        given = self._num_classes[path]
        classes, ignored = given if isinstance(given, tuple) else (given, None)
        # (A loss cuts off what comes after the point, in silence.)
        broken = labels != np.floor(labels) if _is_float(labels.dtype) else None
        is_broken = broken is not None and broken.any()
        in_range = not labels.size or (
            labels.min() >= 0 and labels.max() < classes
        )
        if in_range and not is_broken:
            return None
        bad = (labels < 0) | (labels >= classes)
        if broken is not None:
            bad |= broken  # NaN too
        if ignored is not None:
            bad &= labels != ignored
            if not bad.any():
                return None
        bad = bad.reshape(len(labels), -1)
        example = int(np.flatnonzero(bad.any(1))[0])
        label = labels[example].reshape(-1)[np.flatnonzero(bad[example])[0]]
        where = named_part(path, self._names)
        found = f"the label {label} in {where!r}"
        if 0 <= label < classes:
            found += ", which is no whole number"
        found += f", and the model has {classes} classes: 0 to {classes - 1}"
        if ignored is not None:
            found += f", and {ignored}, which is ignored"
        return example, found


def _is_float(dtype: np.dtype) -> bool:
    # (bfloat16 is of kind "V" for NumPy.)
    return dtype.kind in "fc" or "float" in dtype.name
