"""Pixels counted by label and prediction, on the device."""

import math
from typing import Any, Literal

import keras
from keras import ops

from legato.errors import ConfigError, DataError
from legato.metrics.shapes import (
    differ,
    fit_labels,
    fit_weights,
    to_classes,
)
from legato.metrics.totals import LongSum

Outputs = Literal["logits", "labels"]

_ROW = 512
"""Pixels whose weights are summed in float32; the sums are added exactly."""


class PixelCounts(keras.metrics.Metric):
    """What the metrics of segmentation share: the arguments, and the counts.

    The counts are one row of `num_classes ** 2` cells, and one more cell for
    what is out of range.

    Args:
        num_classes: labels are 0 to `num_classes - 1`.
        outputs: "logits", a number for each class, or "labels".
        ignore_label: pixels with this label do not count.
        axis: of the classes in logits.
        name: of the metric.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        outputs: Outputs,
        ignore_label: int | None,
        axis: int,
        name: str,
    ) -> None:
        super().__init__(name=name, dtype="float32")
        _check_arguments(self, num_classes, outputs, ignore_label, axis)
        self.num_classes = num_classes
        self.outputs = outputs
        self.ignore_label = ignore_label
        self.axis = axis
        self._counts = LongSum(self, (num_classes**2 + 1,), "counts")

    def update_state(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> None:
        """Count the pixels of a batch.

        Args:
            y_true: labels, whole numbers of shape `[batch, ...]`, or
                `[batch, ..., 1]`.
            y_pred: for `outputs="logits"`, a number for each class and pixel,
                the largest of which wins; else labels of the shape of
                `y_true`, of an integer dtype.
            sample_weight: of shape `[batch]` for examples, of the shape of
                `y_true` for pixels, or a scalar. What has weight 0 does not
                exist; one below 0 makes the result NaN.

        Raises:
            DataError: the shapes do not fit, or labels were to be predicted
                and fractions came.
        """
        predicted, is_known = self._predict(y_pred)
        labels, is_label = (
            fit_labels(self.name, each, predicted.shape)
            for each in to_classes(y_true)
        )
        weights: Any = None
        if sample_weight is not None:
            weights = fit_weights(self.name, sample_weight, labels)
            ones = (1,) * (len(labels.shape) - len(weights.shape))
            is_weight = weights >= 0
            shape: Any = ops.shape(weights)
            is_known = is_known & ops.reshape(is_weight, (*shape, *ones))
            weights = ops.where(is_weight, weights, 1.0)
        classes = self.num_classes
        cells = classes**2
        is_known = is_known & is_label
        is_known = is_known & _in_range(labels, classes)
        is_known = is_known & _in_range(predicted, classes)
        index = ops.where(is_known, labels * classes + predicted, cells)
        if self.ignore_label is not None:
            is_ignored = is_label & (labels == self.ignore_label)
            index = ops.where(is_ignored, cells + 1, index)
        if weights is None:
            counts = _scatter(ops.reshape(index, (-1,)), cells + 2)
            self._counts.add_counts(counts[: cells + 1])
            return
        if len(labels.shape) == 1:
            # Pixels without images: counts for each would be too many.
            index, weights = index[None], weights[None]
        shape: Any = ops.shape(index)
        rows: Any = ops.reshape(index, (shape[0], math.prod(shape[1:])))
        per_pixel = len(weights.shape) > 1
        values: Any = None
        if per_pixel:
            weights = ops.reshape(weights, ops.shape(rows))
            rows, values = _in_short_rows(rows, weights, cells)
            values = ops.reshape(values, (-1,))
        shape = ops.shape(rows)
        count: Any = shape[0]
        numbers: Any = ops.arange(count, dtype="int32")
        rows = rows + (cells + 2) * numbers[:, None]
        size = count * (cells + 2)
        parts: Any = _scatter(ops.reshape(rows, (-1,)), size, values)
        parts = ops.reshape(parts, (count, cells + 2))
        parts = parts[:, : cells + 1]
        if per_pixel:
            self._counts.add_parts(parts)
        else:
            self._counts.add_counts(parts, weights)

    def _predict(self, y_pred: Any) -> tuple[Any, Any]:
        """Predicted labels (int32), and whether each is one."""
        outputs: Any = ops.convert_to_tensor(y_pred)
        shape = tuple(outputs.shape)
        if self.outputs == "logits":
            in_range = -len(shape) <= self.axis < len(shape)
            if not in_range or differ(shape[self.axis], self.num_classes):
                raise DataError(
                    f"{self.name}: the outputs have the shape {shape}. Axis "
                    f"{self.axis} must have {self.num_classes} entries, one "
                    'for each class; give outputs="labels" if they are labels.'
                )
            predicted = ops.argmax(outputs, axis=self.axis)
            is_unknown = ops.any(ops.isnan(outputs), axis=self.axis)
            return ops.cast(predicted, "int32"), ~is_unknown
        if "float" in keras.backend.standardize_dtype(outputs.dtype):
            raise DataError(
                f"{self.name}: the outputs are of dtype {outputs.dtype}, and "
                'labels (outputs="labels") must be whole numbers. Cast them, '
                'or give outputs="logits".'
            )
        return to_classes(y_pred)

    def matrix(self) -> Any:
        """Counts by label (rows) and prediction; NaN if one was no class."""
        counts = self._counts.value()
        classes = self.num_classes
        matrix = ops.reshape(counts[: classes**2], (classes, classes))
        return ops.where(counts[classes**2] > 0, float("nan"), matrix)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `keras.saving`."""
        return {
            "num_classes": self.num_classes,
            "outputs": self.outputs,
            "ignore_label": self.ignore_label,
            "axis": self.axis,
            "name": self.name,
        }


