"""Datasets of examples: the order, its positions, workers, what is wrong."""

import gc
import time
import tracemalloc

import keras
import numpy as np
import pytest

import legato
from legato.data import Feed
from legato.errors import ConfigError, DataError, RestoreError, WorkerError
from tests.data.reading import (
    assert_equal,
    chunk_batches,
    digest,
    read,
    read_with_states,
    take,
)
from tests.workers import datasets

COUNT = 12  # over two ends of epochs


def source(dataset=None, **arguments):
    if dataset is None:
        dataset = datasets.Draws()
    arguments = {"transform": datasets.augment, **arguments}
    return legato.RandomAccessSource(dataset, 5, **arguments)


KINDS = {
    "here": {},
    "1 process": {"workers": 1, "processes": True},
    "2 processes": {"workers": 2, "processes": True, "prefetch": 1},
    "3 processes": {"workers": 3, "processes": True},
}


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted order, made in this thread."""
    return read_with_states(source(), COUNT)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_every_position_by_any_workers(kind, whole):
    batches, states = whole
    assert len({digest(batch) for batch in batches}) == COUNT
    resumed = source(**KINDS[kind])
    assert resumed.inexact is None
    assert_equal(read(resumed, COUNT), batches)
    for position, state in enumerate(states[:-1]):
        rest = read(resumed, COUNT - position, state=state)
        assert_equal(rest, batches[position:])


def test_resumed_at_every_position_by_threads():
    # (These draw from the transform's generator only.)
    batches, states = read_with_states(source(datasets.Numbers()), COUNT)
    for workers in (1, 3):
        resumed = source(datasets.Numbers(), workers=workers)
        assert resumed.inexact is None
        for position, state in enumerate(states[:-1]):
            rest = read(resumed, COUNT - position, state=state)
            assert_equal(rest, batches[position:])


@pytest.mark.parametrize("kind", KINDS)
def test_how_it_is_cut_changes_nothing(kind, whole):
    cut = source(**KINDS[kind])
    for capacity, most in ((3, 2), (256, 256)):
        assert_equal(read(cut, COUNT, capacity=capacity, most=most), whole[0])


def test_an_epoch_holds_every_example_once(whole):
    assert [len(b["y"]) for b in whole[0][:10]] == [5, 5, 5, 5, 3] * 2
    for epoch in (whole[0][:5], whole[0][5:10]):
        seen = np.concatenate([batch["y"] for batch in epoch])
        assert sorted(seen.tolist()) == list(range(23))
    assert (whole[0][0]["y"] != whole[0][5]["y"]).any()


def test_a_chunk_knows_its_examples():
    made = source(datasets.Numbers())
    iterator = made.iterate(seed=5, capacity=4)
    for _ in range(5):
        chunk = iterator.next_chunk(3)
        batches = chunk_batches(made, chunk)
        assert chunk.rows.tolist() == [b["y"].tolist() for b in batches]


def test_the_state_is_two_numbers(whole):
    assert whole[1][7] == {"epoch": 1, "batch": 2}


def test_the_order_is_that_of_arrays_of_the_same_length(whole):
    arrays = legato.ArraySource(np.arange(23), 5)
    assert_equal([b["y"] for b in whole[0]], [b for b in read(arrays, COUNT)])


def test_augmentation_is_a_function_of_seed_epoch_and_example():
    def drawn(batch_size, seed, epoch):
        found = {}
        made = legato.RandomAccessSource(
            datasets.Numbers(), batch_size, transform=datasets.augment
        )
        iterator = made.iterate(seed=seed, capacity=1)
        iterator.set_state({"epoch": epoch, "batch": 0})
        for batch in take(iterator, made, made.batches_per_epoch):
            for index, x in zip(batch["y"], batch["x"], strict=True):
                found[int(index)] = x.tolist()
        return found

    reference = drawn(5, 1, 1)
    assert drawn(7, 1, 1) == reference
    for other in (drawn(5, 1, 2), drawn(5, 2, 1)):
        assert not set(map(str, other.values())) & set(
            map(str, reference.values())
        )


class Vast:
    """As many examples as one likes, which take no memory."""

    def __init__(self, length):
        self.length = length
        self.asked = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert type(index) is int
        self.asked.append(index)
        return np.array([index // 10**6, index % 10**6], "int32")


@pytest.mark.parametrize("length", [10**9, 10**12])
def test_any_number_of_examples_any_position_in_no_time(length):
    tracemalloc.start()
    vast = legato.RandomAccessSource(Vast(length), 100)
    iterator = vast.iterate(seed=3, capacity=1)
    times = []
    for batch in (10, 10**6, vast.batches_per_epoch - 1, 10):
        began = time.thread_time()
        iterator.set_state({"epoch": 2, "batch": batch})
        (found,) = take(iterator, vast, 1)
        times.append(time.thread_time() - began)
        assert len(np.unique(found, axis=0)) == 100
    asked = vast.recipe.dataset.asked
    assert asked[-100:] == asked[-400:-300]
    assert max(asked) > length // 2 and min(asked) < length // 2
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert max(times) < 0.5, times  # (about 2 ms)


def test_whole_batches_are_asked_for_where_that_is_possible():
    batches = read(source(datasets.AtOnce()), COUNT)
    assert_equal(batches, read(source(datasets.Numbers()), COUNT))
    wrong = datasets.AtOnce()
    wrong.__class__ = type(
        "Wrong", (datasets.AtOnce,), {"__getitems__": lambda s, i: [1]}
    )
    with pytest.raises(DataError, match="gave 1 examples for 5 indices"):
        source(wrong)


def test_arrays_lists_and_datasets_of_libraries():
    x, y = np.arange(46.0).reshape(23, 2), np.arange(23)
    arrays = legato.RandomAccessSource((x, {"y": y}), 5)
    expected = read(legato.ArraySource((x, {"y": y}), 5), COUNT)
    assert_equal(read(arrays, COUNT), expected)
    examples = [(x[i], {"y": i}) for i in range(23)]
    assert_equal(read(legato.RandomAccessSource(examples, 5), COUNT), expected)


def test_a_dataset_of_pytorch():
    torch = pytest.importorskip("torch")
    x, y = np.arange(46.0).reshape(23, 2), np.arange(23)
    tensors = torch.utils.data.TensorDataset(
        torch.from_numpy(x), torch.from_numpy(y)
    )
    expected = read(legato.ArraySource((x, y), 5), COUNT)
    assert_equal(read(legato.RandomAccessSource(tensors, 5), COUNT), expected)


def test_a_dataset_of_grain():
    grain = pytest.importorskip("grain")
    mapped = grain.MapDataset.range(23).map(lambda i: {"y": i})
    expected = read(legato.ArraySource({"y": np.arange(23)}, 5), COUNT)
    assert_equal(read(legato.RandomAccessSource(mapped, 5), COUNT), expected)


class Ragged(datasets.Numbers):
    def __getitem__(self, index):
        return {"tokens": np.arange(1 + index * 7 % 11), "y": index}


def test_padded_batches_are_resumed_at_every_position():
    def made():
        return legato.RandomAccessSource(
            Ragged(), 5, collate=legato.Pad(boundaries=[4, 8, 12], mask=True)
        )

    batches, states = read_with_states(made(), COUNT)
    assert {b["tokens"].shape[1] for b in batches} <= {4, 8, 12}
    assert all(b["tokens"].shape == b["tokens_mask"].shape for b in batches)
    assert made().partial_batch_size == 0
    for position, state in enumerate(states[:-1]):
        for most in (1, 4):
            rest = read(made(), COUNT - position, state=state, most=most)
            assert_equal(rest, batches[position:])


def test_going_back_forgets_what_was_drawn_for_its_shape():
    made = legato.RandomAccessSource(Ragged(), 5, collate=legato.Pad())
    whole = read(made, 4)
    iterator = made.iterate(seed=5, capacity=4)
    iterator.next_chunk(4)
    assert iterator._chunks.pending is not None
    iterator.set_state({"epoch": 0, "batch": 0})
    assert_equal(take(iterator, made, 4), whole)


def test_dtypes_are_those_that_the_backend_computes_with():
    made = legato.RandomAccessSource(
        [(np.zeros(2), 1, True, np.uint8(3))] * 4, 2
    )
    assert [str(a.dtype) for a in made.batch_spec(2)] == [
        "float32",
        "int32" if keras.config.backend() == "jax" else "int64",
        "bool",
        "uint8",
    ]


def test_the_feed_lets_workers_go_ahead_and_still_knows_the_position():
    made = source(datasets.Draws(), workers=2, processes=True)
    feed = Feed(made, seed=5, capacity=4)
    first = feed.take(2)
    state = feed.get_state()
    assert state["position"] == {"epoch": 0, "batch": 2}
    feed.prefetch(3)
    assert feed.get_state() == state
    one = feed.take(1)  # the plan changed
    assert feed.get_state()["position"] == {"epoch": 0, "batch": 3}
    feed.prefetch(4)
    feed.set_state(state)
    assert_equal(
        chunk_batches(made, feed.take(1)), list(chunk_batches(made, one))
    )
    assert first.num_batches == 2
    feed.close()


def test_nothing_of_the_users_runs_ahead_in_this_process():
    assert not source().iterate(seed=0, capacity=1).draws_ahead
    assert (
        source(datasets.Numbers(), workers=1)
        .iterate(seed=0, capacity=1)
        .draws_ahead
    )


def test_a_validation_makes_no_batches_of_a_second_epoch():
    made = source(datasets.Numbers(), workers=2, processes=True)
    iterator = made.iterate(seed=0, capacity=1)
    take(iterator, made, 5)
    assert iterator._ahead.workers.room() == 5  # nothing more was begun
    take(iterator, made, 1)  # a second epoch is wanted after all
    take(iterator, made, 3)
    assert iterator._ahead._next[0] == 2
    iterator.close()


def test_workers_are_kept_for_the_next_iterator_and_end_with_the_source():
    made = source(datasets.Numbers(), workers=1, processes=True)
    iterator = made.iterate(seed=0, capacity=1)
    take(iterator, made, 1)
    process = iterator._ahead.workers._workers[0].process
    iterator.close()
    iterator.close()
    other = made.iterate(seed=0, capacity=1)
    take(other, made, 1)
    assert other._ahead.workers._workers[0].process is process
    other.close()
    del made, iterator, other
    gc.collect()
    assert process.returncode is not None


# -- what is not exact, and what is wrong -------------------------------------


def test_threads_that_draw_from_the_global_generators_are_named():
    assert "processes=True" in source(datasets.Draws(), workers=2).inexact


class DrawsSeldom:
    """Draws for one example, which is not in the first batch."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        noise = np.random.rand() if index == 12 else 0.0
        return np.full(2, index + noise, "float32"), index


