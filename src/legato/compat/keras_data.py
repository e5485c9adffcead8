"""What `keras.Model.fit` makes of its data.

The public names of Keras stop at `fit`; its rules about what data are, how
they are split and how classes are weighted are used here and not retold.
"""

from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters import (
    array_slicing,
    data_adapter_utils,
)
from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.utils import rng_utils

from legato.errors import DataError

__all__ = [
    "DataAdapter",
    "class_weight_to_sample_weights",
    "global_seed",
    "is_array",
    "is_grain_dataset",
    "is_scipy_sparse",
    "is_tf_dataset",
    "is_torch_dataloader",
    "numpy_dtype",
    "swap_global_seed_generator",
    "to_numpy",
]

class_weight_to_sample_weights = (
    data_adapter_utils.class_weight_to_sample_weights
)
is_array = array_slicing.can_slice_array
is_grain_dataset = data_adapters.is_grain_dataset
is_scipy_sparse = data_adapter_utils.is_scipy_sparse
is_tf_dataset = data_adapters.is_tf_dataset
is_torch_dataloader = data_adapters.is_torch_dataloader


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of a name that Keras uses, "bfloat16" too."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def to_numpy(value: Any) -> np.ndarray:
    """An array of any library as a NumPy array, without a copy if possible.

    Args:
        value: as `keras.Model.fit` takes it. A pandas Series of n rows gives
            `[n, 1]`.

    Raises:
        DataError: a ragged or sparse tensor.
        Others: `np.asarray` raised.
    """
    if isinstance(value, np.ndarray):
        return value
    for test, what, remedy in _REFUSED:
        if test(value):
            raise DataError(
                f"The data hold a {what} ({type(value).__name__}), which is "
                f"not supported. {remedy}"
            )
    if data_adapter_utils.is_torch_tensor(value):
        if keras.config.backend() == "torch":
            return np.asarray(keras.ops.convert_to_numpy(value))
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            return value.float().numpy().astype(numpy_dtype("bfloat16"))
        return value.numpy()
    if type(value).__module__.split(".")[0] == "pandas":
        dtypes = value.dtypes.tolist() if value.ndim > 1 else [value.dtype]
        if not all(dtype.kind in "biufc" for dtype in dtypes):
            found = value.to_numpy()  # Keras takes numbers alone
            return found if found.ndim > 1 else found[:, None]
        sliceable: Any = array_slicing.convert_to_sliceable(value, "numpy")
        return sliceable.convert_to_numpy(sliceable[0 : len(value)])
    return np.asarray(value)


_REFUSED: tuple[tuple[Any, str, str], ...] = (
    (
        data_adapter_utils.is_tensorflow_ragged,
        "ragged tensor",
        "Pad it: `tensor.to_tensor()`.",
    ),
    (
        data_adapter_utils.is_tensorflow_sparse,
        "sparse tensor",
        "Make it dense: `tf.sparse.to_dense(tensor)`.",
    ),
    (
        data_adapter_utils.is_jax_sparse,
        "sparse array",
        "Make it dense: `array.todense()`.",
    ),
)


def swap_global_seed_generator(generator: Any) -> Any:
    """Puts one in the place of Keras's global seed generator.

    Args:
        generator: None lets Keras make one when it is asked for, from
            Python's `random`.

    Returns:
        The one that was there, or None.
    """
    name = seed_generator.GLOBAL_SEED_GENERATOR
    before = global_state.get_global_attribute(name)
    global_state.set_global_attribute(name, generator)
    return before


def global_seed() -> int | None:
    """The seed that `keras.utils.set_random_seed` was called with, if any."""
    return global_state.get_global_attribute(rng_utils.GLOBAL_RANDOM_SEED)
