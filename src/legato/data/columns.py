"""One array of the data, of whatever library: its rows as NumPy arrays."""

import mmap
from typing import Any, Protocol

import keras
import numpy as np

from legato import backends
from legato.compat import keras_data
from legato.data.beside import stays_on_host
from legato.errors import DataError


class Column(Protocol):
    """Rows that can be read in any order.

    Attributes:
        shape: `[examples, ...]`.
        dtype: of the rows, which the backend computes with.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self, index: Any) -> np.ndarray:
        """Rows at some positions.

        Args:
            index: ints of any shape, or a slice.

        Returns:
            `[*index.shape, ...]`, of `dtype`.
        """
        ...

    def part(self, start: int, stop: int) -> "Column":
        """The rows from `start` to `stop`, not copied if possible."""
        ...


def device_dtype(dtype: np.dtype, *, every_float: bool = False) -> np.dtype:
    """What the data of a dtype become for the device.

    Floats are cast to floatx as Keras's own `fit` does; what the backend
    would cast at every step (int64 on JAX) is cast once.

    Args:
        dtype: that of the data, which a device takes.
        every_float: float16 and the like become floatx too, not only float64.

    """
    is_float = "float" in dtype.name
    if dtype == np.float64 or (is_float and every_float):
        return np.dtype(keras_data.numpy_dtype(keras.config.floatx()))
    return np.dtype(backends.current().canonical_dtype(dtype))


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array with another dtype, as `device_dtype` gives it.

    Raises:
        DataError: an integer does not fit.
    """
    if array.dtype == dtype:
        return array
    if array.dtype.kind in "iu" and dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise DataError(
                f"The data hold {array.dtype} values outside of {dtype}, which "
                "is what this backend computes with. Number ids from 0; use "
                "floats for what is measured."
            )
    return array.astype(dtype)


def as_column(value: Any, *, every_float: bool = False) -> Column:
    """Wraps an array of any library.

    Args:
        value: a NumPy array (memory-mapped ones are not read whole), a tensor
            of any backend, a pandas DataFrame or Series (which becomes one
            column, `[examples, 1]`), a SciPy sparse matrix (made dense row by
            row), or anything that `np.asarray` takes.
        every_float: see `device_dtype`.

    Returns:
        The column; its dtype stays as it is where no device takes it.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(value, _Dense | _Sparse):
        return value
    if keras_data.is_scipy_sparse(value):
        dtype = device_dtype(value.dtype, every_float=every_float)
        return _Sparse(value, dtype)
    try:
        array = keras_data.to_numpy(value)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"A value of type {type(value).__name__} in the data is not an "
            f"array: {error}"
        ) from error
    if array.ndim == 0:
        raise DataError(
            f"The data hold the scalar {value!r}: every array must have shape "
            "[examples, ...]. Repeat it for each example."
        )
    if stays_on_host(array.dtype):
        return _Dense(array, array.dtype)
    return _Dense(array, device_dtype(array.dtype, every_float=every_float))


def _is_mapped(array: Any) -> bool:
    """Whether it is a view into a file, which casting would read whole."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return isinstance(array, mmap.mmap)


class _Dense:
    """A NumPy array: cast once, or row by row if it lies in a file."""

    def __init__(self, array: np.ndarray, dtype: np.dtype) -> None:
        if not _is_mapped(array):
            array = cast(array, dtype)
        self.dtype = dtype
        self.shape = array.shape
        # (A plain array: a `memmap` makes one of its own for every row.)
        self._array = np.asarray(array)

    def rows(self, index: Any) -> np.ndarray:
        return cast(self._array[index], self.dtype)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.rows(slice(None))

    def part(self, start: int, stop: int) -> "_Dense":
        return _Dense(self._array[start:stop], self.dtype)


class _Sparse:
    """A SciPy sparse matrix, `[examples, features]`."""

    def __init__(self, matrix: Any, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.shape = tuple(matrix.shape)
        self._matrix = matrix.tocsr()

    def rows(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            return cast(self._matrix[index].toarray(), self.dtype)
        index = np.asarray(index)
        dense = self._matrix[index.reshape(-1)].toarray()
        return cast(dense.reshape(*index.shape, -1), self.dtype)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.rows(slice(None))

    def part(self, start: int, stop: int) -> "_Sparse":
        return _Sparse(self._matrix[start:stop], self.dtype)
