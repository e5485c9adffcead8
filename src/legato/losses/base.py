"""What the losses share: entries that count, weights, reductions."""

import abc
import math
import numbers
from typing import Any, NamedTuple

import keras
from keras import ops

from legato.compat.keras_masks import keras_mask
from legato.errors import ConfigError

KERAS_REDUCTIONS = (
    "sum_over_batch_size",
    "mean",
    "mean_with_sample_weight",
    "sum",
    "none",
    None,
)
OVER_POSITIVES = "sum_over_positives"


class Entries(NamedTuple):
    """The losses of a batch before they are reduced, all of one shape.

    Attributes:
        values: the losses; 0 where `counted` is 0.
        counted: 1 for what counts, 0 for what is ignored.
        positive: 1 for what "sum_over_positives" divides by; None where
            that is not offered.
    """

    values: Any
    counted: Any
    positive: Any = None


class EntryLoss(keras.losses.Loss, abc.ABC):
    """A loss of entries, some of which may not count.

    It differs from `keras.losses.Loss` in four things. It computes in
    float32 where `dtype` is half precision: the sum of a batch overflows
    float16 at 65504, and bfloat16 has no label 257. `sample_weight` is
    aligned with the first axes, so that a weight per anchor applies to all
    of its classes. Means are over the entries that count. And what has weight
    0 is inert: labels and outputs may be anything there, NaN too.

    Args:
        name: of the loss.
        reduction: how entries become one number.
        dtype: of the computation and the result; None for Keras's floatx.
        reductions: those that this loss has.
        problems: what is wrong with the arguments of the subclass.

    Raises:
        ConfigError: an argument is wrong; the message names all that are.
    """

    def __init__(
        self,
        name: str | None,
        reduction: str | None,
        dtype: Any,
        reductions: tuple[str | None, ...],
        problems: list[str],
    ) -> None:
        if reduction not in reductions:
            problems.append(
                f"reduction={reduction!r} must be one of "
                f"{', '.join(map(repr, reductions))}"
            )
        try:
            policy = keras.dtype_policies.get(dtype or keras.config.floatx())
            asked = policy.compute_dtype
        except (TypeError, ValueError):
            asked = None
        if asked not in ("float16", "bfloat16", "float32", "float64"):
            problems.append(
                f"dtype={dtype!r} must be a float dtype, such as 'float32'"
            )
        if problems:
            raise ConfigError(
                f"{type(self).__name__}: {'; '.join(problems)}. "
                "See legato.losses for what each argument means."
            )
        super().__init__(
            name=name,
            dtype="float64" if asked == "float64" else "float32",
        )
        self.reduction = reduction

    @abc.abstractmethod
    def entries(
        self, y_true: Any, y_pred: Any, mask: Any = None, weight: Any = None
    ) -> Entries:
        """The losses before weights and reduction.

        Args:
            y_true: labels, of the loss's dtype.
            y_pred: the model's outputs, of the loss's dtype.
            mask: Keras's mask of the outputs; None without one.
            weight: what the losses are to be multiplied with; None for 1.
                Where it is 0, no gradient may be NaN.
        """

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The losses of the entries; 0 where they are ignored."""
        return self.entries(y_true, y_pred).values

    def __call__(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> Any:
        """The reduced loss.

        Args:
            y_true: labels.
            y_pred: the model's outputs.
            sample_weight: a factor for each entry, of any shape that the
                losses' shape begins with.

        Returns:
            A scalar of the loss's dtype; without reduction, the losses.

        Raises:
            ConfigError: the shapes do not fit together.
        """
        mask = keras_mask(y_pred)
        with keras.name_scope(self.name):
            y_pred = _to_tensor(y_pred, self.dtype)
            y_true = _to_tensor(y_true, self.dtype)
            found = self.entries(y_true, y_pred, mask, sample_weight)
            return self._reduce(found, sample_weight)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make another such loss."""
        return {**super().get_config(), "dtype": self.dtype}

    def _reduce(self, entries: Entries, weight: Any) -> Any:
        values, counted, positive = entries
        if weight is not None:
            weight = align(weight, values, "sample_weight")
            values = ops.where(ops.equal(weight, 0), 0, values * weight)
        match self.reduction:
            case None | "none":
                return values
            case "sum":
                return ops.sum(values)
            case "sum_over_positives":
                if weight is not None:
                    positive = positive * is_not(weight, 0)
                return ops.sum(values) / ops.maximum(ops.sum(positive), 1)
            case "mean_with_sample_weight" if weight is not None:
                size = ops.sum(counted * weight)
            case _:
                size = ops.sum(counted)
        return ops.divide_no_nan(ops.sum(values), size)


def _to_tensor(value: Any, dtype: Any) -> Any:
    # (On PyTorch, Keras leaves NumPy's bfloat16 as it is.)
    return ops.cast(ops.convert_to_tensor(value, dtype=dtype), dtype)


