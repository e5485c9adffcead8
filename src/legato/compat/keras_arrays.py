"""Arrays of the backend in NumPy."""

from typing import Any

import keras
import numpy as np


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor, a variable, or what can be one, in NumPy.

    Keras itself fails at a bfloat16 of shape [] on TensorFlow, which gives
    NumPy a scalar of a type that is not its own.
    """
    if keras.ops.is_tensor(tensor) and not len(tensor.shape):
        return to_numpy(keras.ops.reshape(tensor, (1,)))[0, ...]
    return np.asarray(keras.ops.convert_to_numpy(tensor))
