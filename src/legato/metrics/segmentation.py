"""Metrics of semantic segmentation, counted on the device.

Keras 3.15 has `MeanIoU` and its relatives. They are not built upon, because
- their counts end or wrap: float32 sums of ones end at 2**24, int32 at 2**31;
- weights are cut to whole numbers unless `dtype` is set, and a weight for each
  example cannot be given for images;
- a label that is out of range is dropped in silence, and so is a prediction;
- an `ignore_class` among the classes stays in the mean, as a class of IoU 0;
- with `axis=1` the result fails, and on PyTorch each pixel is a step of a
  Python loop (`keras.ops.scatter`).
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from legato.errors import ConfigError
from legato.metrics.pixel_counts import Outputs, PixelCounts


@keras.saving.register_keras_serializable(package="legato")
class ConfusionMatrix(PixelCounts):
    """How often each class was taken for each class.

    Works in compiled steps on every backend. Whole counts are exact up to
    2**47 pixels; the result is rounded to float32. Weights of pixels are
    summed in float32 over some hundred of an image's, and beyond that exactly.

    Args:
        num_classes: labels are 0 to `num_classes - 1`. A label or a prediction
            that is something else, and not ignored, makes all results NaN: a
            compiled step cannot raise an error, and dropping pixels would
            hide it.
        outputs: what the outputs are: "logits" for a number for each class,
            such as logits or probabilities, or "labels".
        ignore_label: pixels with this label do not count, whatever is
            predicted there. It need not be one of the classes.
        axis: of the classes in logits.
        name: of the metric.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        outputs: Outputs = "logits",
        ignore_label: int | None = None,
        axis: int = -1,
        name: str = "confusion_matrix",
    ) -> None:
        super().__init__(num_classes, outputs, ignore_label, axis, name)

    def result(self) -> Any:
        """The matrix, float32 of shape `[num_classes, num_classes]`.

        Rows are labels and columns are predictions, as in scikit-learn.
        """
        return self.matrix()


class _Ratio(PixelCounts):
    """A figure of each class, from its row and its column of the counts."""

    # It is factor * hits / (labelled + predicted - overlap * hits).
    _factor: float
    _overlap: float

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # As Keras says of its own which way is better.
        self._direction = "up"

    def _by_class(self) -> tuple[Any, Any]:
        """The figures, and which of the classes have one."""
        matrix = self.matrix()
        hits = ops.diagonal(matrix)
        both = ops.sum(matrix, axis=0) + ops.sum(matrix, axis=1)
        whole = both - self._overlap * hits
        present = whole > 0
        if self.ignore_label is not None:
            classes = ops.arange(self.num_classes, dtype="int32")
            present = present & (classes != self.ignore_label)
        return self._factor * hits / ops.where(present, whole, 1.0), present

    def _mean(self) -> Any:
        values, present = self._by_class()
        count = ops.sum(ops.cast(present, "float32"))
        total = ops.sum(ops.where(present, values, 0.0))
        mean = total / ops.maximum(count, 1.0)
        return ops.where(count > 0, mean, float("nan"))

    def _each(self) -> Any:
        values, present = self._by_class()
        return ops.where(present, values, float("nan"))


