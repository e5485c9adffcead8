"""The Dice loss: overlap of segments."""

from typing import Any

import keras
from keras import ops

from legato.errors import ConfigError
from legato.losses.base import (
    KERAS_REDUCTIONS,
    Entries,
    EntryLoss,
    align,
    as_distributions,
    is_not,
    is_number,
    label_problems,
    with_shape_of,
)


@keras.saving.register_keras_serializable(package="legato")
class DiceLoss(EntryLoss):
    """One minus the Dice coefficient of each class in each image, from logits.

    With `p` the probabilities and `g` the labels (1 or 0) of a class, summed
    over the pixels of an image that count, and `s` the smoothing::

        loss = 1 - (2 * sum(p * g) + s) / (sum(p**2) + sum(g**2) + s)

    (F. Milletari et al., "V-Net", 2016, arXiv:1606.04797, section 3, where
    `s` is 0.) Keras's Dice takes probabilities, sums `p` in place of `p**2`,
    and ignores nothing.

    Logits are `[batch, ..., classes]`. Labels are class indices, `[batch,
    ...]` or `[batch, ..., 1]`, or have the shape of the logits; with one
    channel of logits, labels are 1 or 0 (or between them). Any other label
    makes the losses of its image NaN. `sample_weight` is `[batch]` or
    `[batch, classes]`; `[1, classes]` weighs classes. An image of which no
    pixel counts does not count.

    Args:
        activation: what makes probabilities of logits: "softmax" of two or
            more classes that exclude each other, or "sigmoid" of each alone.
        smooth: added to both sides of the fraction. Above 0, a class that an
            image lacks is to be predicted nowhere. With 0 its coefficient is
            0 whatever is predicted, and so it does not count.
        ignore_label: pixels with this label do not count; where labels have
            several channels, those that hold it in each. None: all count.
        reduction: one of Keras's; means are over the classes of the images
            that count.
        name: of the loss.
        dtype: of the computation; at least float32.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        activation: str = "softmax",
        smooth: float = 1.0,
        ignore_label: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "dice_loss",
        dtype: Any = None,
    ) -> None:
        problems = label_problems("ignore_label", ignore_label)
        if activation not in ("softmax", "sigmoid"):
            problems.append(
                f"activation={activation!r} must be 'softmax' or 'sigmoid'"
            )
        if not is_number(smooth, 0):
            problems.append(
                f"smooth={smooth!r} must be 0 (none) or a positive number"
            )
        super().__init__(name, reduction, dtype, KERAS_REDUCTIONS, problems)
        self.activation = activation
        self.smooth = float(smooth)
        self.ignore_label = ignore_label

    @property
    def ignored_index(self) -> int | None:
        """The label that may be none of the classes, where it is an index."""
        return self.ignore_label

    def entries(
        self, y_true: Any, y_pred: Any, mask: Any = None, weight: Any = None
    ) -> Entries:
        """Losses `[batch, classes]`."""
        rank, channels = len(y_pred.shape), y_pred.shape[-1]
        pixels = tuple(range(1, rank - 1))
        if rank < 3:
            raise ConfigError(
                f"DiceLoss was given logits of the shape {tuple(y_pred.shape)}:"
                " they must be [batch, ..., classes] with at least one axis of "
                "pixels. For one label per example use a cross-entropy."
            )
        if channels == 1 and self.activation == "softmax":
            raise ConfigError(
                "DiceLoss was given one channel of logits, of which the "
                "softmax is always 1. Use activation='sigmoid'."
            )
        if channels == 1:
            labels = with_shape_of(y_true, y_pred)
            counted = is_not(labels, self.ignore_label)[..., 0]
        else:
            labels, counted = as_distributions(
                y_true, y_pred, self.ignore_label
            )
        in_range = ops.logical_and(labels >= 0, labels <= 1)
        labels = ops.where(in_range, labels, float("nan"))
        if mask is not None:
            counted = counted * align(mask, counted, "The mask of the outputs")
        is_softmax = self.activation == "softmax"
        activate = ops.softmax if is_softmax else ops.sigmoid
        counted = ops.expand_dims(counted, axis=-1)
        labels = ops.where(counted > 0, labels, 0)
        if self.smooth:
            # (Not the largest, which PyTorch refuses of nothing.)
            any_pixel = ops.any(counted > 0, axis=pixels)
            any_pixel = ops.cast(any_pixel, y_pred.dtype)
            counts: Any = ops.tile(any_pixel, (1, channels))
        else:
            there = ops.logical_not(labels <= 0)  # NaN too, which is to show
            counts = ops.cast(ops.any(there, axis=pixels), y_pred.dtype)
        used = counted > 0
        if weight is not None:
            weight = align(weight, counts, "sample_weight")
            weight = ops.expand_dims(weight, axis=pixels)
            labels = ops.where(ops.equal(weight, 0), 0, labels)
            if is_softmax:  # which takes the logits of all classes
                weight = ops.max(ops.abs(weight), axis=-1, keepdims=True)
            used = ops.logical_and(used, ops.not_equal(weight, 0))
        # A logit that is not finite would spoil all gradients: 0 * inf.
        p = activate(ops.where(used, y_pred, 0)) * counted
        overlap = ops.sum(p * labels, axis=pixels)
        size = ops.sum(ops.square(p) + ops.square(labels), axis=pixels)
        if not self.smooth:
            size = ops.where(counts > 0, size, 1)
        score = (2 * overlap + self.smooth) / (size + self.smooth)
        return Entries((1 - score) * counts, counts)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make another such loss."""
        return {
            **super().get_config(),
            "activation": self.activation,
            "smooth": self.smooth,
            "ignore_label": self.ignore_label,
        }
