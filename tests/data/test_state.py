"""States with arrays, taken apart and put together."""

import numpy as np
import pytest

from legato.data import join_arrays, split_arrays
from legato.data.state import Opaque
from legato.errors import DamagedError
from legato.storage import strict_json

STATE = {
    "pass": 3,
    "generator": [np.arange(4, dtype="uint8"), None, {"x": np.float32([1])}],
    "flag": True,
    "rate": 0.1,
    "name": "~a",
}


def test_round_trip():
    tree, arrays = split_arrays(STATE)
    assert sorted(arrays) == ["array_0", "array_1"]
    tree = strict_json.loads(strict_json.dumps(tree))
    joined = join_arrays(tree, arrays)
    np.testing.assert_equal(joined, STATE)
    assert joined["generator"][0].dtype == "uint8"


def test_opaque_arrays_are_named_apart_and_stay_so():
    state = {"a": np.zeros(2), "b": np.ones(3, "uint8").view(Opaque)}
    tree, arrays = split_arrays(state)
    assert sorted(arrays) == ["array_0", "opaque_1"]
    assert all(type(array) is np.ndarray for array in arrays.values())
    joined = join_arrays(tree, arrays)
    assert type(joined["a"]) is np.ndarray and type(joined["b"]) is Opaque
    assert split_arrays(joined)[0] == tree


@pytest.mark.parametrize("state", [None, 3, {}, [], {"epoch": 0, "batch": 1}])
def test_without_arrays(state):
    assert split_arrays(state) == (state, {})
    assert join_arrays(state, {}) == state


def test_the_reserved_key():
    with pytest.raises(ValueError, match="'~a' is reserved"):
        split_arrays({"x": {"~a": 3}})


@pytest.mark.parametrize(
    "tree, names, words",
    [
        ({"~a": "array_0"}, [], "no array 'array_0'"),
        ({"~a": 0}, ["array_0"], "not the name"),
        ({"~a": "array_0", "b": 1}, ["array_0"], "not the name"),
        ({"~a": ["array_0"]}, ["array_0"], "not the name"),
        ([{"~a": "array_0"}] * 2, ["array_0"], "no array 'array_0'"),
        ({}, ["array_0", "b"], "2 arrays belong to nothing"),
        (None, ["array_0"], "1 arrays belong to nothing"),
    ],
)
def test_damage(tree, names, words):
    with pytest.raises(DamagedError, match=words):
        join_arrays(tree, {name: np.zeros(2) for name in names})


def test_damage_by_depth():
    tree = []
    for _ in range(500):
        tree = [tree]
    with pytest.raises(DamagedError, match="too deeply"):
        join_arrays(tree, {})
    with pytest.raises(DamagedError, match="no array"):
        join_arrays({"~a": "x"}, {"x": [1, 2]})  # not an array
