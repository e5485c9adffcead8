"""Whether a classifier is as sure as it should be."""

from typing import Any

import keras
from keras import ops

from legato.errors import ConfigError
from legato.metrics.shapes import drop_last, fit_labels, fit_weights
from legato.metrics.totals import LongSum


@keras.saving.register_keras_serializable(package="legato")
class ExpectedCalibrationError(keras.metrics.Metric):
    """By how much confidence and accuracy differ, on average.

    Guo et al., On Calibration of Modern Neural Networks, 2017
    (arXiv:1706.04599), equation 3. The confidence of a prediction is the
    probability of the predicted class. Predictions are sorted into bins
    `((m - 1) / M, m / M]` of confidence, and the result is the sum over bins
    of `|B_m| / n * |accuracy(B_m) - confidence(B_m)|`: 0 is calibrated, and it
    is at most 1. Works in compiled steps on every backend.

    Args:
        num_bins: M above.
        from_logits: whether outputs are logits rather than probabilities.
        binary: whether an output is that of the positive class alone, and not
            a vector with an entry for each class. The predicted class is then
            1 if its probability is above one half, and the confidence that of
            the predicted class: the same as for a vector of two entries.
        name: of the metric.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        num_bins: int = 15,
        from_logits: bool = False,
        binary: bool = False,
        name: str = "expected_calibration_error",
    ) -> None:
        super().__init__(name=name, dtype="float32")
        if type(num_bins) is not int or num_bins < 1:
            raise ConfigError(
                f"ExpectedCalibrationError(num_bins={num_bins!r}): it must be "
                "an int, at least 1; the paper takes 15."
            )
        for argument, value in (
            ("from_logits", from_logits),
            ("binary", binary),
        ):
            if type(value) is not bool:
                raise ConfigError(
                    f"ExpectedCalibrationError({argument}={value!r}): it must "
                    "be True or False."
                )
        self.num_bins = num_bins
        self.from_logits = from_logits
        self.binary = binary
        # As Keras says of its own which way is better.
        self._direction = "down"
        # Of each bin: weight, weight of what is correct, confidence.
        self._bins = LongSum(self, (3, num_bins), "bins")

    def update_state(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> None:
        """Take a batch.

        Args:
            y_true: the classes, whole numbers of shape `[batch, ...]`, or
                `[batch, ..., 1]`.
            y_pred: probabilities or logits of shape `[batch, ..., classes]`;
                with `binary`, of the shape of the labels.
            sample_weight: of shape `[batch]` or that of the labels, or a
                scalar; not negative.

        Raises:
            DataError: the shapes do not fit.
        """
        outputs = ops.cast(ops.convert_to_tensor(y_pred), "float32")
        confidence, predicted = self._predict(outputs)
        labels = ops.convert_to_tensor(y_true)
        labels = fit_labels(self.name, labels, confidence.shape)
        correct = ops.cast(
            ops.cast(labels, "int32") == ops.cast(predicted, "int32"), "float32"
        )
        weights = self._weights(sample_weight, labels)
        # The paper's bins are open below and closed above.
        bins = ops.ceil(confidence * self.num_bins) - 1
        bins = ops.clip(ops.cast(bins, "int32"), 0, self.num_bins - 1)
        is_in = ops.reshape(bins, (-1, 1)) == ops.arange(
            self.num_bins, dtype="int32"
        )
        self._bins.add(
            ops.stack(
                [
                    ops.sum(
                        ops.where(is_in, ops.reshape(values, (-1, 1)), 0.0),
                        axis=0,
                    )
                    for values in (
                        weights,
                        weights * correct,
                        weights * confidence,
                    )
                ]
            )
        )

    def _predict(self, outputs: Any) -> tuple[Any, Any]:
        """Confidences and predicted classes."""
        if self.binary:
            outputs = drop_last(outputs, max(len(outputs.shape) - 1, 1))
            positive = ops.sigmoid(outputs) if self.from_logits else outputs
            return ops.maximum(positive, 1 - positive), positive > 0.5
        if self.from_logits:
            outputs = ops.softmax(outputs, axis=-1)
        return ops.max(outputs, axis=-1), ops.argmax(outputs, axis=-1)

    def _weights(self, sample_weight: Any, labels: Any) -> Any:
        if sample_weight is None:
            return ops.ones(ops.shape(labels), dtype="float32")
        weights = fit_weights(self.name, sample_weight, labels)
        ones = (1,) * (len(labels.shape) - len(weights.shape))
        shape: Any = ops.shape(weights)
        weights = ops.reshape(weights, (*shape, *ones))
        return ops.broadcast_to(weights, ops.shape(labels))

    def result(self) -> Any:
        """The error, a float32 scalar from 0 to 1; NaN without predictions."""
        weight, correct, confidence = self._bins.value()
        total = ops.sum(weight)
        gaps = ops.sum(ops.abs(correct - confidence))
        error = gaps / ops.where(total > 0, total, 1.0)
        return ops.where(total > 0, error, float("nan"))

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `keras.saving`."""
        return {
            "num_bins": self.num_bins,
            "from_logits": self.from_logits,
            "binary": self.binary,
            "name": self.name,
        }