def _scatter(index: Any, size: Any, values: Any = None) -> Any:
    """Counts of each index below `size` (int32), or sums of the values."""
    if values is None:
        values = ops.ones_like(index)
    zeros = ops.zeros((size,), dtype=values.dtype)
    return ops.scatter_update(zeros, index[:, None], values, reduction="add")


def _in_short_rows(index: Any, weights: Any, cells: int) -> tuple[Any, Any]:
    """Pixels of images, `[images, pixels]`, as `[rows, pixels of a row]`.

    A sum of float32 numbers drops what is small beside it, so a row is short.
    (But as long as its counts, which so take no more memory than the pixels.)
    What an image's last row lacks does not count.
    """
    length = max(_ROW, cells)
    shape: Any = ops.shape(index)
    images, pixels = shape[0], shape[1]
    if isinstance(pixels, int):  # else it is traced for any number
        length = max(min(length, pixels), 1)
    missing = (-pixels) % length
    nothing = ops.full((images, missing), cells + 1, dtype="int32")
    index = ops.concatenate([index, nothing], axis=1)
    nothing = ops.zeros((images, missing), "float32")
    weights = ops.concatenate([weights, nothing], axis=1)
    return ops.reshape(index, (-1, length)), ops.reshape(weights, (-1, length))


def _in_range(labels: Any, classes: int) -> Any:
    return (labels >= 0) & (labels < classes)


def _check_arguments(
    metric: keras.metrics.Metric,
    num_classes: Any,
    outputs: Any,
    ignore_label: Any,
    axis: Any,
) -> None:
    called = type(metric).__name__
    if type(num_classes) is not int or not 1 <= num_classes <= 46340:
        raise ConfigError(
            f"{called}(num_classes={num_classes!r}): it must be an int from 1 "
            "to 46340, the largest whose square is an int32."
        )
    if outputs not in ("logits", "labels"):
        raise ConfigError(
            f'{called}(outputs={outputs!r}): it must be "logits" (a number for '
            'each class) or "labels".'
        )
    if ignore_label is not None and type(ignore_label) is not int:
        raise ConfigError(
            f"{called}(ignore_label={ignore_label!r}): it must be an int, such "
            "as 255, or None."
        )
    if type(axis) is not int:
        raise ConfigError(
            f"{called}(axis={axis!r}): it must be an int, the axis of the "
            "classes in logits: -1, or 1 for channels first."
        )
