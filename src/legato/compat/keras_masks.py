"""Masks that Keras's layers hang on the tensors that they return."""

from typing import Any

from keras.src.backend.common import masking


def keras_mask(tensor: Any) -> Any:
    """The mask of a layer's output: true where it counts; None without one."""
    return masking.get_keras_mask(tensor)
