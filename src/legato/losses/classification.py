"""Cross-entropy with smoothed labels."""

from typing import Any

import keras
from keras import ops

from legato.losses.base import (
    KERAS_REDUCTIONS,
    Entries,
    EntryLoss,
    align,
    as_distributions,
    is_number,
    label_problems,
    shown,
)


@keras.saving.register_keras_serializable(package="legato")
class SmoothedCrossentropy(EntryLoss):
    """Cross-entropy with label smoothing, also for class indices.

    With `K` classes, `q` the label's distribution and `e` the smoothing::

        loss = -sum_k ((1 - e) * q_k + e / K) * log(softmax(logits)_k)

    (C. Szegedy et al., "Rethinking the Inception Architecture for Computer
    Vision", 2015, arXiv:1512.00567, section 7.) Of Keras's own,
    SparseCategoricalCrossentropy cannot smooth, and CategoricalCrossentropy
    cannot ignore.

    Logits are `[..., classes]`; labels are class indices, of that shape
    without its last axis, or distributions (one-hot rows), of that shape. An
    index that is no class makes its loss NaN. A logit may be `-inf`, for a
    class that cannot be.

    Args:
        label_smoothing: the share that is spread over all classes, from 0 to
            below 1.
        ignore_class: entries with this index do not count; where labels are
            distributions, those that hold it for every class. None: all
            count.
        reduction: one of Keras's; means are over the entries that count.
        name: of the loss.
        dtype: of the computation; at least float32.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        ignore_class: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "smoothed_crossentropy",
        dtype: Any = None,
    ) -> None:
        problems = label_problems("ignore_class", ignore_class)
        if not is_number(label_smoothing, 0, 1) or label_smoothing == 1:
            problems.append(
                f"label_smoothing={label_smoothing!r} must be a number from 0 "
                "to below 1, such as 0.1"
            )
        super().__init__(name, reduction, dtype, KERAS_REDUCTIONS, problems)
        self.label_smoothing = float(label_smoothing)
        self.ignore_class = ignore_class

    @property
    def ignored_index(self) -> int | None:
        """The label that may be none of the classes, where it is an index."""
        return self.ignore_class

    def entries(
        self, y_true: Any, y_pred: Any, mask: Any = None, weight: Any = None
    ) -> Entries:
        """Losses of the shape of the logits without the axis of classes."""
        shares, counted = as_distributions(y_true, y_pred, self.ignore_class)
        if mask is not None:
            counted = counted * align(mask, counted, "The mask of the outputs")
        used = ops.expand_dims(shown(counted, weight), axis=-1)
        shares = ops.where(used, shares, 0)
        log_p = ops.log_softmax(ops.where(used, y_pred, 0), axis=-1)
        rest = self.label_smoothing / y_pred.shape[-1]
        smoothed = (1 - self.label_smoothing) * shares + rest
        if not rest:  # 0 * -inf
            log_p = ops.where(ops.equal(smoothed, 0), 0, log_p)
        values = -ops.sum(smoothed * log_p, axis=-1) * counted
        return Entries(values, counted)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make another such loss."""
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "ignore_class": self.ignore_class,
        }
