"""PyDatasets: the hooks, their state, threads, and what is inexact."""

import random
import re
import time

import keras
import numpy as np
import pytest

import legato
from legato.data import Feed, fit_source
from legato.errors import DamagedError, ExactnessError, RestoreError
from tests.data.reading import assert_equal, read, read_with_states, take
from tests.data.sources import Buckets, Plain, Reshuffles, X, Y
from tests.waiting import until

EVENTS = []  # (in an attribute, they would be put back with the data)


class Records(Plain):
    """Tells when it is called."""

    def __getitem__(self, index):
        EVENTS.append(index)
        return super().__getitem__(index)

    def on_epoch_begin(self):
        EVENTS.append("begin")

    def on_epoch_end(self):
        EVENTS.append("end")


@pytest.fixture(autouse=True)
def events():
    EVENTS.clear()
    return EVENTS


def kerass_events(epochs, **kwargs):
    EVENTS.clear()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(Records(), epochs=epochs, shuffle=False, verbose=0, **kwargs)
    return list(EVENTS)


def our_events(epochs, steps=None, call=True):
    source = fit_source(Records(), steps_per_epoch=steps)
    EVENTS.clear()
    feed = Feed(source, seed=1, capacity=4)
    for _ in range(epochs):
        for _ in range(steps or 5):
            feed.take(1)
        if call:
            feed.end_epoch()
    feed.close()
    return list(EVENTS)


@pytest.mark.parametrize("steps", [None, 3, 5])
def test_hooks_are_called_where_keras_calls_them(steps):
    theirs = kerass_events(3, **({"steps_per_epoch": steps} if steps else {}))
    ours = our_events(3, steps)
    assert ours[:2] == ["end", "begin"]

    def hooks(found):
        # Keras draws a batch, and calls a hook, to build the model; and
        # TensorFlow's threads draw ahead.
        begin = found.index("end")
        return [e for e in found[begin:] if isinstance(e, str)]

    assert hooks(ours) == hooks(theirs)
    assert hooks(ours) == ["end", "begin"] * 3 + ["end"]
    # Where the data end in mid-epoch, Keras ends the epoch; here they go on.
    if keras.config.backend() != "tensorflow" and steps != 3:
        assert ours == theirs[theirs.index("end") :]


def test_hooks_without_anybody_calling_end_epoch():
    assert our_events(3, call=False) == our_events(3)[:-1]


def test_end_epoch_in_the_middle_is_nothing(events):
    source = fit_source(Records())
    iterator = source.iterate(seed=1, capacity=4)
    iterator.end_epoch()
    events.clear()
    iterator.next_chunk(2)
    iterator.end_epoch()
    assert events == ["end", "begin", 0, 1]
    iterator.next_chunk(8)
    iterator.end_epoch()  # the last batch, a partial one, is to come
    assert events[4:] == [2, 3, 4]
    iterator.next_chunk(8)
    iterator.end_epoch()
    iterator.end_epoch()
    assert events[4:] == [2, 3, 4, "end"]


def test_resumed_between_the_hooks():
    whole = read(fit_source(Reshuffles()), 15)
    for called in (True, False):
        source = fit_source(Reshuffles())
        iterator = source.iterate(seed=5, capacity=4)
        take(iterator, source, 5)
        if called:
            iterator.end_epoch()
        state = iterator.get_state()
        other = fit_source(Reshuffles())
        assert_equal(read(other, 10, state=state), whole[5:])
        assert source.inexact is None


def test_nothing_is_saved_of_what_does_not_change():
    _, states = read_with_states(fit_source(Plain()), 7)
    assert all(state["attributes"] is None for state in states)


def test_a_dataset_is_not_looked_at_for_each_batch(monkeypatch):
    source = fit_source(Reshuffles())
    looks = []
    look = source.attributes.look
    monkeypatch.setattr(
        source.attributes, "look", lambda: looks.append(1) or look()
    )
    iterator = source.iterate(seed=1, capacity=1)
    take(iterator, source, 5)
    assert len(looks) <= 2
    take(iterator, source, 5)
    assert len(looks) <= 4


def test_a_pending_batch_is_saved():
    source = fit_source(Buckets())
    iterator = source.iterate(seed=1, capacity=4)
    iterator.next_chunk(4)
    state = iterator.get_state()
    assert [a.shape for a in state["pending"]] == [(4, 5), (4,)]
    whole = take(source.iterate(seed=1, capacity=4), source, 9)
    rest = read(fit_source(Buckets()), 7, state=state, seed=1)
    assert_equal(rest, whole[2:])


