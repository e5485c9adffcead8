"""Labels, predictions and weights that must fit one another."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from legato.errors import DataError

# Integers of which int32 holds each.
_SMALL = ("bool", "uint8", "int8", "uint16", "int16", "int32")
_LIMITS = np.iinfo("int32")


def differ(one: int | None, other: int | None) -> bool:
    """Whether two sizes cannot be equal; None is one not known in tracing."""
    return one is not None and other is not None and one != other


def drop_last(tensor: Any, rank: int) -> Any:
    """Without a last axis of size 1, if that makes it of this rank."""
    if len(tensor.shape) == rank + 1 and tensor.shape[-1] == 1:
        return ops.squeeze(tensor, axis=-1)
    return tensor


def fit_labels(name: str, labels: Any, shape: Sequence[int | None]) -> Any:
    """Labels of the shape of predictions.

    Args:
        name: of the metric, for messages.
        labels: tensor; may have one more axis at the end, of size 1.
        shape: of the predictions.

    Raises:
        DataError: they have another shape.
    """
    fitting = drop_last(labels, len(shape))
    if len(fitting.shape) != len(shape) or any(
        map(differ, fitting.shape, shape)
    ):
        raise DataError(
            f"{name}: labels have the shape {tuple(labels.shape)} and the "
            f"predictions {tuple(shape)} (without an axis of classes). They "
            "must be the same; one-hot labels need keras.ops.argmax first."
        )
    return fitting


def to_classes(labels: Any) -> tuple[Any, Any]:
    """Labels as int32, and whether each is one.

    Args:
        labels: tensor or array of numbers.

    Returns:
        int32 and bool, of the same shape. False is what int32 cannot hold:
        a fraction, NaN, 2**32.
    """
    large = ("int64", "uint64", "uint32")
    if isinstance(labels, np.ndarray) and labels.dtype.name in large:
        # JAX would cut their digits off, and PyTorch has no uint64.
        labels = np.clip(labels, None, _LIMITS.max)
        labels = labels.astype("int64").clip(_LIMITS.min).astype("int32")
    labels = ops.convert_to_tensor(labels)
    whole = ops.cast(labels, "int32")
    dtype = keras.backend.standardize_dtype(labels.dtype)
    if dtype in _SMALL:
        return whole, ops.ones_like(whole, dtype="bool")
    return whole, ops.equal(ops.cast(whole, dtype), labels)


def fit_weights(name: str, sample_weight: Any, labels: Any) -> Any:
    """Weights of examples, as `[batch]`, or of each label.

    Args:
        name: of the metric, for messages.
        sample_weight: a scalar, or of shape `[batch]`, or one that broadcasts
            to that of the labels, perhaps with one more axis at the end.
        labels: that they are for.

    Returns:
        float32 of shape `[batch]`, or of the shape of the labels.

    Raises:
        DataError: they have another shape.
    """
    weights: Any = ops.cast(ops.convert_to_tensor(sample_weight), "float32")
    given, rank = tuple(weights.shape), len(labels.shape)
    weights = drop_last(weights, rank)
    size = len(weights.shape)
    if size not in (0, 1, rank) or any(
        differ(ours, theirs) and ours != 1
        for ours, theirs in zip(weights.shape, labels.shape, strict=False)
    ):
        raise DataError(
            f"{name}: sample_weight has the shape {given} and the labels "
            f"{tuple(labels.shape)}: give one weight for each example, or one "
            "for each label."
        )
    shape: Any = ops.shape(labels)
    return ops.broadcast_to(weights, shape[: max(size, 1)])
