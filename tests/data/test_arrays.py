"""Arrays in memory: order, shapes, positions, and what is refused."""

import keras
import numpy as np
import pytest

from legato.data import ArraySource, Feed
from legato.data import arrays as arrays_module
from legato.errors import DataError, RestoreError

X = np.arange(23 * 2, dtype="float32").reshape(23, 2)
Y = np.arange(23, dtype="int32")


def batches(source, count, state=None, capacity=4, most=None):
    """The next batches as the device would see them, and the states after."""
    iterator = source.iterate(seed=5, capacity=capacity)
    if state is not None:
        iterator.set_state(state)
    found, states = [], []
    while len(found) < count:
        chunk = iterator.next_chunk(most or capacity)
        for index in range(chunk.num_batches):
            batch = source.fetch(source.resident, chunk.operands, index)
            found.append(keras.tree.map_structure(np.asarray, batch))
            states.append(chunk.state)
    return found[:count], states


@pytest.fixture(params=["resident", "staged"])
def source(request, monkeypatch):
    if request.param == "staged":
        monkeypatch.setattr(arrays_module, "_RESIDENT_BYTES", 0)
    return ArraySource({"x": X, "more": (Y,)}, batch_size=5)


def test_an_epoch_holds_every_example_once(source):
    found, _ = batches(source, 10)
    assert [len(b["x"]) for b in found] == [5, 5, 5, 5, 3] * 2
    for epoch in (found[:5], found[5:]):
        labels = np.concatenate([b["more"][0] for b in epoch])
        assert sorted(labels.tolist()) == list(range(23))
        rows = np.concatenate([b["x"] for b in epoch])
        assert (rows == X[labels]).all()
    assert (found[0]["x"] != found[5]["x"]).any()


def test_resumed_at_every_position_over_an_epochs_end(source):
    whole, _ = batches(source, 14)
    for position in range(12):
        iterator = source.iterate(seed=5, capacity=4)
        for _ in range(position):
            iterator.next_chunk(1)
        rest, _ = batches(source, 14 - position, state=iterator.get_state())
        for a, b in zip(rest, whole[position:], strict=True):
            keras.tree.map_structure(np.testing.assert_array_equal, a, b)


def test_the_order_does_not_depend_on_how_it_is_cut(source):
    whole, _ = batches(source, 12)
    for capacity, most in ((1, 1), (3, 2), (256, 256)):
        cut, _ = batches(source, 12, capacity=capacity, most=most)
        for a, b in zip(cut, whole, strict=True):
            keras.tree.map_structure(np.testing.assert_array_equal, a, b)


def test_unshuffled_and_without_remainder():
    source = ArraySource(Y, 5, shuffle=False, drop_remainder=True)
    found, _ = batches(source, 4)
    assert np.concatenate(found).tolist() == list(range(20))
    assert source.batches_per_epoch == 4 and source.partial_batch_size == 0


def test_fewer_examples_than_a_batch():
    source = ArraySource(Y, 100)
    (batch,), _ = batches(source, 1)
    assert sorted(batch.tolist()) == list(range(23))
    assert source.batches_per_epoch == 1 and source.full_batch_size == 23


def test_its_own_seed_goes_before_the_runs():
    own = ArraySource(Y, 5, seed=5)
    a = own.iterate(seed=1, capacity=1).next_chunk(1).operands
    b = ArraySource(Y, 5).iterate(seed=5, capacity=1).next_chunk(1).operands
    assert (a == b).all()


def test_dtypes_are_those_that_the_backend_computes_with():
    source = ArraySource(
        (X.astype("float64"), Y.astype("int64"), Y > 3, Y.astype("uint8")), 4
    )
    assert [str(a.dtype) for a in source.resident] == [
        "float32",
        "int32" if keras.config.backend() == "jax" else "int64",
        "bool",
        "uint8",
    ]


@pytest.mark.parametrize(
    "arrays, batch_size, words",
    [
        ((X, Y[:20]), 5, ["different numbers", "23", "20"]),
        ((X[:0], Y[:0]), 5, ["empty", "0 examples"]),
        ({}, 5, ["no array"]),
        ((X, 3), 5, ["scalar 3"]),
        (np.array(["a", "b"]), 5, ["dtype <U1", "numbers"]),
        (X, 0, ["batch_size=0", "at least 1"]),
        (X, 2.5, ["batch_size=2.5", "int"]),
        (X, True, ["batch_size=True", "int"]),
    ],
)
def test_what_is_wrong_is_named(arrays, batch_size, words):
    with pytest.raises(DataError) as caught:
        ArraySource(arrays, batch_size)
    for word in words:
        assert word in str(caught.value)


def test_less_than_one_whole_batch_is_refused():
    with pytest.raises(DataError, match="23 examples, less than one batch"):
        ArraySource(X, 100, drop_remainder=True)


@pytest.mark.parametrize(
    "state", [None, {}, {"epoch": 0, "batch": 99}, {"epoch": -1, "batch": 0}]
)
def test_a_position_of_something_else_is_refused(state):
    iterator = ArraySource(X, 5).iterate(seed=0, capacity=1)
    with pytest.raises(RestoreError, match="data position"):
        iterator.set_state(state)


def test_identity_tells_data_apart():
    def identity(*args, **kwargs):
        return ArraySource(*args, **kwargs).identity

    same = identity((X, Y), 5)
    assert same == identity((X.copy(), Y.copy()), 5)
    changed = X.copy()
    changed[0, 0] += 1
    for other in (
        identity((changed, Y), 5),
        identity((X, Y), 6),
        identity((X[:22], Y[:22]), 5),
        identity((X.astype("float16"), Y), 5),
        identity([X, Y], 5),
        identity((X, Y), 5, shuffle=False),
    ):
        assert other != same


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
@pytest.mark.parametrize("sizes", [(1,), (1, 3), (2, 1, 1, 4), (1, 1, 1, 2)])
def test_chunks_of_any_sizes_hold_the_same_batches(shuffle, sizes):
    source = ArraySource((X, Y), 2, shuffle=shuffle)  # 12 in an epoch
    expected, states = batches(source, 45, capacity=1, most=4)
    iterator = source.iterate(seed=5, capacity=4)
    for begin in (0, 3, 13, 7, 13):
        before = states[begin - 1] if begin else {"epoch": 0, "batch": 0}
        iterator.set_state(before)
        found = []
        for most in sizes * 3:
            chunk = iterator.next_chunk(most)
            assert len(chunk.operands) == 4
            for index in range(chunk.num_batches):
                found.append(
                    source.fetch(source.resident, chunk.operands, index)
                )
            assert chunk.state == states[begin + len(found) - 1]
        for ours, theirs in zip(found, expected[begin:], strict=False):
            assert (np.asarray(ours[0]) == theirs[0]).all()
            assert (np.asarray(ours[1]) == theirs[1]).all()


def test_the_feed_knows_what_was_taken_not_what_was_prefetched():
    source = ArraySource(Y, 5)
    feed = Feed(source, seed=5, capacity=4)
    feed.take(2)
    state = feed.get_state()
    feed.prefetch(2)
    position = {"epoch": 0, "batch": 2}
    assert feed.get_state() == state == {"position": position, "ahead": None}
    # The plan changed: a shorter one is wanted than was prefetched.
    one = feed.take(1)
    assert one.num_batches == 1 and feed.get_state()["position"]["batch"] == 3
    feed.prefetch(4)
    feed.set_state(state)
    assert (feed.take(1).operands == one.operands).all()
    feed.close()