class Frames(keras.utils.PyDataset):
    """What it changes cannot be saved."""

    def __init__(self, x, mutates=False, **kwargs):
        super().__init__(**kwargs)
        self.mutates = mutates
        self.count = 0
        self.frame = Opaque(x)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.mutates:
            self.count += 1
        rows = self.frame.values()[5 * index : 5 * index + 5]
        return X[rows], Y[rows]

    def on_epoch_end(self):
        rows = self.frame.values()
        random.shuffle(rows)
        self.frame = Opaque(rows)


class Opaque(bytes):
    """Nobody can look into it, as into a pandas.DataFrame."""

    def values(self):
        return list(self)


def test_what_cannot_be_saved_is_made_again_by_the_hooks():
    whole, states = read_with_states(fit_source(Frames(range(20))), 13)
    for position, state in enumerate(states[:-1]):
        source = fit_source(Frames(range(20)))
        assert_equal(read(source, 13 - position, state=state), whole[position:])
        assert source.inexact is None
    assert states[-1]["repeat_hooks"] is True


def test_hooks_that_depend_on_what_was_drawn_cannot():
    source = fit_source(Frames(range(20), mutates=True))
    read_with_states(source, 7)
    assert "frame changed and cannot be saved" in source.inexact
    assert "on_epoch_end only" in source.inexact


def test_hooks_that_depend_on_what_was_drawn_in_an_epoch_before():
    for mutates in (True, False):
        source = fit_source(Frames(range(20), mutates))
        iterator = source.iterate(seed=1, capacity=1)
        take(iterator, source, 4)
        iterator.end_epoch()
        assert iterator.get_state()["repeat_hooks"] is not mutates
        assert (source.inexact is not None) == mutates


class DrawsFrames(Frames):
    def __getitem__(self, index):
        self.frame = Opaque(reversed(self.frame))
        return super().__getitem__(index)


def test_what_cannot_be_saved_and_changes_with_each_batch():
    source = fit_source(DrawsFrames(range(20)))
    read_with_states(source, 7)
    assert "DrawsFrames): frame changed and cannot be saved" in source.inexact


class Pandas(keras.utils.PyDataset):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        import pandas

        self.frame = pandas.DataFrame({"x": np.arange(20.0), "y": range(20)})

    def __len__(self):
        return 4

    def __getitem__(self, index):
        rows = self.frame.iloc[5 * index : 5 * index + 5]
        return rows[["x"]], rows["y"].to_numpy()

    def on_epoch_end(self):
        self.frame = self.frame.sample(frac=1).reset_index(drop=True)


def test_pandas_frames_that_are_shuffled():
    pytest.importorskip("pandas")
    whole, states = read_with_states(fit_source(Pandas()), 11)
    assert len({b[1].tobytes() for b in whole}) == 11
    for position in (0, 3, 4, 5, 9):
        source = fit_source(Pandas())
        rest = read(source, 11 - position, state=states[position])
        assert_equal(rest, whole[position:])
        assert source.inexact is None


# -- what is inexact --------------------------------------------------------


class Unseeded(Plain):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + np.random.default_rng().random(), y


def test_what_differs_each_time_is_named():
    source = fit_source(Unseeded())
    assert "batch 0 was drawn twice and was not the same" in source.inexact
    assert "first_sha256" not in source.identity
    assert "first_sha256" in fit_source(Plain()).identity


class DrawsOwn(Plain):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = np.random.default_rng(1)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + self.generator.random(), y


class DrawsGlobal(Plain):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + np.random.rand(), y


@pytest.mark.parametrize(
    "cls, words",
    [
        (DrawsOwn, "changes attributes"),
        (DrawsGlobal, "draws from the global generators"),
    ],
)
def test_draws_in_threads_are_named(cls, words):
    assert fit_source(cls()).inexact is None
    source = fit_source(cls(workers=2))
    assert f"with workers=2, __getitem__ {words}" in source.inexact
    assert "workers=1" in source.inexact


class DrawsSeldom(Plain):
    """Not in the first batch, nor in the others that are tried."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x + np.random.rand() if index == 3 else x), y


class DrawsOnce(Plain):
    """What it drew for a batch it keeps."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.cache = {}

    def __getitem__(self, index):
        if index not in self.cache:
            self.cache[index] = random.random()
        x, y = super().__getitem__(index)
        return x + self.cache[index], y


def test_draws_that_are_kept_are_named():
    source = fit_source(DrawsOnce(workers=2))
    assert "__getitem__ draws from the global generators" in source.inexact
    assert not source.dataset.cache.keys() - {0}


