"""Sums on the device that neither saturate nor lose what is small."""

from typing import Any

import keras
from keras import ops

# A count below 2**31 is a multiple of this and a rest, and both are exact as
# float32 numbers.
_SPLIT = 4096


class LongSum:
    """Sums of many numbers, as pairs of float32 numbers.

    A float32 sum of ones ends at 2**24, which is sixty-four images of 512 by
    512 pixels. Here, what rounding takes from the first number of a pair is
    kept in the second (two-sum: Knuth, The Art of Computer Programming, vol.
    2, 4.2.2), so that a sum holds about 48 bits: whole numbers are exact up to
    2**47. No backend is needed that has 64-bit numbers.

    Args:
        metric: whose variable it is; `reset_state` of Keras sets it to zero.
        shape: of the sums.
        name: of the variable.
    """

    def __init__(
        self, metric: keras.metrics.Metric, shape: tuple[int, ...], name: str
    ) -> None:
        self._pair = metric.add_variable(
            shape=(2, *shape),
            initializer="zeros",
            dtype="float32",
            name=name,
        )

    def add(self, *terms: Any) -> None:
        """Add float32 tensors of the sums' shape."""
        pair: Any = ops.convert_to_tensor(self._pair)
        high, low = pair[0], pair[1]
        for term in terms:
            total = high + term
            of_term = total - high
            low = low + ((high - (total - of_term)) + (term - of_term))
            high = total
        total = high + low
        self._pair.assign(ops.stack([total, low - (total - high)]))

    def add_counts(self, counts: Any, weights: Any = None) -> None:
        """Add whole numbers, each of which may be above 2**24.

        Args:
            counts: int32 tensor of the sums' shape; with weights it has one
                more axis before these.
            weights: float32 tensor with one number for each entry of that
                axis, over which is summed. Weights of 0 and 1 lose nothing.
        """
        high = ops.cast(counts // _SPLIT * _SPLIT, "float32")
        low = ops.cast(counts % _SPLIT, "float32")
        self.add(_weighted(high, weights), _weighted(low, weights))

    def add_parts(self, parts: Any) -> None:
        """Add the sum over the first axis of a float32 tensor.

        Each number is cut in two (Rump, Ogita and Oishi, Accurate
        Floating-Point Summation, 2008, algorithm 3.2), so that the sum of the
        first parts is exact. That of the rests is too small to matter, in
        whatever order a backend adds.

        Args:
            parts: `[parts, ...]`, at most some hundred thousand.
        """
        bound = 4 * ops.sum(ops.abs(parts), axis=0)
        high = (parts + bound) - bound
        self.add(ops.sum(high, axis=0), ops.sum(parts - high, axis=0))

    def value(self) -> Any:
        """The sums, rounded to float32."""
        pair: Any = ops.convert_to_tensor(self._pair)
        return pair[0] + pair[1]


def _weighted(values: Any, weights: Any) -> Any:
    if weights is None:
        return values
    ones = (1,) * (len(values.shape) - 1)
    return ops.sum(values * ops.reshape(weights, (-1, *ones)), axis=0)