class _OfClasses(_Ratio):
    """All classes' figures as a vector, or by name."""

    def __init__(
        self,
        num_classes: int,
        outputs: Outputs,
        ignore_label: int | None,
        axis: int,
        class_names: Sequence[str] | None,
        name: str,
    ) -> None:
        super().__init__(num_classes, outputs, ignore_label, axis, name)
        names = None if class_names is None else [*class_names]
        if names is not None and not (
            len(set(names)) == len(names) == num_classes
            and all(isinstance(each, str) for each in names)
        ):
            raise ConfigError(
                f"{type(self).__name__}(class_names={names!r}): there must be "
                f"{num_classes} different str, one for each class, or None."
            )
        self.class_names = names

    def result(self) -> Any:
        """A float32 vector of `[num_classes]`, or scalars by name.

        With `class_names`, the names are `f"{metric's name}_{class name}"`.
        """
        values = self._each()
        if self.class_names is None:
            return values
        return {
            f"{self.name}_{each}": values[index]
            for index, each in enumerate(self.class_names)
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `keras.saving`."""
        return {**super().get_config(), "class_names": self.class_names}


@keras.saving.register_keras_serializable(package="legato")
class MeanIoU(_Ratio):
    """The mean over classes of intersection over union.

    Of a class, that is TP / (TP + FP + FN) over all pixels of all batches. A
    class that is neither in the labels nor predicted has no IoU and is left
    out of the mean; so is the ignored one. Without any class it is NaN.

    Args:
        num_classes: see `ConfusionMatrix`, also for what is out of range.
        outputs: see there.
        ignore_label: see there. Predicting it elsewhere is an error of the
            class that was there.
        axis: see there.
        name: of the metric.

    Raises:
        ConfigError: an argument is out of range.
    """

    _factor, _overlap = 1.0, 1.0

    def __init__(
        self,
        num_classes: int,
        outputs: Outputs = "logits",
        ignore_label: int | None = None,
        axis: int = -1,
        name: str = "mean_iou",
    ) -> None:
        super().__init__(num_classes, outputs, ignore_label, axis, name)

    def result(self) -> Any:
        """The mean, a float32 scalar from 0 to 1."""
        return self._mean()


@keras.saving.register_keras_serializable(package="legato")
class PerClassIoU(_OfClasses):
    """Each class's intersection over union; see `MeanIoU`.

    A class that is neither in the labels nor predicted has NaN: there is
    nothing that could be right or wrong.

    Args:
        num_classes: see `ConfusionMatrix`.
        outputs: see there.
        ignore_label: see there.
        axis: see there.
        class_names: `num_classes` different names, for results by name; None
            makes the result a vector.
        name: of the metric.

    Raises:
        ConfigError: an argument is out of range.
    """

    _factor, _overlap = 1.0, 1.0

    def __init__(
        self,
        num_classes: int,
        outputs: Outputs = "logits",
        ignore_label: int | None = None,
        axis: int = -1,
        class_names: Sequence[str] | None = None,
        name: str = "iou",
    ) -> None:
        super().__init__(
            num_classes, outputs, ignore_label, axis, class_names, name
        )


@keras.saving.register_keras_serializable(package="legato")
class MeanDice(_Ratio):
    """The mean over classes of Dice's coefficient, which is the F1 score.

    Of a class, that is 2 TP / (2 TP + FP + FN) over all pixels of all batches.
    Absent and ignored classes are left out, as in `MeanIoU`.

    Args:
        num_classes: see `ConfusionMatrix`.
        outputs: see there.
        ignore_label: see there.
        axis: see there.
        name: of the metric.

    Raises:
        ConfigError: an argument is out of range.
    """

    _factor, _overlap = 2.0, 0.0

    def __init__(
        self,
        num_classes: int,
        outputs: Outputs = "logits",
        ignore_label: int | None = None,
        axis: int = -1,
        name: str = "mean_dice",
    ) -> None:
        super().__init__(num_classes, outputs, ignore_label, axis, name)

    def result(self) -> Any:
        """The mean, a float32 scalar from 0 to 1."""
        return self._mean()


@keras.saving.register_keras_serializable(package="legato")
class PerClassDice(_OfClasses):
    """Each class's Dice coefficient; see `MeanDice` and `PerClassIoU`.

    Args:
        num_classes: see `ConfusionMatrix`.
        outputs: see there.
        ignore_label: see there.
        axis: see there.
        class_names: `num_classes` different names, for results by name; None
            makes the result a vector.
        name: of the metric.

    Raises:
        ConfigError: an argument is out of range.
    """

    _factor, _overlap = 2.0, 0.0

    def __init__(
        self,
        num_classes: int,
        outputs: Outputs = "logits",
        ignore_label: int | None = None,
        axis: int = -1,
        class_names: Sequence[str] | None = None,
        name: str = "dice",
    ) -> None:
        super().__init__(
            num_classes, outputs, ignore_label, axis, class_names, name
        )
