"""States of other libraries, through a checkpoint and back."""

import enum

import numpy as np
import pytest
import torch

from legato.data.encoding import CannotEncodeError, decode, encode
from legato.errors import DamagedError
from tests.data.reading import through_disk

STATE = {
    "next": 3,
    "rate": 0.1,
    "none": None,
    "flags": [True, False],
    "pair": (1, ("a", 2.5), []),
    "raw": b"\x00\xff",
    "empty": b"",
    "by number": {0: "a", -1: {"x": (2,)}, True: "t"},
    "mixed": {"~a": 1, ("k", 2): 3, None: 4, b"b": 5},
    "array": np.arange(6, dtype="float16").reshape(2, 3),
    "zero": np.zeros((0, 3), "int64"),
    "scalar": np.float32(1.5),
    "big": 2**127 + 1,
    "text": np.bool_(True),
}


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        assert [type(k) for k in one] == [type(k) for k in other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, np.ndarray | torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one == other).all()
    else:
        assert one == other


def test_states_come_back_as_they_were():
    # (A file of JSON has sorted keys: the order of plain dicts is lost.)
    state = {key: STATE[key] for key in sorted(STATE)}
    assert_same(decode(through_disk(encode(state))), state)


def test_tensors_come_back():
    state = {"generator": torch.Generator().manual_seed(3).get_state()}
    assert_same(decode(through_disk(encode(state))), state)


def test_what_is_encoded_is_a_copy():
    state = {"order": np.arange(3), "seen": [1]}
    encoded = encode(state)
    state["order"][:] = 7
    state["seen"].append(2)
    assert_same(decode(encoded), {"order": np.arange(3), "seen": [1]})


class Color(enum.IntEnum):
    RED = 1


class Words(dict):
    pass


@pytest.mark.parametrize(
    "value, words",
    [
        ({"a": [1, {2}]}, r"its state\['a'\]\[1\] is a builtins.set"),
        ({"a": Color.RED}, r"Color"),
        (Words(), r"Words"),
        ({"a": {Color.RED: 1}}, r"a key of its state\['a'\] is a .*Color"),
        (np.array([{}]), "numpy.ndarray"),
        (lambda: 0, "function"),
    ],
)
def test_what_cannot_be_saved_is_named(value, words):
    with pytest.raises(CannotEncodeError, match=words):
        encode(value)


@pytest.mark.parametrize(
    "state",
    [
        {"~tuple": 3},
        {"~tuple": [], "more": 1},
        {"~bytes": np.zeros(3)},
        {"~bytes": "abc"},
        {"~scalar": np.zeros(3)},
        {"~tensor": [1]},
        {"~pairs": [[1]]},
        {"~pairs": [[[1], 2]]},
        {"~pairs": [[{"~tuple": [[1]]}, 2]]},
        {"~other": 1},
    ],
)
def test_damage(state):
    with pytest.raises(DamagedError, match="data state"):
        decode([state])