@pytest.mark.parametrize("kind", ["here", "2 threads", "2 processes"])
def test_threads_that_draw_later_are_named_then(kind):
    kinds = {**KINDS, "2 threads": {"workers": 2}}
    made = legato.RandomAccessSource(
        DrawsSeldom(), 5, shuffle=False, **kinds[kind]
    )
    assert made.inexact is None
    read(made, 7)
    if kind != "2 threads":
        assert made.inexact is None
        return
    assert "threads, it (in batch 2) draws from the global" in made.inexact
    assert made.inexact.count("threads, it") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_that_changes_itself_is_named(kind):
    made = source(datasets.Counts(), **KINDS[kind])
    assert "made twice and was not the same" in made.inexact
    assert "first_sha256" not in made.identity


def test_identity_tells_data_apart():
    def identity(*args, **arguments):
        return source(*args, **arguments).identity

    same = identity()
    assert same == identity(workers=1, processes=True)
    for other in (
        identity(datasets.Numbers()),
        identity(shuffle=False),
        identity(seed=3),
        identity(transform=None),
        identity(datasets.Draws(22)),
    ):
        assert other != same


BAD = datasets.Bad


@pytest.mark.parametrize(
    "dataset, arguments, error, words",
    [
        (datasets.Numbers(0), {}, DataError, ["empty", "0 examples"]),
        (
            datasets.Numbers(4),
            {"drop_remainder": True},
            DataError,
            ["4 examples, less than one batch"],
        ),
        (3, {}, DataError, ["int", "__len__ and __getitem__"]),
        ("abc", {}, DataError, ["str", "__getitem__"]),
        (iter([1]), {}, DataError, ["list_iterator", "__getitem__"]),
        ((np.zeros(3), np.zeros(4)), {}, DataError, ["[3, 4]"]),
        ((np.zeros(3), 1), {}, DataError, ["scalar 1"]),
        (["a", "b"], {}, DataError, ["numbers"]),
        ([{}, {}], {}, DataError, ["without any x"]),
        (None, {"workers": -1}, ConfigError, ["workers=-1", "at least 0"]),
        (None, {"workers": 1.5}, ConfigError, ["workers=1.5", "int"]),
        (None, {"prefetch": 0}, ConfigError, ["prefetch=0", "at least 1"]),
        (None, {"timeout": 0}, ConfigError, ["timeout=0", "seconds"]),
        (None, {"processes": True}, ConfigError, ["workers=4"]),
    ],
)
def test_what_is_wrong_is_named(dataset, arguments, error, words):
    with pytest.raises(error) as caught:
        source(dataset, transform=None, **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("batch_size", [0, 2.5, True, None])
def test_a_bad_batch_size_is_named(batch_size):
    with pytest.raises(DataError, match="batch_size="):
        legato.RandomAccessSource(datasets.Numbers(), batch_size)


@pytest.mark.parametrize(
    "how, words",
    [
        ("has another shape", ["(2,) at x", "(3,)", "legato.Pad"]),
        ("has another dtype", ["int16 at x", "float32"]),
        ("has other keys", ["keys ['x']", "keys ['x', 'y']"]),
        ("is none", ["NoneType at y"]),
    ],
)
def test_an_example_that_is_unlike_the_others_is_named(how, words):
    made = source(BAD(how), transform=None, shuffle=False)
    with pytest.raises(DataError) as caught:
        read(made, 5)
    for word in ["dataset (Bad): example 7", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_before_a_bad_example_is_given_out_first(kind):
    made = source(BAD("raises", bad=13), shuffle=False, **KINDS[kind])
    iterator = made.iterate(seed=5, capacity=4)
    assert iterator.next_chunk(4).num_batches == 2
    for _ in range(2):  # and asked for again, it is raised again
        with pytest.raises((OSError, WorkerError), match="not there"):
            iterator.next_chunk(4)
        assert iterator.get_state() == {"epoch": 0, "batch": 2}
    iterator.set_state({"epoch": 0, "batch": 3})
    assert iterator.next_chunk(4).num_batches == 1
    iterator.close()


def test_what_is_raised_here_is_the_users_own_with_a_note():
    made = source(BAD("raises"), shuffle=False)
    with pytest.raises(OSError, match="not there") as caught:
        read(made, 5)
    assert caught.value.__notes__ == [
        "(example 7, in batch 1 of epoch 0 of dataset (Bad))"
    ]


@pytest.mark.parametrize("processes", [True, False])
def test_what_a_worker_raises_names_the_place(processes):
    made = source(BAD("raises"), shuffle=False, workers=2, processes=processes)
    with pytest.raises(WorkerError) as caught:
        read(made, 5)
    for word in (
        "dataset (Bad): batch 1 of epoch 0",
        "example 7",
        "OSError: the file is not there",
    ):
        assert word in str(caught.value)
    assert len(read(made, 1)) == 1  # nothing is broken


def test_after_a_death_new_workers_are_started():
    made = source(BAD("is killed"), shuffle=False, workers=1, processes=True)
    iterator = made.iterate(seed=5, capacity=1)
    take(iterator, made, 1)
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        take(iterator, made, 1)
    assert iterator.get_state() == {"epoch": 0, "batch": 1}
    iterator.close()
    assert len(read(made, 1)) == 1


def test_what_goes_wrong_in_the_first_batch_is_raised_at_once():
    for arguments in ({}, {"workers": 1, "processes": True}):
        with pytest.raises((OSError, WorkerError), match="not there"):
            source(BAD("raises", bad=3), shuffle=False, **arguments)


@pytest.mark.parametrize(
    "state", [None, {}, {"epoch": 0, "batch": 5}, {"epoch": -1, "batch": 0}]
)
def test_a_position_of_something_else_is_refused(state):
    with pytest.raises(RestoreError, match="data position"):
        source().iterate(seed=0, capacity=1).set_state(state)


def test_a_pydataset_is_refused_with_a_remedy():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return np.zeros((2, 2))

    with pytest.raises(DataError, match="PyDataset itself"):
        legato.RandomAccessSource(Batches(), 5)
