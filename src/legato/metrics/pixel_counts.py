"""Pixels counted by label and prediction, on the device."""

from typing import Any, Literal

import keras
from keras import ops

from legato.errors import ConfigError, DataError
from legato.metrics.shapes import differ, fit_labels, fit_weights
from legato.metrics.totals import LongSum

Outputs = Literal["logits", "labels"]


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
                `y_true` for pixels, or a scalar; not negative. What has
                weight 0 does not exist.

        Raises:
            DataError: the shapes do not fit, or labels were to be predicted
                and fractions came.
        """
        labels, predicted, weights = self._read(y_true, y_pred, sample_weight)
        classes = self.num_classes
        cells = classes**2
        index = ops.where(
            _in_range(labels, classes) & _in_range(predicted, classes),
            labels * classes + predicted,
            cells,
        )
        if self.ignore_label is not None:
            index = ops.where(labels == self.ignore_label, cells + 1, index)
        if weights is None:
            counts = _scatter(ops.reshape(index, (-1,)), cells + 2)
            self._counts.add_counts(counts[: cells + 1])
            return
        # Each example for itself: a sum over an image's pixels is far from
        # 2**24, where float32 begins to drop them.
        shape: Any = ops.shape(index)
        batch = shape[0]
        rows: Any = ops.reshape(index, (batch, -1))
        numbers: Any = ops.arange(batch, dtype="int32")
        rows = rows + (cells + 2) * numbers[:, None]
        size = batch * (cells + 2)
        per_pixel = len(weights.shape) > 1
        values = ops.reshape(weights, (-1,)) if per_pixel else None
        parts: Any = _scatter(ops.reshape(rows, (-1,)), size, values)
        parts = ops.reshape(parts, (batch, cells + 2))
        parts = parts[:, : cells + 1]
        if per_pixel:
            self._counts.add_parts(parts)
        else:
            self._counts.add_counts(parts, weights)

    def _read(
        self, y_true: Any, y_pred: Any, sample_weight: Any
    ) -> tuple[Any, Any, Any]:
        """Labels, predicted labels, and weights of examples or of pixels."""
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
            outputs = ops.argmax(outputs, axis=self.axis)
        elif "float" in keras.backend.standardize_dtype(outputs.dtype):
            raise DataError(
                f"{self.name}: the outputs are of dtype {outputs.dtype}, and "
                'labels (outputs="labels") must be whole numbers. Cast them, '
                'or give outputs="logits".'
            )
        labels = ops.convert_to_tensor(y_true)
        labels = fit_labels(self.name, labels, outputs.shape)
        weights = None
        if sample_weight is not None:
            weights = fit_weights(self.name, sample_weight, labels)
            if len(labels.shape) == 1:
                # Pixels without images: counts for each would be too many.
                labels, outputs = labels[None], outputs[None]
                weights = weights[None]
        return ops.cast(labels, "int32"), ops.cast(outputs, "int32"), weights

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
