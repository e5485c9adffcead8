"""Whether a classifier is as sure as it should be."""

from typing import Any

import keras
from keras import ops

from legato.errors import ConfigError
from legato.metrics.arguments import require_bools
from legato.metrics.shapes import (
    drop_last,
    fit_labels,
    fit_weights,
    to_classes,
)
from legato.metrics.totals import LongSum

# So many numbers are summed in float32 at once: some backends add one by one,
# and drop more of each the more there are.
_ROW = 256
# By so much rounding may take a probability out of its range.
_ROUNDING = 1e-3


@keras.saving.register_keras_serializable(package="legato")
class ExpectedCalibrationError(keras.metrics.Metric):
    """By how much confidence and accuracy differ, on average.

    Guo et al., On Calibration of Modern Neural Networks, 2017
    (arXiv:1706.04599), equation 3. The confidence of a prediction is the
    probability of the predicted class. Predictions are sorted into bins
    `((m - 1) / M, m / M]` of confidence, and the result is the sum over bins
    of `|B_m| / n * |accuracy(B_m) - confidence(B_m)|`: 0 is calibrated, and it
    is at most 1. Works in compiled steps on every backend.

    What cannot be makes the result NaN, since a compiled step cannot raise an
    error: a label that is no class, a probability that is not from 0 to 1, a
    logit that is NaN, a weight below 0. What has weight 0 does not exist.

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
        require_bools(
            "ExpectedCalibrationError", from_logits=from_logits, binary=binary
        )
        self.num_bins = num_bins
        self.from_logits = from_logits
        self.binary = binary
        # As Keras says of its own which way is better.
        self._direction = "down"
        # Of each bin: what is correct less the confidence; then all weights.
        self._bins = LongSum(self, (num_bins + 1,), "bins")

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
        confidence, predicted, is_known = self._predict(outputs)
        labels, is_class = (
            fit_labels(self.name, each, confidence.shape)
            for each in to_classes(y_true)
        )
        shape: Any = ops.shape(outputs)
        classes = 2 if self.binary else shape[-1]
        is_known = is_known & is_class & (labels >= 0) & (labels < classes)
        correct = ops.cast(labels == ops.cast(predicted, "int32"), "float32")
        weights = self._weights(sample_weight, labels)
        gaps = weights * (correct - confidence)
        gaps = ops.where(is_known & (weights >= 0), gaps, float("nan"))
        gaps = ops.where(weights == 0, 0.0, gaps)
        # The paper's bins are open below and closed above.
        bins = ops.ceil(confidence * self.num_bins) - 1
        bins = ops.clip(ops.cast(bins, "int32"), 0, self.num_bins - 1)
        numbers: Any = ops.arange(self.num_bins, dtype="int32")
        is_in = _in_rows(bins) == numbers[:, None, None]
        by_bin = ops.sum(ops.where(is_in, _in_rows(gaps), 0.0), axis=-1)
        whole: Any = ops.sum(_in_rows(weights), axis=-1)
        parts = ops.concatenate([by_bin, whole[None]], axis=0)
        self._bins.add_parts(ops.transpose(parts))

    def _predict(self, outputs: Any) -> tuple[Any, Any, Any]:
        """Confidences, predicted classes, and whether these can be."""
        if self.binary:
            outputs = drop_last(outputs, max(len(outputs.shape) - 1, 1))
            positive = ops.sigmoid(outputs) if self.from_logits else outputs
            confidence = ops.maximum(positive, 1 - positive)
            return confidence, positive > 0.5, _may_be(confidence)
        if self.from_logits:
            outputs = ops.softmax(outputs, axis=-1)
        confidence = ops.max(outputs, axis=-1)
        # (All numbers of a softmax are NaN, if one is.)
        is_known = (
            _may_be(confidence)
            if self.from_logits
            else ops.all(_may_be(outputs), axis=-1)
        )
        return confidence, ops.argmax(outputs, axis=-1), is_known

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
        bins: Any = self._bins.value()
        total = bins[-1]
        gaps = ops.sum(ops.abs(bins[:-1]))
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


def _may_be(probabilities: Any) -> Any:
    return (probabilities >= -_ROUNDING) & (probabilities <= 1 + _ROUNDING)


def _in_rows(values: Any) -> Any:
    """All numbers of a tensor as `[rows, _ROW]`, filled up with 0."""
    flat: Any = ops.reshape(values, (-1,))
    shape: Any = ops.shape(flat)
    filler = ops.zeros((-shape[0] % _ROW,), dtype=flat.dtype)
    return ops.reshape(ops.concatenate([flat, filler]), (-1, _ROW))