def shown(counted: Any, weight: Any) -> Any:
    """Where a loss looks at labels and outputs: bool, as `counted`.

    Elsewhere an output that is not finite would spoil all gradients: 0 * inf.

    Args:
        counted: 1 for what counts, else 0.
        weight: of the losses; None for 1.

    Raises:
        ConfigError: the shape of the weights does not fit.
    """
    if weight is None:
        return counted > 0
    weight = align(weight, counted, "sample_weight")
    return ops.logical_and(counted > 0, ops.not_equal(weight, 0))


def is_not(tensor: Any, value: float | None) -> Any:
    """1 where a tensor differs from a value, else 0; of its dtype."""
    if value is None:
        return ops.ones_like(tensor)
    return ops.cast(ops.not_equal(tensor, value), tensor.dtype)


def align(tensor: Any, like: Any, what: str) -> Any:
    """A tensor with axes of length 1 added behind, to multiply `like` with.

    Args:
        tensor: to align; one last axis of length 1 too many is dropped.
        like: what it is to be multiplied with.
        what: it is, for messages.

    Returns:
        The tensor, of the dtype and the rank of `like`.

    Raises:
        ConfigError: its axes are not the first ones of `like`.
    """
    tensor = _to_tensor(tensor, like.dtype)
    shape, whole = tuple(tensor.shape), tuple(like.shape)
    if len(shape) == len(whole) + 1 and shape[-1] == 1:
        tensor, shape = ops.squeeze(tensor, axis=-1), shape[:-1]
    if len(shape) > len(whole) or any(
        length not in (1, None, other) and other is not None
        for length, other in zip(shape, whole, strict=False)
    ):
        raise ConfigError(
            f"{what} has the shape {shape}, and the losses have {whole}: its "
            "axes must be the first ones of the losses, or of length 1. "
            "Reshape it."
        )
    for _ in whole[len(shape) :]:
        tensor = ops.expand_dims(tensor, axis=-1)
    return tensor


def with_shape_of(y_true: Any, y_pred: Any) -> Any:
    """The labels, with a last axis of length 1 added where only that lacks.

    Raises:
        ConfigError: the shapes differ.
    """
    if len(y_true.shape) == len(y_pred.shape) - 1 and y_pred.shape[-1] == 1:
        y_true = ops.expand_dims(y_true, axis=-1)
    require_same_shape(y_true.shape, y_pred.shape, y_pred.shape)
    return y_true


def as_distributions(
    y_true: Any, y_pred: Any, ignored: int | None
) -> tuple[Any, Any]:
    """Labels as shares of the classes, and which of them count.

    Args:
        y_true: class indices, of the shape of `y_pred` without its last axis
            (or with 1 there); or shares, of the shape of `y_pred`.
        y_pred: logits; the last axis is that of two or more classes.
        ignored: the index that does not count; for shares, an entry that
            holds it for every class. None: all count.

    Returns:
        Shares of the shape of `y_pred`, NaN for an index that is no class; 1
        or 0 for what does or does not count, without the last axis.

    Raises:
        ConfigError: the shapes do not fit, or there is one class.
    """
    rank, classes = len(y_pred.shape), y_pred.shape[-1]
    if classes == 1:
        raise ConfigError(
            f"The logits have the shape {tuple(y_pred.shape)}, with one class, "
            "of which the softmax is always 1. Give two or more classes, or "
            "use a loss of one logit, such as keras.losses.BinaryCrossentropy."
        )
    if len(y_true.shape) == rank and y_true.shape[-1] == 1:
        y_true = ops.squeeze(y_true, axis=-1)
    if len(y_true.shape) == rank:
        require_same_shape(y_true.shape, y_pred.shape, y_pred.shape)
        counted = ops.max(is_not(y_true, ignored), axis=-1)
        return y_true, counted
    require_same_shape(y_true.shape, y_pred.shape[:-1], y_pred.shape)
    in_range = ops.logical_and(y_true >= 0, y_true < classes)
    is_class = ops.logical_and(in_range, ops.equal(y_true, ops.floor(y_true)))
    # (PyTorch refuses an index that is no class.)
    index = ops.cast(ops.where(is_class, y_true, 0), "int32")
    shares = ops.one_hot(index, classes, dtype=y_pred.dtype)
    shares = ops.where(ops.expand_dims(is_class, -1), shares, float("nan"))
    return shares, is_not(y_true, ignored)


def require_same_shape(labels: Any, expected: Any, outputs: Any) -> None:
    """Compare shapes as far as they are known.

    Raises:
        ConfigError: they differ.
    """
    if len(labels) != len(expected) or any(
        a != b and None not in (a, b)
        for a, b in zip(labels, expected, strict=True)
    ):
        raise ConfigError(
            f"The labels have the shape {tuple(labels)}, and the outputs "
            f"{tuple(outputs)}: the labels must have {tuple(expected)}. Give "
            "labels of this shape."
        )


def is_number(
    value: Any, low: float = -math.inf, high: float = math.inf
) -> bool:
    """Whether it is a finite real number from `low` to `high`."""
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= float(value) <= high
    )


def label_problems(name: str, value: Any) -> list[str]:
    """What is wrong with the label that is to be ignored."""
    if value is None or (
        isinstance(value, numbers.Integral) and not isinstance(value, bool)
    ):
        return []
    return [f"{name}={value!r} must be a label (an int), or None for no label"]
