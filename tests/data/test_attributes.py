"""What is saved of the user's objects, and what is only recognised."""

import collections
import random

import keras
import numpy as np
import pytest

from legato.data import attributes as attributes_module
from legato.data.attributes import Attributes
from legato.errors import DamagedError, RestoreError
from tests.data.reading import through_disk


class Data:
    """Like a dataset: data, and what changes."""

    def __init__(self):
        self.x = np.arange(300_000.0)  # large
        self.rate = 0.5
        self.rng = np.random.default_rng(1)
        self.own = random.Random(2)
        self.order = np.arange(10)
        self.index = np.arange(200_000)  # large
        self.names = [str(i) for i in range(5000)]  # large
        self.labels = np.array(self.names, dtype=object)
        self.table = {str(i): i for i in range(5000)}  # large
        self.layer = keras.layers.Dropout(0.5, seed=3)


def change_nothing(data):
    assert data.x.sum() > 0


def shuffle_small(data):
    np.random.shuffle(data.order)


def shuffle_large(data):
    np.random.shuffle(data.index)


def shuffle_lists(data):
    random.shuffle(data.names)
    np.random.shuffle(data.labels)


def reassign(data):
    data.index = np.random.permutation(data.index)
    data.names = list(reversed(data.names))
    data.names[3:5] = ["new"]


def draw(data):
    data.rng.random(3)
    data.own.random()


def draw_layer(data):
    data.layer(np.ones((2, 3), "float32"), training=True)


def add(data):
    data.more = {"epochs": [1, 2], "last": np.float32(3)}
    data.rate *= 0.1


def remove(data):
    del data.order


def grow_table(data):
    data.table["new"] = 3


def look_at(data):
    return [
        data.x[::1000].tolist(),
        data.rate,
        data.rng.bit_generator.state["state"],
        data.own.getstate(),
        getattr(data, "order", np.zeros(0)).tolist(),
        data.index.tolist(),
        list(data.names),
        data.labels.tolist(),
        list(data.table.items()),
        getattr(data, "more", None),
        np.asarray(
            keras.ops.convert_to_numpy(data.layer.seed_generator.state)
        ).tolist(),
    ]


CHANGES = [
    shuffle_small,
    shuffle_large,
    shuffle_lists,
    reassign,
    draw,
    draw_layer,
    add,
    remove,
    grow_table,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_found_saved_and_put_back(change):
    data, tracked = make()
    built = look_at(data)
    assert tracked.look().state is None
    change(data)
    changed = look_at(data)
    assert changed != built
    look = tracked.look()
    assert look.lost == []
    state = through_disk(look.state)
    # What did not change is not saved again.
    size = sum(a.nbytes for a in state["arrays"].values())
    assert size < (2_000_000 if change in (shuffle_large, reassign) else 2e5)
    # In this process,
    tracked.reset()
    assert look_at(data) == built
    tracked.set(state)
    assert look_at(data) == changed
    assert tracked.look().same(look)
    # in another one,
    other, others = make()
    others.set(state)
    assert look_at(other) == changed
    # and back to the beginning.
    others.reset()
    assert look_at(other) == built


def make():
    data = Data()
    data.layer(np.ones((2, 3), "float32"))
    return data, Attributes(data)


def test_nothing_changed():
    data, tracked = make()
    change_nothing(data)
    assert tracked.look().state is None
    tracked.reset()
    tracked.set(None)
    assert look_at(data) == look_at(make()[0])


def test_large_data_are_referred_to():
    data, tracked = make()
    draw(data)
    arrays = tracked.look().state["arrays"]
    assert max(a.nbytes for a in arrays.values()) < 10_000
    assert data.x is vars(data)["x"]


def test_one_row_of_many_is_seen():
    data, tracked = make()
    data.x[77_777] += 1
    look = tracked.look()
    state = through_disk(look.state)
    assert any(a.nbytes == data.x.nbytes for a in state["arrays"].values())
    other, others = make()
    others.set(state)
    assert other.x[77_777] == data.x[77_777]


def test_what_cannot_be_put_back_is_refused():
    data, tracked = make()
    data.x = data.x.reshape(-1, 2)  # a view: the array itself is as it was
    tracked.reset()
    big = np.zeros((300_000, 2))
    data.x = big
    tracked = Attributes(data)
    big += 1
    with pytest.raises(RestoreError, match=r"Data: an array.*new process"):
        tracked.reset()


def test_too_much_is_lost_and_said(monkeypatch):
    monkeypatch.setattr(attributes_module, "_SAVED_BYTES", 1000)
    data, tracked = Data(), None
    data.x = data.index = None
    tracked = Attributes(data)
    data.cache = np.zeros(500)
    look = tracked.look()
    assert look.state is None and "bytes in" in look.lost[0]


def test_a_memory_mapped_array_is_not_read(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1000, 10)))
    data = Data()
    data.x = np.load(tmp_path / "x.npy", mmap_mode="r+")
    tracked = Attributes(data)
    # That this is not seen shows that it was not looked at.
    data.x[5] = 3
    draw(data)
    assert tracked.look().lost == []
    data.x = data.x[:50]
    assert tracked.look().lost == ["x"]


