"""What is drawn before it is wanted, and what a checkpoint then holds."""

import shutil
import time

import keras
import numpy as np
import pytest

import legato
from legato.data import Feed, fit_source
from legato.errors import DamagedError
from legato.storage import strict_json
from tests.data.reading import assert_equal, chunk_batches, read, through_disk
from tests.data.sources import KINDS, SOURCES

COUNT = 13


def make(name):
    if name == "grain":
        pytest.importorskip("grain")
    return KINDS[name]()


def feed_of(source, draws_here=True):
    return Feed(source, seed=5, capacity=4, draws_here=draws_here)


@pytest.mark.parametrize("name", [n for n in SOURCES if n != "generator"])
def test_resumed_with_what_was_drawn_already(name):
    """A save that nobody planned comes while the next batches are there."""
    source = make(name)
    wanted = read(make(name), COUNT, seed=5)
    for stop in range(1, 8):
        feed = feed_of(source)
        found = []
        while len(found) < stop:
            found += chunk_batches(source, feed.take(2))
            feed.prefetch(3)
        state = through_disk(feed.get_state())
        feed.close()
        source = make(name)
        feed = feed_of(source)
        feed.set_state(state)
        while len(found) < COUNT:
            # (A chunk that was drawn may be longer than what is wanted now.)
            found += chunk_batches(source, feed.take(1))
            feed.prefetch(1 + len(found) % 3)
        feed.close()
        assert_equal(found[:COUNT], wanted)


def test_not_where_callbacks_come_first():
    source = make("iterable")
    feed = feed_of(source)
    feed.take(1)
    feed.prefetch(2, is_quiet=False)
    assert feed.ahead is None
    feed.prefetch(2)
    assert feed.ahead is not None and feed.ahead.num_batches == 2
    feed.close()
    feed = feed_of(source, draws_here=False)
    feed.take(1)
    feed.prefetch(2)
    assert feed.ahead is None
    feed.close()


def test_an_error_waits_for_its_turn():
    def fails():
        yield np.zeros((2, 1)), np.zeros(2)
        yield np.zeros((2, 1)), np.zeros(2)
        raise OSError("the disk is gone")

    feed = feed_of(fit_source(fails(), steps_per_epoch=9))
    feed.take(2)
    feed.prefetch(1)
    feed.get_state()
    with pytest.raises(OSError, match="the disk is gone"):
        feed.take(1)
    feed.close()


@pytest.mark.parametrize(
    "ahead",
    [
        [],
        [1, 2],
        [np.zeros((1, 5, 2), "float32")],
        [np.zeros((1, 5, 2), "float32"), np.zeros((2, 5), "int32")],
        [np.zeros((9, 5, 2), "float32"), np.zeros((9, 5), "int32")],
        [np.zeros((1, 5, 2), "float64"), np.zeros((1, 5), "int32")],
        [np.float32(1), np.zeros((1, 5), "int32")],
        3,
    ],
)
def test_what_is_no_batch_is_refused(ahead):
    feed = feed_of(make("iterable"))
    state = {"position": feed.get_state()["position"], "ahead": ahead}
    with pytest.raises(DamagedError):
        feed.set_state(state)
    feed.close()


@pytest.mark.parametrize(
    "damage",
    [[], [[]], [[None, None]], [None], 3, [[3]], [[{"shape": [2]}]]],
)
def test_strings_of_no_batch_are_refused(damage):
    feed = feed_of(make("named iterable"))
    feed.take(1)
    feed.prefetch(1)
    state = feed.get_state()
    assert len(state["beside"]) == 1
    feed.set_state(through_disk(state))
    with pytest.raises(DamagedError):
        feed.set_state({**state, "beside": damage})
    feed.close()


class Slow:
    """As long as a step, so that something is drawn at most times."""

    def __len__(self):
        return 40

    def __iter__(self):
        generator = np.random.default_rng(0)
        for _ in range(40):
            time.sleep(0.002)
            x = generator.normal(size=(4, 3)).astype("float32")
            names = [str(each) for each in x[:, 0]]
            yield {"x": x, "name": names}, x.sum(1, keepdims=True)


def train(run_dir, **changes):
    keras.utils.set_random_seed(0)
    x = keras.layers.Input((3,), name="x")
    model = keras.Model({"x": x}, keras.layers.Dense(1)(x))
    model.compile("adam", "mse")
    legato.fit(
        model,
        Slow(),
        epochs=3,
        run_dir=run_dir,
        keep_last=None,
        verbose=0,
        **changes,
    )
    return [keras.ops.convert_to_numpy(w) for w in model.weights]


# (Of the checkpoints that the test removes.)
@pytest.mark.filterwarnings("ignore::legato.errors.LegatoWarning")
def test_runs_saved_at_any_time_go_on_exactly(tmp_path):
    wanted = train(tmp_path / "run", checkpoint_interval="0.01s")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    with_ahead = 0
    for number, checkpoint in enumerate(checkpoints[:-1]):
        host = strict_json.loads((checkpoint / "host.json").read_bytes())
        ahead = host["data"]["ahead"] is not None
        with_ahead += ahead
        # ... with what stays on the host.
        assert ("beside" in host["data"]) == ahead
        if (not ahead and number % 8) or with_ahead > 3:
            continue
        copy = tmp_path / f"copy_{number}"
        shutil.copytree(tmp_path / "run", copy)
        for later in checkpoints[number + 1 :]:
            shutil.rmtree(copy / "checkpoints" / later.name)
        shutil.rmtree(copy / "final")
        found = train(copy)
        assert all(map(np.array_equal, found, wanted))
    if keras.config.backend() == "jax":
        assert with_ahead
