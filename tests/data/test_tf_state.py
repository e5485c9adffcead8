"""`tf.data`, resumed through what TensorFlow saves of its iterators."""

import numpy as np
import pytest

from legato.data import fit_source
from legato.data.adapters import tf_data
from legato.data.state import Opaque
from legato.errors import DamagedError
from tests.data.reading import assert_equal, read, read_with_states
from tests.data.test_iterables import TF, base, random_function, tf


def interleaved():
    return (
        tf()
        .data.Dataset.range(4)
        .interleave(
            lambda i: base().skip(5 * i).take(9),
            cycle_length=3,
            num_parallel_calls=2,
        )
        .batch(5)
    )


def buckets():
    return (
        tf()
        .data.Dataset.range(40)
        .map(lambda i: tf().fill([2 + 2 * (i % 3)], i))
        .bucket_by_sequence_length(lambda e: tf().shape(e)[0], [3, 5], [4] * 3)
    )


UNSIZED = ("repeated for ever", "mapped and repeated", "buckets", "interleaved")
KINDS = {
    **TF,
    "interleaved": interleaved,
    "buckets": buckets,
    "ragged": lambda: (
        tf()
        .data.Dataset.range(40)
        .map(lambda i: tf().range(1 + i % 5))
        .ragged_batch(4)
        .prefetch(2)
    ),
    "repeated for ever": lambda: base().shuffle(9, seed=3).repeat().batch(5),
    "mapped and repeated": lambda: (
        base()
        .shuffle(9, seed=3)
        .map(lambda x, y: (x, y))
        .repeat()
        .shuffle(5, seed=1)
        .batch(5)
    ),
    "stateless": lambda: base().map(
        lambda x, y: (
            x + tf().random.stateless_uniform([], seed=[3, y]),
            y,
        ),
        num_parallel_calls=tf().data.AUTOTUNE,
    ).shuffle(9, seed=1).batch(5),
}  # fmt: skip


@pytest.fixture(autouse=True)
def often(monkeypatch):
    tf().random.set_seed(None)
    monkeypatch.setattr(tf_data, "_INTERVAL", 2)
    monkeypatch.setattr(tf_data, "_BUFFERED_PER_BATCH", 100)


def make(name):
    steps = 7 if name in UNSIZED else None
    return fit_source(KINDS[name](), steps_per_epoch=steps)


@pytest.mark.parametrize("name", KINDS)
def test_resumed_at_every_position(name):
    source = make(name)
    assert source.inexact is None
    assert source.reader.method == "state", source.reader.why
    count = min(2 * source.batches_per_epoch + 3, 17)
    whole, states = read_with_states(source, count)
    told = [state["library"] for state in states]
    assert sum(each is not None for each in told) >= 2
    for position, state in enumerate(states[:-1]):
        rest = read(source, count - position, state=state)
        assert_equal(rest, whole[position:])


@pytest.mark.parametrize("name", ["buckets", "shuffled"])
def test_states_do_not_depend_on_where_chunks_are_cut(name):
    """One batch more is drawn where the shapes change."""
    whole, states = read_with_states(make(name), 14)
    source = make(name)
    iterator = source.iterate(seed=5, capacity=4)
    given = 0
    while given < 10:
        chunk = iterator.next_chunk(4)
        given += chunk.num_batches
        state, other = chunk.state["library"], states[given]["library"]
        assert (state and state["batch"]) == (other and other["batch"])
        rest = read(make(name), 14 - given, state=chunk.state)
        assert_equal(rest, whole[given:])
    iterator.close()


@pytest.mark.parametrize("name", ["cached evenly", "both caches", "thrice"])
def test_in_a_later_pass(name):
    """As a new process does, which began none of the passes before."""
    whole, states = read_with_states(make(name), 24)
    for position in range(9, 24, 2):
        rest = read(make(name), 24 - position, state=states[position])
        assert_equal(rest, whole[position:])


def test_few_batches_are_read_again(monkeypatch):
    monkeypatch.setattr(tf_data, "_INTERVAL", 16)
    drawn = []
    convert = tf_data._to_numpy

    def counting(element):
        drawn.append(1)
        return convert(element)

    def make():
        data = tf().data.Dataset.range(20_000).shuffle(32, seed=1).batch(2)
        return fit_source(data)

    source = make()
    iterator = source.iterate(seed=5, capacity=256)
    for _ in range(20):
        chunk = iterator.next_chunk(256)
    state = chunk.state
    expected = iterator.next_chunk(1).operands
    iterator.close()
    source = make()
    monkeypatch.setattr(tf_data, "_to_numpy", counting)
    iterator = source.iterate(seed=5, capacity=1)
    iterator.set_state(state)
    assert 0 < iterator.rereads <= 16
    found = iterator.next_chunk(1).operands
    np.testing.assert_array_equal(found[0][0], expected[0][0])
    assert len(drawn) <= 17
    iterator.close()


def test_what_cannot_be_saved_is_read_again(monkeypatch):
    source = fit_source(random_function(seed=3).batch(2))
    assert source.reader.method == "replay" and source.inexact is None
    assert "RandomUniform is stateful" in source.reader.why
    whole, states = read_with_states(source, 9)
    for position in (0, 3, 8):
        rest = read(source, 9 - position, state=states[position])
        assert_equal(rest, whole[position:])
    monkeypatch.setattr(tf_data, "_SAVED_BYTES", 500)
    source = fit_source(base().shuffle(23, seed=1).batch(2))
    assert source.reader.method == "replay"
    assert "its buffers hold" in source.reader.why


def test_a_state_of_something_else_is_refused():
    source = fit_source(base().shuffle(9, seed=3).batch(2))
    _, states = read_with_states(source, 7)
    state = states[7]
    assert isinstance(state["library"]["state"], Opaque)
    good = state["library"]["state"]
    for damage in (
        good[:-1],
        good[100:],
        good.astype("int32"),
        "text",
        np.frombuffer(b"\x08\x15", np.uint8),
        np.zeros(0, np.uint8),
    ):
        iterator = source.iterate(seed=5, capacity=1)
        library = {**state["library"], "state": damage}
        iterator.set_state({**state, "library": library})
        with pytest.raises(DamagedError, match=r"not that of tf\.data"):
            iterator.next_chunk(1)
        iterator.close()


def test_no_dataset_is_read_from_a_state(monkeypatch):
    """Its functions would be run: a file says what the program does."""

    def windows():
        nested = tf().data.Dataset.range(40).window(3).shuffle(4, seed=1)
        batches = nested.flat_map(lambda window: window.batch(3))
        return batches.apply(tf().data.experimental.assert_cardinality(14))

    source = fit_source(windows())
    assert source.reader.method == "replay"
    assert "its buffers hold datasets" in source.reader.why
    monkeypatch.setattr(tf_data, "_NESTED_KEY", b"never")
    iterator = iter(windows())
    next(iterator)
    forged = tf_data._save(iterator)
    monkeypatch.undo()
    with pytest.raises(DamagedError, match=r"not that of tf\.data"):
        tf_data._restore(iter(windows()), forged)