def test_draws_in_threads_are_named_when_they_come(tmp_path):
    source = fit_source(DrawsSeldom(workers=2))
    assert source.inexact is None
    read(source, 5)
    words = r"workers=2, __getitem__\(3\) draws from the global generators"
    assert re.search(words, source.inexact)
    assert source.inexact.count("workers=2") == 1

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    run = {"epochs": 3, "verbose": 0, "exact": "strict"}
    with pytest.raises(ExactnessError, match=words):
        legato.fit(model, DrawsSeldom(workers=2), run_dir=tmp_path, **run)


class DrawsEarly(Plain):
    """And works on while another batch is taken."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        x, y = super().__getitem__(0)
        time.sleep(0.06 if index in (6, 8) else 0.02)
        if index == 7:
            x = x + np.random.rand()
            time.sleep(0.1)
        return x, y


def test_taking_a_batch_does_not_undo_what_threads_draw():
    """It would be seen by chance only."""
    source = fit_source(DrawsEarly(workers=3))
    iterator = source.iterate(seed=1, capacity=1)
    take(iterator, source, 9)
    assert "__getitem__(7) draws" in source.inexact
    iterator.close()


def test_draws_of_others_are_not_those_of_threads():
    """Nor does it matter who draws where there is one thread."""
    source = fit_source(Slow(workers=2))
    iterator = source.iterate(seed=1, capacity=4)
    for _ in range(10):
        iterator.next_chunk(1)
        np.random.rand()
        random.random()
    assert source.watch.suspects
    state = np.random.get_state()[2], random.getstate()
    assert source.inexact is None
    assert (np.random.get_state()[2], random.getstate()) == state
    iterator.close()
    source = fit_source(DrawsSeldom())
    read(source, 5)
    assert source.inexact is None


# -- threads ----------------------------------------------------------------


class Slow(Plain):
    """Takes a time that varies; batches are still in order."""

    def __getitem__(self, index):
        time.sleep(0.002 * ((index * 7) % 5))
        return super().__getitem__(index)


def test_threads_keep_the_order():
    expected = read(fit_source(Plain(), shuffle=True), 20)
    source = fit_source(Slow(workers=4, max_queue_size=3), shuffle=True)
    assert_equal(read(source, 20), expected)


def test_threads_draw_ahead_within_an_epoch_only(events):
    source = fit_source(Records(workers=3, max_queue_size=4))
    iterator = source.iterate(seed=1, capacity=4)
    events.clear()
    iterator.next_chunk(2)
    until(lambda: len(events) >= 7)
    time.sleep(0.05)  # for what must not come
    assert sorted(events[2:]) == [0, 1, 2, 3, 4]
    take(iterator, source, 3)
    iterator.end_epoch()
    take(iterator, source, 1)
    assert events[7:9] == ["end", "begin"]
    iterator.close()
    iterator.close()


class Fails(Plain):
    def __getitem__(self, index):
        if index == 3:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [1, 3])
def test_what_it_raises_is_raised(workers):
    source = fit_source(Fails(workers=workers))
    iterator = source.iterate(seed=1, capacity=1)
    for _ in range(3):
        iterator.next_chunk(1)
    with pytest.raises(OSError, match="the disk is gone"):
        iterator.next_chunk(1)
    iterator.close()


def test_the_feed_does_not_draw_ahead(events):
    source = fit_source(Records())
    feed = Feed(source, seed=1, capacity=4)
    feed.take(1)
    before = list(events)
    feed.prefetch(2)
    time.sleep(0.02)
    assert events == before
    feed.close()


# -- what is refused --------------------------------------------------------

GOOD = {
    "pass": 0,
    "batch": 2,
    "step": 2,
    "hooks": 2,
    "attributes": None,
    "repeat_hooks": False,
    "pending": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"pass": -1},
        {"batch": 6},
        {"batch": "2"},
        {"step": 6},
        {"hooks": -2},
        {"repeat_hooks": 1},
        {"pending": []},
        {"pending": [np.zeros((5, 2), "float32")]},
        {"pending": [np.zeros((5, 2), "int8"), np.zeros(5, "int32")]},
        {"pending": 3},
        None,
    ],
)
def test_a_position_of_something_else_is_refused(change):
    state = {} if change is None else {**GOOD, **change}
    iterator = fit_source(Plain()).iterate(seed=1, capacity=1)
    with pytest.raises(RestoreError, match=r"data position.*Plain.*5 batches"):
        iterator.set_state(state)
    iterator.set_state(GOOD)


def test_damaged_attributes_are_refused():
    iterator = fit_source(Plain()).iterate(seed=1, capacity=1)
    with pytest.raises(DamagedError, match="attributes"):
        iterator.set_state({**GOOD, "attributes": [3]})