def test_pandas_frames():
    pandas = pytest.importorskip("pandas")
    data = Data()
    data.frame = pandas.DataFrame({"a": np.arange(50), "b": np.arange(50.0)})
    built = data.frame
    tracked = Attributes(data)
    draw(data)
    assert tracked.look().lost == []
    data.frame = data.frame.sample(frac=1)
    assert "frame" in tracked.look().lost
    tracked.reset()
    assert data.frame is built
    data.frame.loc[3, "a"] = 77
    assert "DataFrame" in tracked.look().lost[0]
    with pytest.raises(RestoreError, match="new process"):
        tracked.reset()


def test_torchs_tensors():
    import torch

    data = Data()
    data.tensor = torch.arange(400_000.0)
    tracked = Attributes(data)
    draw(data)
    assert tracked.look().lost == []
    data.tensor[5] = 3
    assert "Tensor" in tracked.look().lost[0]


class Opaque(bytes):
    """Nobody can look into it."""


def test_what_was_there_is_put_back_even_if_it_cannot_be_saved():
    data = Data()
    built = data.opaque = Opaque(b"abc")
    tracked = Attributes(data)
    data.opaque = Opaque(b"cab")
    data.new = Opaque(b"new")
    assert tracked.look().lost == ["opaque", "new"]
    tracked.reset()
    assert data.opaque is built
    assert not hasattr(data, "new")
    assert tracked.look().state is None


def test_shared_and_nested_objects():
    data = Data()
    data.nested = {"a": [data.rng, {"deep": data.order}]}
    data.queue = collections.deque([1, 2], maxlen=3)
    tracked = Attributes(data)
    draw(data)
    shuffle_small(data)
    data.queue.append(5)
    state = through_disk(tracked.look().state)
    other = Data()
    other.nested = {"a": [other.rng, {"deep": other.order}]}
    other.queue = collections.deque([1, 2], maxlen=3)
    Attributes(other).set(state)
    assert other.nested["a"][0] is other.rng
    assert other.nested["a"][1]["deep"] is other.order
    assert other.queue == data.queue
    assert look_at(other) == look_at(data)


@pytest.mark.parametrize(
    "state, error",
    [
        (3, DamagedError),
        ({}, DamagedError),
        ({"tree": {}, "arrays": {}, "orders": {}}, DamagedError),
        ({"tree": {}, "arrays": {}, "orders": {"x": 3}}, RestoreError),
    ],
)
def test_damaged_states(state, error):
    with pytest.raises(error):
        make()[1].set(state)


@pytest.mark.parametrize(
    "order, error",
    [
        (np.zeros(5000, np.int64), DamagedError),
        (np.arange(5000.0), DamagedError),
        (None, DamagedError),
        (np.arange(4999), RestoreError),
    ],
)
def test_damaged_orders(order, error):
    data, tracked = make()
    shuffle_lists(data)
    state = tracked.look().state
    state["orders"] = dict.fromkeys(state["orders"], order)
    tracked.reset()
    with pytest.raises(error):
        tracked.set(state)
