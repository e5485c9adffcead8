"""Losses of dense object detectors: classes and boxes of anchors."""

from typing import Any

import keras
from keras import ops

from legato.losses.base import (
    KERAS_REDUCTIONS,
    OVER_POSITIVES,
    Entries,
    EntryLoss,
    align,
    is_not,
    is_number,
    label_problems,
    require_same_shape,
    shown,
    with_shape_of,
)


@keras.saving.register_keras_serializable(package="legato")
class SigmoidFocalLoss(EntryLoss):
    """The focal loss, of independent classes, from logits.

    With `p` the sigmoid of a logit, `p_t = p` and `alpha_t = alpha` where the
    label is 1, `p_t = 1 - p` and `alpha_t = 1 - alpha` where it is 0::

        loss = -alpha_t * (1 - p_t)**gamma * log(p_t)

    (T. Lin et al., "Focal Loss for Dense Object Detection", 2017,
    arXiv:1708.02002, equation 5.) It is computed from the logit itself, and
    stays exact where `p` rounds to 0 or 1: Keras's BinaryFocalCrossentropy
    clips `p` there, and on JAX and PyTorch a confident mistake then has no
    gradient.

    Labels and logits have one shape, such as `[batch, anchors, classes]`; an
    anchor of the background has 0 for every class. A label other than 0, 1
    and `ignore_label` counts as 0.

    Args:
        alpha: the weight of the positives, from 0 to 1; None for no
            balancing (`alpha_t = 1`).
        gamma: how much easy entries count less; 0 for not at all.
        ignore_label: entries with this label add neither to the loss nor to
            any count. None: there is no such label. (A `sample_weight` of 0
            has the same effect with the default reduction.)
        reduction: "sum_over_positives": the sum over the whole batch, divided
            by the number of positive labels whose weight is not 0, or by 1
            where there are none, as RetinaNet does. Or one of Keras's; their
            means are over anchors and classes.
        name: of the loss.
        dtype: of the computation; at least float32.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        ignore_label: int | None = -1,
        reduction: str | None = OVER_POSITIVES,
        name: str | None = "sigmoid_focal_loss",
        dtype: Any = None,
    ) -> None:
        problems = label_problems("ignore_label", ignore_label)
        if alpha is not None and not is_number(alpha, 0, 1):
            problems.append(
                f"alpha={alpha!r} must be a number from 0 to 1, or None for "
                "no balancing"
            )
        if not is_number(gamma, 0):
            problems.append(
                f"gamma={gamma!r} must be 0 (no focus) or a positive number"
            )
        super().__init__(
            name,
            reduction,
            dtype,
            (OVER_POSITIVES, *KERAS_REDUCTIONS),
            problems,
        )
        self.alpha = alpha if alpha is None else float(alpha)
        self.gamma = float(gamma)
        self.ignore_label = ignore_label

    def entries(
        self, y_true: Any, y_pred: Any, mask: Any = None, weight: Any = None
    ) -> Entries:
        """Losses of the shape of the logits."""
        y_true = with_shape_of(y_true, y_pred)
        counted = is_not(y_true, self.ignore_label)
        if mask is not None:
            counted = counted * align(mask, counted, "The mask of the outputs")
        positive = ops.logical_and(ops.equal(y_true, 1), counted > 0)
        ones = ops.cast(positive, y_pred.dtype)
        logits = ops.where(shown(counted, weight), y_pred, 0)
        towards = ops.where(positive, logits, -logits)  # p_t is its sigmoid
        # Not a power of 1 - p_t: its gradient is infinite at 0.
        focus = ops.exp(-self.gamma * ops.softplus(towards))
        values = focus * ops.softplus(-towards) * counted
        if self.alpha is not None:
            alpha, beta = self.alpha, 1 - self.alpha
            values = values * (alpha * ones + beta * (1 - ones))
        return Entries(values, counted, ones)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make another such loss."""
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "gamma": self.gamma,
            "ignore_label": self.ignore_label,
        }


@keras.saving.register_keras_serializable(package="legato")
class SmoothL1Loss(EntryLoss):
    """The smooth L1 loss of boxes.

    A box's loss is the sum over its coordinates, with `d` the difference::

        d**2 / (2 * beta)    where |d| < beta
        |d| - beta / 2       elsewhere

    (R. Girshick, "Fast R-CNN", 2015, arXiv:1504.08083, equation 3, where
    `beta` is 1.) Huber's loss with `delta = beta` is `beta` times as much:
    smooth L1 keeps the slope 1 far out, Huber's the curvature 1 near 0.

    Boxes are `[..., coordinates]`, such as `[batch, anchors, 4]`. Which of
    them are positive is said by `sample_weight`, `[batch, anchors]`: a box of
    weight 0 takes no part, whatever its targets and outputs are, NaN too.

    Args:
        beta: where the loss becomes linear, in the units of the boxes; above
            0.
        reduction: "sum_over_positives": the sum over the whole batch, divided
            by the number of boxes whose weight is not 0, or by 1 where there
            are none. Or one of Keras's; their means are over boxes.
        name: of the loss.
        dtype: of the computation; at least float32.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        beta: float = 1.0,
        reduction: str | None = OVER_POSITIVES,
        name: str | None = "smooth_l1_loss",
        dtype: Any = None,
    ) -> None:
        problems = []
        if not (is_number(beta, 0) and beta > 0):
            problems.append(
                f"beta={beta!r} must be a number above 0, such as 1.0"
            )
        super().__init__(
            name,
            reduction,
            dtype,
            (OVER_POSITIVES, *KERAS_REDUCTIONS),
            problems,
        )
        self.beta = float(beta)

    def entries(
        self, y_true: Any, y_pred: Any, mask: Any = None, weight: Any = None
    ) -> Entries:
        """Losses of the boxes, without the axis of coordinates."""
        require_same_shape(y_true.shape, y_pred.shape, y_pred.shape)
        counted = ops.ones_like(y_pred[..., 0])
        if mask is not None:
            counted = counted * align(mask, counted, "The mask of the outputs")
        # An anchor without a box may have log(0) as a target.
        used = ops.expand_dims(shown(counted, weight), axis=-1)
        y_true, y_pred = (ops.where(used, each, 0) for each in (y_true, y_pred))
        mean = keras.losses.huber(y_true, y_pred, delta=self.beta)
        values = mean * (y_pred.shape[-1] / self.beta) * counted
        return Entries(values, counted, counted)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make another such loss."""
        return {**super().get_config(), "beta": self.beta}
