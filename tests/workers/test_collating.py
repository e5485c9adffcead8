"""Examples become batches: stacked, padded, or refused by name."""

import collections

import numpy as np
import pytest

import legato
from legato.errors import ConfigError
from legato.workers.collating import UnevenError, stack

Pair = collections.namedtuple("Pair", ["left", "right"])


def test_any_structure_is_stacked():
    examples = [
        (
            {"a": np.full(2, i, "uint8"), "b": None},
            [i, np.ones(2)],
            Pair(1.5, True),
        )
        for i in range(3)
    ]
    first, second, pair = stack(examples)
    assert first["a"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert first["a"].dtype == np.uint8 and first["b"] is None
    assert isinstance(pair, Pair)
    assert pair.left.tolist() == [1.5] * 3 and pair.right.dtype == bool
    assert second[0].tolist() == [0, 1, 2] and second[1].shape == (3, 2)


@pytest.mark.parametrize(
    "example",
    [
        np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(6)[::-2],
        np.arange(3, dtype=">f4"),
        np.array(7, ">i2"),
        np.zeros((0, 3)),
        np.zeros((3, 0)),
        np.array(["a", "bc"], ">U5"),
        np.zeros(
            2,
            {"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [0, 8]},
        ),
        np.array([None, [1]], object),
    ],
)
def test_arrays_keep_their_dtype_and_lie_in_order(example):
    found = stack([example, example.copy(order="K")])
    assert found.dtype == example.dtype
    assert found.shape == (2, *example.shape)
    assert found.flags.c_contiguous
    assert all(np.array_equal(row, example) for row in found)
    assert not np.shares_memory(found, example)


def test_a_list_of_numbers_is_an_array_and_one_of_arrays_is_not():
    assert stack([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    one, other = stack([[np.zeros(2), 1], [np.ones(2), 2]])
    assert one.shape == (2, 2) and other.tolist() == [1, 2]


@pytest.mark.parametrize(
    "examples, position, words",
    [
        ([np.zeros(2), np.zeros(3)], 1, ["(3,)", "(2,)", "legato.Pad"]),
        ([{"a": 1}, {"a": 1.5}], 1, ["float64", "int64", "a"]),
        ([{"a": 1}, {"b": 1}], 1, ["keys ['b']", "keys ['a']"]),
        ([(1, 2), (1, 2), (1,)], 2, ["tuple of 1", "tuple of 2"]),
        ([(1, None), (1, 2)], 1, ["int at 1", "None"]),
        ([(1, 2), (1, None)], 1, ["NoneType at 1"]),
        ([[[1, 2], [3]]], 0, ["no array", "inhomogeneous"]),
    ],
)
def test_what_does_not_go_together_is_named(examples, position, words):
    with pytest.raises(UnevenError) as caught:
        stack(examples)
    assert caught.value.position == position
    for word in words:
        assert word in caught.value.message


def tokens(*lengths):
    return [
        {"tokens": np.arange(1, n + 1, dtype="int32"), "label": n}
        for n in lengths
    ]


def test_padded_to_the_longest():
    batch = legato.Pad({"tokens": -1}, mask=True)(tokens(2, 0, 3))
    assert batch["tokens"].tolist() == [[1, 2, -1], [-1, -1, -1], [1, 2, 3]]
    assert batch["tokens_mask"].sum(axis=1).tolist() == [2, 0, 3]
    assert batch["tokens_mask"].tolist()[0] == [True, True, False]
    assert batch["label"].tolist() == [2, 0, 3]
    assert batch["tokens"].dtype == np.int32


def test_one_value_pads_whatever_has_an_axis():
    batch = legato.Pad(0.5)([(np.ones((2, 3)), 1), (np.ones((1, 3)), 2)])
    assert batch[0][1].tolist() == [[1] * 3, [0.5] * 3]
    assert batch[1].tolist() == [1, 2]


@pytest.mark.parametrize(
    "arguments, lengths, expected",
    [
        ({"boundaries": [4, 8]}, (2, 3), 4),
        ({"boundaries": [4, 8]}, (4, 1), 4),
        ({"boundaries": [4, 8]}, (5, 1), 8),
        ({"boundaries": [4], "truncate": True}, (9, 1), 4),
        ({"multiple": 6}, (7, 2), 12),
        ({"multiple": 6}, (0, 0), 6),
    ],
)
def test_lengths_are_few(arguments, lengths, expected):
    batch = legato.Pad(**arguments)(tokens(*lengths))
    assert batch["tokens"].shape == (2, expected)


@pytest.mark.parametrize(
    "pad, position, words",
    [
        ({"boundaries": [2]}, 1, ["length 3", "boundaries=[2]", "truncate"]),
        ({"values": {"label": 0, "tokens": 0}}, 0, ["single number at label"]),
        ({"values": (0, 0)}, 0, ["not nested", "dict"]),
        ({"values": 0.5}, 0, ["int32", "0.5"]),
    ],
)
def test_what_cannot_be_padded_is_named(pad, position, words):
    with pytest.raises(UnevenError) as caught:
        legato.Pad(**pad)(tokens(1, 3))
    assert caught.value.position == position
    for word in words:
        assert word in caught.value.message


def test_a_mask_needs_a_name():
    with pytest.raises(UnevenError, match="values of a dict"):
        legato.Pad(mask=True)([np.zeros(2), np.zeros(1)])
    with pytest.raises(UnevenError, match="already"):
        legato.Pad(mask=True)([{"a": np.zeros(2), "a_mask": 1}])


@pytest.mark.parametrize(
    "arguments",
    [
        {"boundaries": []},
        {"boundaries": [4, 4]},
        {"boundaries": [8, 4]},
        {"boundaries": [0, 4]},
        {"multiple": 0},
        {"multiple": 2, "boundaries": [4]},
        {"truncate": True},
    ],
)
def test_arguments_that_do_not_go_together(arguments):
    with pytest.raises(ConfigError):
        legato.Pad(**arguments)
