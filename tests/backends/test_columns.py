"""Numbers that variables hold, as their bits in columns beside the logs."""

import keras
import numpy as np
import pytest

from legato.backends.protocol import Columns
from legato.backends.scope import columns_of


def variable(dtype, shape=()):
    return keras.Variable(
        np.zeros(shape), dtype=dtype, trainable=False, name="held"
    )


@pytest.mark.parametrize(("first", "every"), [(0, 1), (2, 3), (6, 3), (9, 10)])
def test_every_bit_comes_back(first, every):
    numbers = {
        "float32": np.array([0.1, -0.0, np.inf, 1e-45, 3, 4, 5], "float32"),
        "int64": np.arange(7, dtype="int64") * -(2**40 + 1),
        "int32": np.arange(7, dtype="int32") - (2**31 - 1),
        "float64": np.array([0.1, -0.0, 5e-324, 1e300, 3, 4, 5]),
    }
    logs = np.random.default_rng(0).normal(size=(7, 2)).astype("float32")
    bits = [
        each.view("float32").reshape(len(each), -1) for each in numbers.values()
    ]
    columns = Columns(list(numbers))
    rows = np.concatenate([logs, *bits], axis=1)
    assert rows.shape[1] == 2 + columns.count
    alone, found = columns.split(rows, first, every)
    np.testing.assert_array_equal(alone, logs)
    for (dtype, expected), each in zip(numbers.items(), found, strict=True):
        assert each.dtype == dtype
        assert each.tobytes() == expected[first::every].tobytes()


def test_only_single_numbers_of_known_dtypes_are_held_so():
    single = variable("float32")
    columns = columns_of([single, variable("int32")])
    assert columns is not None and columns.count == 2
    assert columns_of([]) is None
    assert columns_of([single, variable("float32", (2,))]) is None
    assert columns_of([single, variable("bfloat16")]) is None
